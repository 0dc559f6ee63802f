"""Bytes that a step of training sends from every process, from the shapes of a model alone."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

# What a residual adapter keeps of its beginning.
KEPT = ("lora_A0.", "lora_N0.", "lora_B0.")


def ddp(model: nn.Module) -> dict[str, int]:
    """{collective: bytes of the whole tensors that it is given in a step} where every rank has the model.

    The first rank's buffers, masks among them, are sent to the others in every forward.
    """
    gradients = sum(_size(p) for p in model.parameters() if p.requires_grad)
    return {"all_reduce": gradients, "broadcast": sum(map(_size, model.buffers()))}


def fsdp1(
    model: nn.Module, blocks: Sequence[nn.Module], ranks: int, *, original: bool = True, pruning: bool = False
) -> dict[str, int]:
    """The same where FullyShardedDataParallel wraps the model with PEFT's policy, by which the blocks and every matrix
    that trains are units.

    Args:
        ranks: over which a parameter is sharded.
        original: use_orig_params.
        pruning: whether LoRA²'s penalty and allocator are part of a step.
    """
    matrices = [m for m in model.modules() if not list(m.children()) and any(p.requires_grad for p in m.parameters())]
    known: set[Tensor] = set()
    units: list[list[Tensor]] = []
    for module in (*matrices, *blocks, model):
        units.append([p for p in module.parameters() if p not in known])
        known.update(units[-1])
    *inner, outside = (_flattened(unit, ranks, original) for unit in units)
    found = {"all_gather": 2 * sum(inner) + outside, "reduce_scatter": sum(inner[: len(matrices)])}
    if pruning:
        held = _lora2(model)
        found["all_gather"] += sum(_flattened([p], ranks, original) for p in held.penalised)
        found["all_reduce"] = 2 * sum(map(_size, held.scored))
    return found


def fsdp2(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    ranks: int,
    *,
    replicas: int = 1,
    reshard: bool = True,
    pruning: bool = False,
) -> dict[str, int]:
    """The same where fully_shard was called on the blocks and then on the model; of a model that tensor parallelism
    splits, for its other dimension of the mesh.

    Args:
        ranks: over which a parameter is sharded, those of one replica.
        replicas: of the model, above 1 for HSDP.
        reshard: whether the blocks let their parameters go after forward, so that backward gathers them again. What
            is outside of them stays.
        pruning: whether LoRA²'s penalty and allocator are part of a step. What stays whole after forward the penalty
            has for nothing.
    """
    inside = [p for block in blocks for p in block.parameters()]
    known = set(inside)
    outside = [p for p in model.parameters() if p not in known]
    trained = _by_rows((p for p in (*inside, *outside) if p.requires_grad), ranks)
    found = {"all_gather": (1 + reshard) * _by_rows(inside, ranks) + _by_rows(outside, ranks)}
    found["reduce_scatter"] = trained
    # Of its shard of the gradients, once for a block that has any.
    reduced = trained // ranks if replicas > 1 else 0
    if pruning:
        held = _lora2(model)
        # Over each dimension of the mesh what is whole then.
        once = reshard * sum(map(_size, held.penalised)) + 2 * sum(map(_size, held.scored))
        reduced += (1 + (replicas > 1)) * once
    return found | ({"all_reduce": reduced} if reduced else {})


def zero(
    model: nn.Module,
    stage: int,
    ranks: int,
    *,
    persistent: int = 100_000,
    released: bool = False,
    first: Sequence[nn.Module] = (),
    pruning: bool = False,
) -> dict[str, int]:
    """The same under DeepSpeed with one group of parameters and none on another device.

    Args:
        stage: of ZeRO.
        persistent: how many values a parameter has at most that stays whole from one step to the next, of stage 3:
            stage3_param_persistence_threshold.
        released: whether the others are let go after forward, as they are where neither the distance to their use in
            backward is within stage3_max_reuse_distance nor it is fetched ahead, within stage3_prefetch_bucket_size.
        first: modules to whose output no gradient goes, for nothing before them trains.
        pruning: whether LoRA²'s penalty and allocator are part of a step.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    held = _lora2(model) if pruning else _Lora2([], [])
    # The norm of all gradients, in fp32 or in fp64; and for the allocator those that it scores once more.
    reduced = (4 if stage < 3 else 8) + sum(map(_size, held.scored))
    if stage < 3:
        values = sum(p.numel() for p in trained)
        parts = math.ceil(values / (2 * ranks)) * 2 * ranks * trained[0].element_size()
        return {"all_reduce": reduced + sum(map(_size, trained)), "all_gather": parts}

    def gathered(parameters: Iterable[Tensor], *, staying: bool = False) -> int:
        return _flattened_each((p for p in parameters if (p.numel() <= persistent) == staying), ranks)

    # Kept products no step reads.
    read = [p for name, p in model.named_parameters() if not any(kind in name for kind in KEPT)]
    size = gathered(model.parameters(), staying=True) + gathered(read) + gathered(held.scored)
    if released:
        still = {p for module in first for p in module.parameters()}
        size += gathered(p for p in read if p not in still) + gathered(held.penalised)
    return {"all_gather": size, "reduce_scatter": _flattened_each(trained, ranks), "all_reduce": reduced}


def tensor_parallel(
    columns: Sequence[nn.Module], rows: Sequence[nn.Module], tokens: int, *, first: Sequence[nn.Module] = ()
) -> dict[str, int]:
    """The same of layers that are split column-wise and row-wise, with an adapter on each, as it is before it is split.

    Args:
        tokens: of the batch.
        first: of the column-wise ones those to whose input no gradient goes, for nothing before them trains.
    """
    values, size = 0, 0
    for layer in (*columns, *rows):
        column = layer in columns
        # A row-wise layer's output is summed, and the gradient of a column-wise one's input.
        if layer not in first:
            values += tokens * (layer.in_features if column else layer.out_features)
        near = ("lora_B", "lora_V") if column else ("lora_A", "lora_v")
        trained = {name: p for name, p in layer.named_parameters() if p.requires_grad and name.startswith("lora_")}
        whole = sum(p.numel() for name, p in trained.items() if not name.startswith(near))
        rank = next(p.shape[0] for name, p in layer.named_parameters() if name.startswith(("lora_A.", "lora_v.")))
        values += min(tokens * rank, whole)
        size = layer.get_base_layer().weight.element_size()
    return {"all_reduce": values * size}


def sent(collective: str, size: int, ranks: int) -> float:
    """Bytes that one of so many ranks sends where the collective goes round a ring."""
    return (2 if collective == "all_reduce" else 1) * size * (ranks - 1) / ranks


def _size(p: Tensor) -> int:
    return p.numel() * p.element_size()


def _by_rows(parameters: Iterable[Tensor], ranks: int) -> int:
    """Bytes of parameters whose rows are dealt out evenly, the last shards filled up."""
    local = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
    return sum(math.ceil(p.shape[0] / ranks) * ranks * math.prod(p.shape[1:]) * p.element_size() for p in local)


def _flattened_each(parameters: Iterable[Tensor], ranks: int) -> int:
    """Bytes of parameters of which each is dealt out value by value, the last parts filled up."""
    return sum(_flattened([p], ranks) for p in parameters)


def _flattened(parameters: Sequence[Tensor], ranks: int, aligned: bool = False) -> int:
    """Bytes of parameters that are one, dealt out value by value; aligned, each begins at a multiple of 16 bytes."""
    values, size = 0, parameters[0].element_size()
    for p in parameters:
        values = (math.ceil(values * size / 16) * 16 // size if aligned else values) + p.numel()
    return math.ceil(values / ranks) * ranks * size


class _Lora2(NamedTuple):
    """LoRA²'s parameters that its penalty reads, and those that its allocator scores."""

    penalised: list[Tensor]
    scored: list[Tensor]


def _lora2(model: nn.Module) -> _Lora2:
    found = {kind: [p for name, p in model.named_parameters() if f"lora_{kind}." in name] for kind in "vuEUV"}
    return _Lora2(*(sum((found[kind] for kind in kinds), []) for kinds in ("vuUV", "EuU")))
