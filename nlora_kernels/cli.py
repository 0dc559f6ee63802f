"""python -m nlora_kernels COMMAND"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Command(NamedTuple):
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src_dir", help="folder of the saved adapter")
    parser.add_argument("dst_dir", help="folder to write")
    parser.add_argument(
        "--from-published",
        action="store_true",
        help="read an adapter saved by the published NLoRA code and write it for NLoraConfig; "
        "without it, an adapter of NLoraConfig or LoRA2Config becomes plain LoRA",
    )


def _convert(args: argparse.Namespace) -> None:
    from . import checkpoint

    convert = checkpoint.from_published if args.from_published else checkpoint.to_lora
    convert(args.src_dir, args.dst_dir)
    print(f"wrote {args.dst_dir}")


COMMANDS = {"convert": Command("convert a saved adapter", _convert_arguments, _convert)}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, or 1 with the reason on stderr where the input is at fault."""
    parser = argparse.ArgumentParser(prog="python -m nlora_kernels")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.help, description=command.help))
    args = parser.parse_args(argv)
    try:
        COMMANDS[args.command].run(args)
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"{parser.prog} {args.command}: {error}", file=sys.stderr)
        return 1
    return 0
