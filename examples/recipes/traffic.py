"""Bytes that a step of training sends from every process, from the shapes of a model alone."""

import math
from collections.abc import Iterable, Sequence

from torch import Tensor, nn


def ddp(model: nn.Module) -> dict[str, int]:
    """{collective: bytes of the whole tensors that it is given in a step} where every rank has the model.

    The first rank's buffers, masks among them, are sent to the others in every forward.
    """
    gradients = sum(_size(p) for p in model.parameters() if p.requires_grad)
    return {"all_reduce": gradients, "broadcast": sum(map(_size, model.buffers()))}


def fsdp2(
    model: nn.Module, blocks: Sequence[nn.Module], ranks: int, *, replicas: int = 1, reshard: bool = True
) -> dict[str, int]:
    """The same where fully_shard was called on the blocks and then on the model; of a model that tensor parallelism
    splits, for its other dimension of the mesh.

    Args:
        ranks: over which a parameter is sharded, those of one replica.
        replicas: of the model, above 1 for HSDP.
        reshard: whether the blocks let their parameters go after forward, so that backward gathers them again. What
            is outside of them stays.
    """
    inside = [p for block in blocks for p in block.parameters()]
    known = set(inside)
    outside = [p for p in model.parameters() if p not in known]
    trained = _padded((p for p in (*inside, *outside) if p.requires_grad), ranks)
    found = {"all_gather": (1 + reshard) * _padded(inside, ranks) + _padded(outside, ranks), "reduce_scatter": trained}
    # Of its shard of the gradients, once for a block that has any.
    return found | ({"all_reduce": trained // ranks} if replicas > 1 else {})


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


def pruning(model: nn.Module, dimensions: int = 1, *, reshard: bool = True) -> dict[str, int]:
    """The same of LoRA²'s penalty and of a step of the allocator, beside those of training, where FSDP2 has shards on a
    mesh of so many dimensions. What stays whole after forward the penalty has for nothing."""
    found = {kind: sum(_size(p) for name, p in model.named_parameters() if f"lora_{kind}." in name) for kind in "vuEUV"}
    small = found["E"] + found["u"] + found["U"]
    # The penalty's tensors; those that are scored and their gradients.
    return {"all_reduce": dimensions * (reshard * (sum(found.values()) - found["E"]) + 2 * small)}


def sent(collective: str, size: int, ranks: int) -> float:
    """Bytes that one of so many ranks sends where the collective goes round a ring."""
    return (2 if collective == "all_reduce" else 1) * size * (ranks - 1) / ranks


def _size(p: Tensor) -> int:
    return p.numel() * p.element_size()


def _padded(parameters: Iterable[Tensor], ranks: int) -> int:
    """Bytes of parameters whose rows are dealt out evenly, the last shards filled up."""
    local = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
    return sum(math.ceil(p.shape[0] / ranks) * ranks * math.prod(p.shape[1:]) * p.element_size() for p in local)
