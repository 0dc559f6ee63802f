"""What a child is asked and what it answers.

The task is JSON: {"nonce", "gpu", "rehearse"} asks what the machine is; with "backend" and "dtype" the cases are run;
with "compile", pairs of those, and "slice" [i, n] every n-th of their cases is, once and without a look at the results,
so that its kernels are compiled. The report gets one line of JSON at a time: the nonce and the machine, then each case
when it is done.
"""

import base64
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...backends.base import short
from .cases import dtype_of


def seed_of(task: dict[str, Any]) -> int:
    """Of the data of the witnesses: unknown before the task is given."""
    return int(task["nonce"][:8], 16)


def encoded(t: Tensor) -> dict[str, Any]:
    data = bytes(t.detach().cpu().contiguous().flatten().view(torch.uint8).tolist())
    return {"dtype": short(t.dtype), "shape": list(t.shape), "data": base64.b64encode(data).decode()}


def decoded(stored: dict[str, Any]) -> Tensor:
    data = bytearray(base64.b64decode(stored["data"], validate=True))
    return torch.frombuffer(data, dtype=dtype_of(stored["dtype"])).view(stored["shape"])


def lines_of(report: Path) -> list[Any]:
    """What a child reported, as far as it can be read: one that was killed may have stopped within a line."""
    found = []
    try:
        for line in report.read_text(errors="replace").splitlines():
            found.append(json.loads(line))
    except (OSError, ValueError):
        pass
    return found
