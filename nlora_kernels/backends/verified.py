"""What `python -m nlora_kernels verify` found on this machine's GPUs, and what is chosen there because of it.

A record belongs to a model of GPU and to everything that its figures depend on: driver, torch, triton, the package, the
extension, the sources of the kernels and their measured tiles. It is a file of the user's cache folder whose name holds
a digest of all that, so that environments do not overwrite each other's, and one that does not match is not found.

A record is read once, when a GPU is first used; what was read holds until the process ends.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib
import json
import math
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import cache
from ..versions import __version__
from .base import short
from .native import _C
from .triton.tuning import rule, tables

# Where the kernel modules of GPU drivers say their version.
DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version"))
PACKAGE = Path(__file__).resolve().parent.parent
COMMAND = "python -m nlora_kernels verify"


class Time(NamedTuple):
    """A call of M, K, N, R and how long it took, over the time of the backend "lean"."""

    shape: tuple[int, int, int, int]
    ratio: float


class Record(NamedTuple):
    """One verification: of what, when, how each (backend, dtype) ended, and the times of those that passed.

    results: {(backend, dtype): (status, reason)}; times: {(backend, dtype, operation, dtype of the adapter): [Time]}.
    """

    identity: dict[str, Any]
    written: str
    results: dict[tuple[str, str], tuple[str, str]]
    times: dict[tuple[str, str, str, str], list[Time]]

    def passed(self, backend: str, dtype: torch.dtype) -> bool:
        return self.results.get((backend, short(dtype)), ("",))[0] == "passed"

    def faster(
        self, operation: str, dtype: torch.dtype, adapter: torch.dtype, shape: tuple[int, ...] | None
    ) -> list[str]:
        """The backends that passed and are faster than "lean", the fastest first.

        The timed call nearest to `shape` decides, among those of few rows for few rows and among the others for others:
        what is fastest at large products reads the weight too slowly to decode. Without a shape, all together decide.
        """
        ratios = {}
        for (backend, *key), times in self.times.items():
            if key == [short(dtype), operation, short(adapter)]:
                if shape:
                    few = shape[0] <= rule.FEW_ROWS
                    alike = [time for time in times if (time.shape[0] <= rule.FEW_ROWS) == few]
                    if alike:
                        ratios[backend] = min(alike, key=lambda time: _distance(time.shape, shape)).ratio
                else:
                    ratios[backend] = math.exp(math.fsum(math.log(time.ratio) for time in times) / len(times))
        return sorted((backend for backend, ratio in ratios.items() if ratio < 1), key=ratios.get)


def identity(index: int) -> dict[str, Any]:
    """Everything that what is found on a GPU depends on."""
    return identity_of(torch.cuda.get_device_properties(index))


def identity_of(properties) -> dict[str, Any]:
    sources = [*sorted(PACKAGE.glob("backends/**/*.py")), *tables.files(properties.name)]
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "driver": driver(),
        "torch": torch.__version__,
        "triton": _triton(),
        "nlora_kernels": __version__,
        "extension": _digest([Path(_C.__file__)]) if _C else None,
        "kernels": _digest(sources),
    }


def driver() -> str:
    """The version of the kernel's part of the GPU driver, and that of the library which programs talk to."""
    found = []
    for file in DRIVERS:
        try:
            found += re.findall(r"\d+(?:\.\d+)+", file.read_text())[:1]
        except OSError:
            continue
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0:
            found.append(f"CUDA {version.value // 1000}.{version.value % 1000 // 10}")
    except (OSError, AttributeError):
        pass
    return ", ".join(found) or "unknown"


def file_of(identity: dict[str, Any]) -> Path:
    """Where the record of an identity lies."""
    return _folder() / f"{_stem(identity)}-{cache.digest(identity)}.json"


def records() -> dict[Path, Record]:
    """All that can be read, of whatever identity; the newest last."""
    readable = ((file, record) for file in files() if (record := read(file)))
    return dict(sorted(readable, key=lambda item: item[1].written))


def files() -> list[Path]:
    """Where records lie, readable or not."""
    try:
        return sorted(_folder().glob("*.json"))
    except OSError:
        return []


def read(file: Path) -> Record | None:
    """The record of a file; None where there is none, or none that can be understood."""
    try:
        return parse(file.read_text())
    except (OSError, ValueError):
        return None


def parse(text: str) -> Record:
    """The record that a file holds. ValueError if it holds none."""
    try:
        stored = json.loads(text)
        results = {(r["backend"], r["dtype"]): (str(r["status"]), str(r["reason"])) for r in stored["results"]}
        record = Record(dict(stored["identity"]), str(stored["written"]), results, {})
        for t in stored["times"]:
            M, K, N, R = map(int, t["shape"])
            ratio = t["us"] / t["lean_us"]
            if not 0 < ratio < math.inf:
                raise ValueError(f"times must be positive, got {t}")
            if results.get((t["backend"], t["dtype"]), ("",))[0] == "passed":
                key = t["backend"], t["dtype"], t["operation"], t["adapter"]
                record.times.setdefault(key, []).append(Time((M, K, N, R), ratio))
        return record
    except (KeyError, TypeError, AttributeError, OverflowError, ZeroDivisionError) as error:
        raise ValueError(f"no record of {COMMAND}: {type(error).__name__}: {error}") from error


@functools.cache
def record(index: int) -> Record | None:
    """That of a GPU as everything is now; None where there is none."""
    try:
        # Without any record there is nothing that files would have to be hashed for.
        if not files():
            return None
        current = identity(index)
        found = read(file_of(current))
        return found if found and found.identity == current else None
    except OSError:
        return None


def awaits(index: int) -> str:
    """Why a GPU has no record that holds, and what makes one."""
    name = torch.cuda.get_device_name(index)
    others = [other for other in records().values() if other.identity.get("gpu") == name]
    if not others:
        return f"fused kernels await `{COMMAND}` on {name}: until it has passed, library calls compute there"
    current = identity(index)
    changed = [
        f"{key} was {others[-1].identity.get(key)} and is {value}"
        for key, value in current.items()
        if others[-1].identity.get(key) != value
    ]
    return f"fused kernels await `{COMMAND}` again on {name}: since the last time {', '.join(changed)}"


@functools.cache
def warn_once(index: int) -> None:
    """Says that a GPU has no record, at its first use."""
    with contextlib.suppress(OSError):
        warnings.warn(awaits(index), stacklevel=2)


def _distance(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    return math.hypot(*(math.log2(max(p, 1) / max(q, 1)) for p, q in zip(a, b, strict=True)))


def _folder() -> Path:
    return cache.folder() / "verified"


def _stem(identity: dict[str, Any]) -> str:
    return tables.file_name(str(identity["gpu"])).removesuffix(".json")


def _triton() -> str | None:
    try:
        return importlib.import_module("triton").__version__
    except ImportError:
        return None


def _digest(files: Iterable[Path]) -> str:
    """Of names and contents."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]
