"""python -m nlora_kernels plot"""

import argparse
import importlib
import sys
from pathlib import Path

from .. import plotting, study

HELP = "draw what was trained or measured"
CHECKOUT = Path(plotting.__file__).resolve().parents[1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    about = "times over the frozen layer's, the roofline, and tables"
    bench = commands.add_parser("bench", help=about, description=about)
    bench.add_argument("file", help="what pytest bench --benchmark-json=FILE wrote, or a file of bench/results")
    bench.add_argument("--out", metavar="DIR", help="folder for the Markdown and PNG files, default: the file's")
    bench.set_defaults(plot=_bench)
    about = "the singular values that each LoRA² layer keeps, and the curves of loss and budget"
    ranks = commands.add_parser("ranks", help=about, description=about)
    ranks.add_argument(
        "file", metavar="checkpoint", help="folder of a saved LoRA² adapter or of a Trainer's checkpoint"
    )
    ranks.add_argument("--out", metavar="DIR", help="folder for the PNG files, default: the checkpoint's")
    ranks.set_defaults(plot=plotting.plot_ranks)
    about = "methods compared: a table, curves of the loss and a forest plot"
    compared = commands.add_parser("study", help=about, description=about)
    compared.add_argument("file", help="what examples/compare.py wrote")
    compared.add_argument("--out", metavar="DIR", help="folder for the Markdown and PNG files, default: the file's")
    compared.set_defaults(plot=study.plot)


def run(args: argparse.Namespace) -> None:
    args.plot(args.file, args.out)


def _bench(file: str, out: str | None) -> None:
    """The reports stand beside the benchmarks, in the repository and not in the wheel."""
    if not (CHECKOUT / "bench" / "report.py").is_file():
        raise ValueError(f"plot bench needs a checkout of the repository, got nlora_kernels alone in {CHECKOUT}")
    sys.path.insert(0, str(CHECKOUT))
    importlib.import_module("bench.report").plot(file, out)
