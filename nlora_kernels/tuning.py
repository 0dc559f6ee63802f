"""Which tile a Triton kernel runs with: measured entries where there are some, else a rule.

Letters: M rows, N columns and K summed features of a product, R rank. The rule is a wave model: among the tiles that
the device can run, take the one whose waves of programs cost least. Measured entries are data in tuned/<device>.json,
of the user's cache folder and of the package, and are written by `save`; the nearest entry of the same dtype is used if
its shape lies within a factor of two in each dimension.
"""

import functools
import json
import math
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from . import cache

TUNED = Path(__file__).parent / "tuned"


class Device(NamedTuple):
    """What the rule knows of a GPU. `capability` is 80 for sm_80; `shared` is the bytes one program may use."""

    name: str
    capability: int
    processors: int
    shared: int


class Tile(NamedTuple):
    """Rows and columns of a program's tile, features it sums over at a time, warps, and stages of its pipeline."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# Bytes of shared memory that one program may use, by compute capability.
SHARED = {80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376}
# What Triton takes beside the stages of operands: barriers, and scratch for the layouts of what is stored.
RESERVED = 4_096

# Tiles for 16-bit operands and the share of the matrix units' peak that each is expected to reach.
WIDE_TILES = {
    Tile(128, 256, 64, 8, 4): 1.0,
    Tile(128, 256, 64, 8, 3): 0.98,
    Tile(128, 128, 64, 8, 4): 0.86,
    Tile(128, 128, 32, 8, 4): 0.80,
    Tile(64, 128, 64, 4, 4): 0.70,
    Tile(64, 64, 64, 4, 4): 0.50,
}
# Operands whose rows are not 16-byte aligned are read element by element, and their addresses fill registers.
RAGGED_TILES = {Tile(64, 64, 32, 8, 2): 1.0, Tile(32, 32, 32, 4, 2): 0.5}
# Few rows: the weight is read once whatever the tile, so many small programs with deep pipelines read it fastest.
DECODE_TILES = {Tile(m, n, 128, 4, stages): n / 64 for m in (16, 32, 64) for n, stages in ((32, 5), (64, 4))}
# fp32 without TF32 runs on the scalar units, whose operands fill registers first.
EXACT_TILES = {Tile(64, 64, 16, 8, 3): 1.0, Tile(32, 64, 16, 4, 3): 0.8, Tile(16, 32, 16, 4, 3): 0.4}
TF32_TILES = {Tile(128, 128, 32, 8, 3): 1.0, Tile(64, 64, 32, 4, 3): 0.6, Tile(16, 64, 32, 4, 3): 0.2}

# Up to here the weight is read once or twice, and reading it bounds the time: decoding.
FEW_ROWS = 64


@functools.cache
def device_of(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        # Other vendors' devices get what Ampere gets: pointers and two launches.
        return Device(properties.name, 80, properties.multi_processor_count, properties.shared_memory_per_block)
    capability = properties.major * 10 + properties.minor
    shared = getattr(properties, "shared_memory_per_block_optin", SHARED.get(capability, 101_376))
    return Device(properties.name, capability, properties.multi_processor_count, shared)


def wide_tile(M: int, N: int, K: int, R: int, dtype: torch.dtype, tf32: bool, aligned: bool, device: Device) -> Tile:
    """The tile of the extended product (M, K)·(K, N) and of the single launch. `aligned`: rows start at 16 bytes."""
    measured = _measured(dtype, tf32, (M, N, K, R), device) if aligned else None
    if measured:
        return Tile(*measured["tile"])
    return min(candidates(M, dtype, tf32, aligned, device).items(), key=lambda c: _cost(M, N, *c, device))[0]


def narrow_tile(
    M: int,
    N: int,
    K: int,
    columns: int,
    dtype: torch.dtype,
    tf32: bool,
    aligned: bool,
    device: Device,
    right: torch.dtype | None = None,
) -> tuple[Tile, int]:
    """The tile of a product that has a short side, and into how many parts its sum over K is split.

    `columns` is the least width of the tile: all of N where a core follows. `right` is the dtype in which the right
    operand is stored where it is not `dtype`. The tile is as large as registers allow,
    for these products read more than they compute, and the sum is split until every processor has a program.
    """
    width = max(columns, min(128, padded(N)))
    if dtype == torch.float32 and not tf32:
        tile = Tile(min(padded(M), 32, max(16, 2048 // width)), width, 16, 8, 3)
    elif not aligned:
        width = max(columns, min(64, width))
        tile = Tile(min(padded(M), 64 if width <= 64 else 32), width, 32, 8, 2)
    else:
        # Without asynchronous matrix units the accumulators of four warps leave too few registers for the operands.
        asynchronous = device.capability >= 90
        height, depth = 64 if width > 64 else 128, 32 if dtype == torch.float32 else 64
        warps = 4 if asynchronous and width <= 128 else 8
        tile = Tile(min(padded(M), height), width, depth, warps, 3 if asynchronous else 2)
    while tile.stages > 1 and shared_bytes(tile, dtype, right) > device.shared:
        tile = tile._replace(stages=tile.stages - 1)
    tiles = math.ceil(M / tile.m) * math.ceil(N / tile.n)
    splits = 1
    while tiles * splits < device.processors and K / (2 * splits) >= 4 * tile.k and splits < 64:
        splits *= 2
    return tile, splits


def single_launch(
    M: int, N: int, K: int, R: int, dtype: torch.dtype, tf32: bool, aligned: bool, tile: Tile, device: Device
) -> bool:
    """Whether the narrow product goes into the launch of the wide one: where it then fills the last wave.

    Its items are as many rows as a tile by R, so they pay from many rows on. Two kinds of tile in one program need its
    registers: up to a rank of 128 on Hopper, of 32 on Blackwell, and not on Ampere.
    """
    measured = _measured(dtype, tf32, (M, N, K, R), device) if aligned else None
    if measured:
        return measured["single"]
    widest = {9: 128, 10: 32}.get(device.capability // 10, 0)
    return aligned and dtype != torch.float32 and R <= widest and M >= 2048 and tile.m >= 64


def padded(n: int) -> int:
    """The power of two, 16 at least, that holds n: what a tile of n rows or columns is padded to."""
    return max(16, 1 << (n - 1).bit_length())


def candidates(M: int, dtype: torch.dtype, tf32: bool, aligned: bool, device: Device) -> dict[Tile, float]:
    if dtype == torch.float32 and not tf32:
        tiles = EXACT_TILES
    elif not aligned:
        tiles = RAGGED_TILES
    elif dtype == torch.float32:
        tiles = TF32_TILES
    else:
        tiles = DECODE_TILES if M <= FEW_ROWS else WIDE_TILES
    fitting = {
        tile: share
        for tile, share in tiles.items()
        if shared_bytes(tile, dtype) <= device.shared and (device.capability >= 90 or tile.m * tile.n <= 128 * 128)
    }
    return fitting or {Tile(32, 32, 32, 4, 2): 1.0}


def shared_bytes(tile: Tile, dtype: torch.dtype, right: torch.dtype | None = None) -> int:
    """What a product takes of shared memory whose operands, or the left one alone, are of `dtype`."""
    return tile.stages * tile.k * (tile.m * dtype.itemsize + tile.n * (right or dtype).itemsize) + RESERVED


def _cost(M: int, N: int, tile: Tile, share: float, device: Device) -> tuple[float, int]:
    """Waves times the work of a tile; among equals the smaller tile, whose last wave wastes less."""
    waves = math.ceil(math.ceil(M / tile.m) * math.ceil(N / tile.n) / device.processors)
    return waves * tile.m * tile.n / share, tile.m * tile.n


def _measured(dtype: torch.dtype, tf32: bool, shape: tuple[int, ...], device: Device) -> dict | None:
    """The entry nearest to a shape, if no dimension is off by more than a factor of two."""
    nearest, distance = None, 1.0
    for entry in _entries(device.name):
        if (entry["dtype"], entry["tf32"]) == (short(dtype), tf32):
            far = max(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in zip(shape, entry["shape"], strict=True))
            if far < distance or far == distance == 1.0:
                nearest, distance = entry, far
    return nearest


@functools.cache
def _entries(name: str) -> tuple[dict, ...]:
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


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def forget() -> None:
    """Has the tables read anew."""
    _entries.cache_clear()


def save(entries: list[dict], folder: Path | str, device: Device) -> Path:
    """Writes the table of a device; of two entries for one shape the one that gains more over the rule stays."""
    best = {}
    for entry in sorted(entries, key=lambda entry: entry["rule_us"] / entry["us"]):
        best[entry["dtype"], entry["tf32"], *entry["shape"]] = entry
    file = Path(folder) / file_name(device.name)
    cache.write(file, json.dumps({**device._asdict(), "entries": list(best.values())}, indent=1) + "\n")
    return file
