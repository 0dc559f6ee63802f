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


def _plot_ranks_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="folder of a saved LoRA² adapter or of a Trainer's checkpoint")
    parser.add_argument("--out", metavar="DIR", help="folder for the PNG files, default: the checkpoint's")


def _plot_ranks(args: argparse.Namespace) -> None:
    from . import plotting

    plotting.plot_ranks(args.checkpoint, args.out)


PLOTS = {
    "ranks": Command(
        "the singular values that each LoRA² layer keeps, and the curves of loss and budget",
        _plot_ranks_arguments,
        _plot_ranks,
    )
}


def _plot_arguments(parser: argparse.ArgumentParser) -> None:
    _add_commands(parser, PLOTS, "what")


def _plot(args: argparse.Namespace) -> None:
    PLOTS[args.what].run(args)


COMMANDS = {
    "convert": Command("convert a saved adapter", _convert_arguments, _convert),
    "plot": Command("draw what was trained", _plot_arguments, _plot),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, or 1 with the reason on stderr where the input is at fault."""
    parser = argparse.ArgumentParser(prog="python -m nlora_kernels")
    _add_commands(parser, COMMANDS, "command")
    args = parser.parse_args(argv)
    try:
        COMMANDS[args.command].run(args)
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"{parser.prog} {args.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _add_commands(parser: argparse.ArgumentParser, table: dict[str, Command], dest: str) -> None:
    commands = parser.add_subparsers(dest=dest, required=True, metavar=dest.upper())
    for name, command in table.items():
        command.add_arguments(commands.add_parser(name, help=command.help, description=command.help))
