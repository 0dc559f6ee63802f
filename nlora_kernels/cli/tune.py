"""python -m nlora_kernels tune"""

import argparse

from ..backends import TABLE
from ..backends.cpu import plans
from ..backends.triton.tuning.measure import tune

HELP = "measure what products take on this CPU, and the tiles of the Triton kernels on its GPU, and keep the findings"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", help="measure the tiles alone, and write their table to this folder")


def run(args: argparse.Namespace) -> None:
    unavailable = {name: TABLE[name].unavailable() for name in ("cpu", "triton")}
    if args.out or unavailable["cpu"] or not unavailable["triton"]:
        print(f"wrote {tune(args.out)}")
    if not args.out and not unavailable["cpu"]:
        for file in plans.tune():
            print(f"wrote {file}")
