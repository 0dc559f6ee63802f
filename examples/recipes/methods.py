"""The methods: what each puts into a model, at what learning rate, and what its training needs beside the loss."""

import argparse
import importlib
from typing import Any, NamedTuple

from .arguments import real, whole

NLORA = "nlora_kernels.peft.NLoraConfig"
LORA2 = "nlora_kernels.peft.LoRA2Config"
NYSTROM = {"init_lora_weights": "nystrom"}
# The rows of table 3 of the LoRA² paper.
TERMS = {"uv": ("uv",), "UV": ("UV",), "uv&UV": ("uv", "UV"), "PQ": ("PQ",), "all": ("uv", "UV", "PQ")}


class Method(NamedTuple):
    # None where no matrices are added.
    config: str | None
    own: dict[str, Any]  # its own arguments
    lr: float  # suits a language model of 135M parameters at rank 8 and 80 steps
    glue_lr: float  # suits a classifier of 6 layers at rank 8 and 300 steps
    scaling: int = 1  # alpha / rank, where no --alpha is given


METHODS = {
    "full": Method(None, {}, 2e-5, 1e-4),
    "bitfit": Method(None, {}, 1e-3, 1e-2),
    "peft-lora": Method("peft.LoraConfig", {}, 2e-3, 2e-3),
    "lora": Method(NLORA, {"init_lora_weights": True}, 2e-3, 2e-3),
    "pissa": Method(NLORA, {"init_lora_weights": "pissa"}, 1e-3, 1e-3),
    "adalora": Method("peft.AdaLoraConfig", {}, 2e-3, 2e-3),
    "sora": Method(None, {}, 2e-3, 2e-3),
    "slora": Method(NLORA, {"init_lora_weights": "slora"}, 3e-3, 3e-3),
    "slora_gaussian": Method(NLORA, {"init_lora_weights": "slora_gaussian"}, 3e-3, 3e-3),
    # SmolLM2-135M does better at a third of this, the smaller models of the studies at this (docs/quality.md).
    "nlora": Method(NLORA, NYSTROM, 3e-3, 3e-3),
    "inttune": Method(NLORA, {**NYSTROM, "train": "core"}, 1e-2, 3e-2),
    "lora2": Method(LORA2, {}, 3e-2, 3e-3),
    # Under Adam its scaling is how many times the rate of the vectors E learns at; by this one the update of the first
    # step is about as large as LoRA's.
    "lora2_orthogonal": Method(LORA2, {"init_lora_weights": "orthogonal"}, 2e-3, 2e-3, scaling=8),
}
# Its matrices are taken out of the base weights, which unloading and export leave so.
REWRITES_BASE = ("pissa",)
# Of language models here: those that are saved as adapters and take the model back to what it was.
ADAPTERS = ("lora", "pissa", "slora", "slora_gaussian", "nlora", "inttune", "lora2", "lora2_orthogonal")


def add_methods(parser: argparse.ArgumentParser, names, default: str, penalty: float | None = None) -> None:
    """The arguments that choose and shape methods; `default` and `penalty` are defaults."""
    add = parser.add_argument
    add("--method", nargs="+", choices=names, default=[default], help=f"one or several (default {default})")
    add("--rank", type=whole(1), default=8, help="(default %(default)s)")
    scaled = "scaled by alpha/rank (default: the rank, as where NLoRA generates text; lora2_orthogonal: 8 times that)"
    add("--alpha", type=real(0), help=scaled)
    add("--dropout", type=real(0, 1, and_low=True), default=0.0, help="before an adapter")
    add("--core", choices=["sample", "optimal", "pinv"], default="sample", help="of nlora and inttune")
    add("--select", choices=["leading", "uniform", "norm", "pivoted"], default="leading", help="of nlora and inttune")
    # Against alpha = rank/4 without it, measured on stories260K, MiniMind-26M and SmolLM2-135M, and against alpha =
    # rank, it was best or within 0.01 nats of the best for NLoRA.
    unchanged = "nlora and inttune leave the function unchanged at step 0"
    add("--residual", action=argparse.BooleanOptionalAction, default=True, help=unchanged)
    add("--k", type=whole(1), default=8, help="rank of the outer pair of lora2, whose --rank counts singular values")
    add("--target-rank", type=whole(1), help="prune lora2 to this many singular values a layer, on average")
    weight = "its form's" if penalty is None else f"{penalty:g}"
    help = f"weight of lora2's orthogonality penalty (default: {weight})"
    add("--penalty", type=real(0, and_low=True), default=penalty, help=help)
    add("--form", choices=["paper", "reference"], default="reference", help="of the penalty")
    add("--terms", choices=TERMS, help="pairs of the penalty, as in table 3 of the LoRA² paper (default: the form's)")
    add("--scores", choices=["rows", "full"], default="rows", help="importance by eq. 9 or eq. 8 of the LoRA² paper")
    add("--target-modules", nargs="+", default=["all-linear"])


def check_methods(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    args.method = list(dict.fromkeys(args.method))
    if args.target_rank and args.target_rank > args.rank:
        parser.error(f"argument --target-rank: must be at most --rank, {args.rank}, got {args.target_rank}")


def adapter_config(method: str, args, **common):
    """The configuration of an adapter for PEFT; `common` is what a task gives it."""
    module, _, name = METHODS[method].config.rpartition(".")
    config, own = getattr(importlib.import_module(module), name), dict(METHODS[method].own)
    if METHODS[method].config == LORA2:
        own["k"] = args.k
    if own.get("init_lora_weights") == "nystrom":
        own |= {"residual": args.residual, "core": args.core, "select": args.select}
    alpha = args.alpha or METHODS[method].scaling * args.rank
    if method == "adalora":
        schedule = prune_schedule(args)
        ends = {"tinit": schedule["t_init"], "tfinal": schedule["t_final"], "deltaT": schedule["delta_t"]}
        # As its paper: half as many again as are kept.
        own |= {**ends, "init_r": args.rank * 3 // 2, "target_r": args.rank, "total_step": args.steps}
    else:
        own["r"] = args.rank
    return config(lora_alpha=alpha, lora_dropout=args.dropout, **own, **common)


def prune_schedule(args) -> dict[str, int]:
    return {"t_init": args.steps // 10, "t_final": args.steps // 3, "delta_t": max(1, args.steps // 50)}


def prepare_trainer(trainer, method: str, args) -> None:
    """Adds what a method does beside the loss: pruning, the penalty, the proximal step."""
    if METHODS[method].config == LORA2:
        from nlora_kernels.trainer import RankAllocatorCallback, add_orthogonal_penalty

        if args.target_rank:
            schedule = prune_schedule(args)
            trainer.add_callback(RankAllocatorCallback(target_rank=args.target_rank, scores=args.scores, **schedule))
        if args.penalty != 0:
            add_orthogonal_penalty(trainer, args.penalty, args.form, TERMS[args.terms] if args.terms else None)
    elif method == "adalora":
        trainer.add_callback(_adalora_callback())
    elif method == "sora":
        from .sora import ProximalStep

        trainer.add_callback(ProximalStep(args.threshold))


def _adalora_callback():
    from transformers import TrainerCallback

    class AdaLoraCallback(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            model.base_model.update_and_allocate(state.global_step + 1)

    return AdaLoraCallback()
