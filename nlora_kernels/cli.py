"""python -m nlora_kernels COMMAND"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Command(NamedTuple):
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    # The exit status, None for 0.
    run: Callable[[argparse.Namespace], int | None]


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src_dir", help="folder of the saved adapter")
    parser.add_argument("dst_dir", help="folder to write")
    parser.add_argument(
        "--from-published",
        action="store_true",
        help="read an adapter saved by the published NLoRA code and write it for NLoraConfig; "
        "without it, an adapter of NLoraConfig or LoRA2Config becomes plain LoRA",
    )
    parser.add_argument(
        "--keep-patterns",
        action="store_true",
        help="plain LoRA with rank_pattern, alpha_pattern and use_rslora as they are, smaller and for PEFT alone; "
        "without it, one rank and lora_alpha hold for all layers, as servers need",
    )


def _convert(args: argparse.Namespace) -> None:
    from . import checkpoint

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not args.from_published:
            checkpoint.to_lora(args.src_dir, args.dst_dir, keep_patterns=args.keep_patterns)
        elif args.keep_patterns:
            raise ValueError("--keep-patterns is for plain LoRA, which --from-published does not write")
        else:
            checkpoint.from_published(args.src_dir, args.dst_dir)
    for warning in caught:
        print(f"note: {warning.message}", file=sys.stderr)
    print(f"wrote {args.dst_dir}")


def _plot_ranks_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="folder of a saved LoRA² adapter or of a Trainer's checkpoint")
    parser.add_argument("--out", metavar="DIR", help="folder for the PNG files, default: the checkpoint's")


def _plot_ranks(args: argparse.Namespace) -> None:
    from . import plotting

    plotting.plot_ranks(args.checkpoint, args.out)


def _plot_bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="what pytest bench --benchmark-json=FILE wrote, or a file of bench/results")
    parser.add_argument("--out", metavar="DIR", help="folder for the Markdown and PNG files, default: the file's")


def _plot_bench(args: argparse.Namespace) -> None:
    from . import benchmarks

    benchmarks.plot(args.file, args.out)


PLOTS = {
    "bench": Command("times over the frozen layer's, the roofline, and tables", _plot_bench_arguments, _plot_bench),
    "ranks": Command(
        "the singular values that each LoRA² layer keeps, and the curves of loss and budget",
        _plot_ranks_arguments,
        _plot_ranks,
    ),
}


def _plot_arguments(parser: argparse.ArgumentParser) -> None:
    _add_commands(parser, PLOTS, "what")


def _plot(args: argparse.Namespace) -> int | None:
    return PLOTS[args.what].run(args)


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape",
        nargs=4,
        type=int,
        metavar=("M", "K", "N", "R"),
        help="say which way a layer takes: tokens, in, out, rank",
    )
    parser.add_argument("--dtype", default="float32", help="of that layer, default %(default)s")
    parser.add_argument("--model", metavar="DIR", help="folder of a saved model whose configuration is checked too")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _doctor(args: argparse.Namespace) -> int:
    from . import doctor

    found = doctor.report(args.shape, args.dtype, args.model)
    print(json.dumps(found, indent=2) if args.json else doctor.text(found))
    return 1 if found["problems"] else 0


def _tune_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", help="folder of the table, default: the user's cache folder")


def _tune(args: argparse.Namespace) -> None:
    from .tune import tune

    print(f"wrote {tune(args.out)}")


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", type=int, default=0, metavar="INDEX", help="as torch counts, default %(default)s")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="end after so long, default 115")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="go through all of it without a GPU, with processes that hang, crash and lie; no record is kept",
    )


def _verify(args: argparse.Namespace) -> int:
    from . import verify

    file, results = verify.verify(args.gpu, rehearse=args.rehearse, limit=args.limit)
    print("nothing was written" if args.rehearse else f"wrote {file}")
    return 0 if all(result.well for result in results) else 1


COMMANDS = {
    "doctor": Command(
        "say what this machine can run and what is wrong, with exit status 1 if anything is", _doctor_arguments, _doctor
    ),
    "convert": Command("convert a saved adapter", _convert_arguments, _convert),
    "plot": Command("draw what was trained", _plot_arguments, _plot),
    "verify": Command(
        "prove the fused kernels on this GPU and have them chosen where they are faster; exit status 1 if one fails",
        _verify_arguments,
        _verify,
    ),
    "tune": Command("measure the tiles of the Triton kernels on this GPU and keep the best", _tune_arguments, _tune),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status, 1 with the reason on stderr where the input is at fault."""
    parser = argparse.ArgumentParser(prog="python -m nlora_kernels")
    _add_commands(parser, COMMANDS, "command")
    args = parser.parse_args(argv)
    try:
        return COMMANDS[args.command].run(args) or 0
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"{parser.prog} {args.command}: {error}", file=sys.stderr)
        return 1


def _add_commands(parser: argparse.ArgumentParser, table: dict[str, Command], dest: str) -> None:
    commands = parser.add_subparsers(dest=dest, required=True, metavar=dest.upper())
    for name, command in table.items():
        command.add_arguments(commands.add_parser(name, help=command.help, description=command.help))
