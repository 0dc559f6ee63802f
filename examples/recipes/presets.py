"""The papers' experiments as data: one file in examples/presets for each of their tables.

A file names its source, the script its presets are for, what the paper leaves unstated, options that all of them share
and groups of options that some do. A preset is "like" groups of its file or another preset, and has options of its own.
"""

import difflib
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).resolve().parent.parent / "presets"


class Preset(NamedTuple):
    name: str
    source: str
    script: str
    unstated: list[str]
    # What a configuration of the model calls its kind.
    model_type: str
    options: dict[str, Any]


@functools.cache
def load() -> dict[str, Preset]:
    """{name: preset} of all files."""
    files = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(FOLDER.glob("*.json"))]
    homes = {name: file for file in files for name in file["presets"]}

    def options(name: str) -> dict[str, Any]:
        file, own = homes[name], dict(homes[name]["presets"][name])
        like = own.pop("like", [])
        like = [like] if isinstance(like, str) else like
        groups = file.get("groups", {})
        merged: dict[str, Any] = {}
        for base in like:
            merged |= {} if base in groups else options(base)
        merged |= file["common"]
        for base in like:
            merged |= groups.get(base, {})
        return merged | own

    found = {}
    for name, file in homes.items():
        every = options(name)
        found[name] = Preset(name, file["source"], file["script"], file["unstated"], every.pop("model_type"), every)
    return found


def find(name: str, script: str) -> Preset:
    """Raises ValueError for an unknown name, with those that are like it, and for a preset of another script."""
    every = load()
    if name not in every:
        near = difflib.get_close_matches(name, every, n=3, cutoff=0) or sorted(every)[:3]
        raise ValueError(f"unknown preset {name!r}; near it are {', '.join(near)}; all are in {FOLDER}")
    preset = every[name]
    if preset.script != script:
        raise ValueError(f"{name} is a preset of examples/{preset.script}.py, not of examples/{script}.py")
    return preset
