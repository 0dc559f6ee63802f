"""Measured tiles: tables in tuned/<device>.json, of the user's cache folder and of the package.

An entry is {"dtype", "tf32", "shape": [M, N, K, R], "transposed": in the orientation of forward, else in that of the
gradient of x, "tile", "single": in one launch, "us", "rule_us": what the rule's choice takes}. The nearest of the same
dtype and orientation is used if its shape lies within a factor of two in each dimension; one that names no orientation,
as they once did, stands for both.
"""

import functools
import json
import math
import re
import warnings
from pathlib import Path

import torch

from .... import cache
from ...base import short
from ..device import Device

KEYS = "dtype", "tf32", "shape", "transposed", "tile", "single", "us", "rule_us"
TUNED = Path(__file__).parent / "tuned"


def nearest(dtype: torch.dtype, tf32: bool, shape: tuple[int, ...], transposed: bool, device: Device) -> dict | None:
    """The entry nearest to a shape, if no dimension is off by more than a factor of two."""
    found, distance = None, 1.0
    for entry in entries(device.name):
        kind = entry["dtype"], entry["tf32"], entry.get("transposed", transposed)
        if kind == (short(dtype), tf32, transposed):
            far = max(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in zip(shape, entry["shape"], strict=True))
            if far < distance or far == distance == 1.0:
                found, distance = entry, far
    return found


@functools.cache
def entries(name: str) -> tuple[dict, ...]:
    found = []
    for file in files(name):
        try:
            found += read(file)["entries"]
        except (OSError, ValueError) as error:
            warnings.warn(f"{file} is no table of tiles, and is passed over: {error}", stacklevel=2)
    return tuple(found)


def read(file: Path) -> dict:
    """The table of a file. ValueError if it holds none."""
    table = json.loads(file.read_text())
    if not isinstance(table, dict) or not isinstance(table.get("entries"), list):
        raise ValueError("it has no list of entries")
    return table


def folders() -> list[Path]:
    """Where tables lie: what was measured on this machine goes before what came with the package."""
    try:
        return [cache.folder() / "tuned", TUNED]
    except OSError:
        return [TUNED]


def files(device: str) -> list[Path]:
    """The tables of a device, that whose entries go before the others' first."""
    return [file for folder in folders() if (file := folder / file_name(device)).is_file()]


def file_name(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def forget() -> None:
    """Has the tables read anew."""
    entries.cache_clear()


def save(entries: list[dict], folder: Path | str, device: Device) -> Path:
    """Writes the table of a device; of two entries for one shape and orientation the one that gains more over the rule
    stays."""
    best = {}
    for entry in sorted(entries, key=lambda entry: entry["rule_us"] / entry["us"]):
        key = entry["dtype"], entry["tf32"], entry.get("transposed"), *entry["shape"]
        best[key] = {name: entry[name] for name in KEYS if name in entry}
    file = Path(folder) / file_name(device.name)
    cache.write(file, json.dumps({**device._asdict(), "entries": list(best.values())}, indent=1) + "\n")
    return file
