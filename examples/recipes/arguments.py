"""Command-line arguments: numbers within bounds, presets, and files as JSON objects, refused in one line each."""

import argparse
import importlib
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from . import presets

NEEDS = "pip install '.[examples]'"
# Those that need no further arguments.
SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "cosine",
    "cosine_with_restarts",
    "inverse_sqrt",
    "linear",
    "polynomial",
)
# Of transformers, by the names that the papers use.
OPTIMIZERS = {"adamw": "adamw_torch"} | {name: name for name in ("adafactor", "adagrad", "rmsprop", "sgd")}


def import_all(*names: str) -> None:
    """What is missing is said before anything is read or loaded."""
    try:
        for name in names:
            importlib.import_module(name)
    except ImportError as error:
        raise SystemExit(f"{error}; this example needs: {NEEDS}") from error


def whole(low: int, high: float = math.inf) -> Callable[[str], int]:
    """Reads an integer from low to high."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", text.strip()) or not low <= int(text) <= high:
            bounds = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"must be an integer {bounds}, got {text}")
        return int(text)

    return read


def real(low: float, high: float = math.inf, *, and_low: bool = False) -> Callable[[str], float]:
    """Reads a number above low, or from it, and below high."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low < value < high or (and_low and value == low)):
            bounds = f"{'of at least' if and_low else 'above'} {low:g}"
            bounds += "" if high == math.inf else f" and below {high:g}"
            raise argparse.ArgumentTypeError(f"must be a number {bounds}, got {text}")
        return value

    return read


def add_optimisation(parser: argparse.ArgumentParser, *, scheduler: str, warmup: float, steps: int, batch_size: int):
    """What every training has; the keywords are defaults."""
    add = parser.add_argument
    add("--optim", choices=OPTIMIZERS, default="adamw")
    add("--scheduler", choices=SCHEDULERS, default=scheduler, help="(default %(default)s)")
    add("--warmup", type=real(0, 1, and_low=True), default=warmup, help="share of the steps")
    add("--weight-decay", type=real(0, and_low=True), default=0.0)
    add("--steps", type=whole(1), default=steps, help="of the optimizer (default %(default)s)")
    add("--epochs", type=real(0), help="takes the place of --steps")
    add("--batch-size", type=whole(1), default=batch_size, help="(default %(default)s)")
    add("--accumulation", type=whole(1), default=1, help="batches per step")
    add("--seed", type=whole(0, 2**32 - 1), default=0, help="(default %(default)s)")
    add("--result", type=Path, metavar="FILE", help="write what was measured as JSON")
    add("--preset", help=f"settings of a table of the papers; any other argument overrides ({presets.FOLDER})")


def parse(parser: argparse.ArgumentParser, script: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, those of a preset being the defaults of all that is not given."""
    args = parser.parse_args(argv)
    name = args.preset
    if name is None:
        return args
    try:
        preset = presets.find(name, script)
    except ValueError as error:
        parser.error(f"argument --preset: {error}")
    parser.set_defaults(**preset.options)
    args = parser.parse_args(argv)
    config = Path(args.model or ".", "config.json")
    if args.model and args.target_modules == preset.options["target_modules"] != ["all-linear"] and config.is_file():
        kind = read_object(config).get("model_type")
        if kind != preset.model_type:
            parser.error(
                f"argument --preset: {name} is for a model of type {preset.model_type}, got {kind} in {args.model}; "
                "--target-modules names the layers of another"
            )
    stated = ", ".join(preset.unstated)
    print(f"preset {name}: {preset.source}; not stated there, and ours unless given: {stated}")
    return args


def read_object(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise SystemExit(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content
