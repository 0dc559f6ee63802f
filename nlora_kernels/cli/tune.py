"""python -m nlora_kernels tune"""

import argparse

from ..backends.triton.tuning.measure import tune

HELP = "measure the tiles of the Triton kernels on this GPU and keep the best"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", help="folder of the table, default: the user's cache folder")


def run(args: argparse.Namespace) -> None:
    print(f"wrote {tune(args.out)}")
