"""python -m nlora_kernels convert"""

import argparse
import sys
import warnings

HELP = "convert a saved adapter"


def add_arguments(parser: argparse.ArgumentParser) -> None:
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


def run(args: argparse.Namespace) -> None:
    # NOTE: it needs safetensors, which no other command does.
    from .. import checkpoint

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
