"""python -m nlora_kernels COMMAND"""

import argparse
import sys
from collections.abc import Sequence

from ..versions import __version__
from . import convert, doctor, plot, tune, verify

# A command is a module with HELP, add_arguments(parser), and run(args), which returns the exit status or None for 0.
COMMANDS = {"doctor": doctor, "convert": convert, "plot": plot, "verify": verify, "tune": tune}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status, 1 with the reason on stderr where the input is at fault."""
    parser = argparse.ArgumentParser(prog="python -m nlora_kernels")
    parser.add_argument("--version", action="version", version=f"nlora_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.HELP, description=command.HELP))
    args = parser.parse_args(argv)
    try:
        return COMMANDS[args.command].run(args) or 0
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"{parser.prog} {args.command}: {error}", file=sys.stderr)
        return 1
