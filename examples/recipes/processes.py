"""Several processes, as torchrun and accelerate launch start them: how a model lies on them, and which of them writes.

Without a flag each has the whole model and batches of its own: DDP, which is the Trainer's. `--fsdp` keeps a part of
every weight on each and gathers it block by block, `--tp N` splits every layer over N of them, and the two go together.
"""

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .arguments import whole

# Of transformers' plans, those of a linear layer that an adapter can follow.
COLUMN_WISE, ROW_WISE = "colwise", "rowwise"


def add_processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tp", type=whole(1), default=1, metavar="N", help="split every layer over N of torchrun's processes"
    )
    help = "keep a part of every weight on each of torchrun's processes, or of every N with --tp N"
    parser.add_argument("--fsdp", action="store_true", help=help)


def check_processes(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count % args.tp:
        parser.error(f"argument --tp: must divide the number of processes, {count}, got {args.tp}")
    if args.fsdp and count == args.tp:
        parser.error(
            f"argument --fsdp: needs more processes than --tp {args.tp} has, got {count}; torchrun starts them"
        )
    if args.tp not in (1, count) and not args.fsdp:
        parser.error(f"argument --tp: {args.tp} of {count} processes leave some that only --fsdp takes")
    if args.tp == 1 and not args.fsdp:
        return
    refused = {"--save-steps": args.save_steps, "--resume": args.resume, "--load": args.load}
    for option, value in refused.items():
        if value:
            parser.error(f"argument {option}: needs a model that is whole on every process, got --tp or --fsdp")


class Processes(NamedTuple):
    """Those of a run, as a mesh: along "dp_shard" they have batches of their own, along "tp" they share every layer."""

    # None for one process.
    mesh: Any
    tp: int
    fsdp: bool
    # Whether this one writes and prints.
    first: bool

    @property
    def apart(self) -> bool:
        """Whether none of them has the whole model."""
        return self.tp > 1 or self.fsdp

    @property
    def batches(self) -> int:
        """How many have batches of their own."""
        return 1 if self.mesh is None else self.mesh["dp_shard"].size()

    def split(self, model):
        """A base model with its layers split as transformers' plan for it says, where --tp does."""
        if self.tp == 1:
            return model
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        styles = {COLUMN_WISE: ColwiseParallel, ROW_WISE: RowwiseParallel}
        plan = {name: styles[style]() for name, style in (model.tp_plan or {}).items() if style in styles}
        if not plan:
            raise SystemExit(f"--tp: transformers has no tensor-parallel plan for {type(model).__name__}")
        config = model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        if heads % self.tp:
            raise SystemExit(
                f"--tp: must divide the {heads} key and value heads of {type(model).__name__}, got {self.tp}"
            )
        return parallelize_module(model, self.mesh["tp"], plan)

    def shard(self, adapted) -> None:
        """Makes blocks, and then the whole, of a model with its adapter units of FSDP2, where --fsdp does, and tells
        the Trainer that nothing has to be done to it."""
        from transformers.distributed import DistributedConfig

        if not self.apart:
            return
        if self.fsdp:
            from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

            kinds = set(adapted.get_base_model()._no_split_modules or ())
            blocks = [module for module in adapted.modules() if type(module).__name__ in kinds]
            for unit in (*blocks, adapted):
                fully_shard(unit, mesh=self.mesh["dp_shard"])
            register_fsdp_forward_method(adapted, "generate")
        # As of a model that from_pretrained has spread: it owns its placement and the reduction of its gradients.
        adapted.is_distributed_loading_by_transformers = True
        adapted._tp_size = self.tp
        adapted.config.distributed_config = DistributedConfig(tp_size=self.tp, fsdp_size=self.batches)

    def save(self, adapted, folder: Path) -> None:
        """Has the first process write the adapter; all of them must ask."""
        from nlora_kernels import checkpoint

        options = {"save_embedding_layers": False}
        if self.apart:
            held = {name: t for name, t in adapted.state_dict().items() if "lora_" in name}
            parts = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in held.items()}
            options["state_dict"] = parts
        if self.first:
            checkpoint.save(adapted, folder, **options)

    def wait(self) -> None:
        """Until all are here."""
        if self.mesh is not None:
            import torch

            torch.distributed.barrier()


ALONE = Processes(None, 1, False, True)


@contextlib.contextmanager
def joined(args) -> Iterator[Processes]:
    """The processes that were started with this one, of which the first alone prints meanwhile."""
    import accelerate
    import torch

    state = accelerate.PartialState(cpu=on_cpu())
    if state.num_processes == 1:
        yield ALONE
        return
    shape, names = (state.num_processes // args.tp, args.tp), ("dp_shard", "tp")
    mesh = torch.distributed.init_device_mesh(state.device.type, shape, mesh_dim_names=names)
    with open(os.devnull, "w") as nowhere:
        with contextlib.nullcontext() if state.is_main_process else contextlib.redirect_stdout(nowhere):
            yield Processes(mesh, args.tp, args.fsdp, state.is_main_process)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def on_cpu() -> bool:
    """Whether there is nothing else, which accelerate wants to be told."""
    import torch

    return not torch.accelerator.is_available()
