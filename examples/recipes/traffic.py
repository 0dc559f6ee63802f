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
    """The same where fully_shard was called on the blocks and then on the model.

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


def sent(collective: str, size: int, ranks: int) -> float:
    """Bytes that one of so many ranks sends where the collective goes round a ring."""
    return (2 if collective == "all_reduce" else 1) * size * (ranks - 1) / ranks


def _size(p: Tensor) -> int:
    return p.numel() * p.element_size()


def _padded(parameters: Iterable[Tensor], ranks: int) -> int:
    """Bytes of parameters whose rows are dealt out evenly, the last shards filled up."""
    return sum(math.ceil(p.shape[0] / ranks) * ranks * math.prod(p.shape[1:]) * p.element_size() for p in parameters)
