"""Training steps, as tests of engines and of checkpoints make them."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from nlora_kernels.lora2 import RankAllocator, orthogonal_penalty

# Of LoRA²'s penalty, so large that its gradients count.
PENALTY = 0.1


def losses(
    model: nn.Module,
    ids: Tensor,
    steps: int,
    optimizer: torch.optim.Optimizer,
    allocator: RankAllocator | None = None,
    after_backward: Callable[[], object] = lambda: None,
) -> Tensor:
    """Trains a model on one batch and returns the loss of every step; with an allocator the penalty is in it."""
    found = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        if allocator:
            loss = loss + PENALTY * orthogonal_penalty(model)
        loss.backward()
        after_backward()
        optimizer.step()
        if allocator:
            allocator.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found)


def adamw(parameters: Iterable[nn.Parameter], **options) -> torch.optim.AdamW:
    """Of those that train, with steps so large that a few of them tell."""
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-2, **options)
