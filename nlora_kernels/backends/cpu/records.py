"""Records of what products take: one file for everything that it depends on, in the user's cache folder."""

import functools
import hashlib
import json
import math
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ... import atomic, cache
from ..base import short
from ..native import _C
from .costs import Costs, Line, Setting

# What tells one CPU from another of the same name: on x86, and on Arm, whose CPUs have none.
MODEL = ("model name", "cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant", "CPU revision")
# What costs have beside their lines: seconds of a value.
MORE = ("apart", "across")


def processor() -> dict[str, str]:
    """What Linux says of the first CPU, by its names; elsewhere, and where it does not say it, the "model name"."""
    try:
        said = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        said = ""
    fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", said, re.MULTILINE))
    return {"model name": platform.processor() or platform.machine(), **fields}


@functools.cache
def _machine() -> dict[str, Any]:
    fields = processor()
    cpu = ", ".join(fields[name] for name in MODEL if name in fields)
    digest = hashlib.sha256(Path(_C.__file__).read_bytes()).hexdigest()
    return {"cpu": cpu, "torch": torch.__version__, "extension": digest[:16]}


def identity(setting: Setting) -> dict[str, Any]:
    """Everything that a record depends on."""
    dtype, tier, threads, precision = setting
    return {**_machine(), "dtype": short(dtype), "tier": tier, "threads": threads, "precision": precision}


def file_of(identity: dict[str, Any]) -> Path:
    """Where the record of an identity lies."""
    return cache.folder() / "cpu" / f"{identity['dtype']}-{identity['tier']}-{cache.digest(identity)}.json"


def read(file: Path, identity: dict[str, Any]) -> Costs | None:
    """The costs of a record; None where there is none of this identity, or none that can be understood."""
    try:
        stored = json.loads(file.read_text())
        lines = {name: Line(*(float(stored[name][part]) for part in Line._fields)) for name in Costs._fields[:3]}
        more = {name: float(stored[name]) for name in MORE}
        numbers = (value for part in (*lines.values(), more.values()) for value in part)
        finite = all(math.isfinite(value) and value >= 0 for value in numbers)
        pieces = stored["pieces"]
        if stored["identity"] == identity and finite and type(pieces) is int and pieces in (1, 2, 3):
            return Costs(**lines, **more, pieces=pieces, written=str(stored["written"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        pass
    return None


def write(setting: Setting, costs: Costs) -> Path:
    """Keeps the costs of a setting; returns the file."""
    of = identity(setting)
    file = file_of(of)
    stored = {name: getattr(costs, name)._asdict() for name in Costs._fields[:3]}
    stored |= {name: getattr(costs, name) for name in (*MORE, "pieces", "written")} | {"identity": of}
    cache.write(file, json.dumps(stored, indent=1) + "\n")
    return file


def recorded(setting: Setting, measure: Callable[[Setting], Costs | None] | None) -> Costs | None:
    """The costs on record; without a record those that `measure` finds, which become it. None where there are none.

    Of processes that start at once one measures and the others wait for it.
    """
    try:
        of = identity(setting)
        file = file_of(of)
        costs = read(file, of)
        if costs or measure is None:
            return costs
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic.locked(file.with_suffix(".lock")):
            costs = read(file, of)
            if costs is None and (found := measure(setting)):
                write(setting, found)
                costs = read(file, of)
        return costs
    except OSError:
        # What cannot be kept would be another in every process.
        return None
