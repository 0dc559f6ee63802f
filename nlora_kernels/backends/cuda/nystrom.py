"""Nyström initialisation on the device, for one weight or for several of one shape.

gather             A = W[I, :],  N = W[I][:, J],  B = W[:, J]
subtract_products  W ← W − s·B·N·A
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..native import _C
from . import launch


def gather(weight: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(W[I, :], W[I][:, J], W[:, J]) of W (out, in) for int64 indices I and J of length r, in one launch."""
    (out_features, in_features), r = weight.shape, rows.numel()
    parts = [weight.new_empty(s) for s in ((r, in_features), (r, r), (out_features, r))]
    rows, cols = rows.contiguous(), cols.contiguous()
    results = ([t] for t in parts)
    _C.cuda_gather(launch.queue(weight), [weight], [rows.data_ptr()], [cols.data_ptr()], *results)
    return tuple(parts)


def subtract_products(
    weights: Sequence[Tensor],
    As: Sequence[Tensor],
    Ns: Sequence[Tensor | None],
    Bs: Sequence[Tensor],
    scaling: float,
) -> None:
    """W ← W − s·B·N·A in place for weights of one shape, strides and dtype, by one pass over them.

    For fp32 weights the product has fp32 accuracy, for 16-bit ones that of 2⁻¹⁶, and W is rounded once. r ≤ 256; N is
    None for all or for none. The workspace has the size of A and B in fp32.
    """
    groups = ([t.contiguous() for t in group] for group in (As, [] if Ns[0] is None else Ns, Bs))
    size = _C.cuda_residual_bytes(weights[0], As[0], len(weights))
    terms = weights[0].new_empty(1, -(-size // 4), dtype=torch.float32)
    _C.cuda_residual(launch.queue(weights[0]), list(weights), *groups, terms, scaling)
