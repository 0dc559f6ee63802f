"""Initial adapter matrices: LoRA, SLoRA, Nyström (NLoRA, IntTune) and LoRA².

Pure functions on tensors, on the device of the weight. Random numbers come from the generator, or from torch's CPU
generator where none is given, so a seed means the same on every device.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import repeat

import torch
from torch import Tensor

from . import backends, internals
from .backends.quantised import Quantised, view
from .commit import commit
from .ops.checks import check_adapter, check_dense, check_memory, check_real, check_tensors

METHODS = ("lora", "slora", "slora_gaussian", "nystrom")
CORES = ("sample", "optimal", "pinv")
SELECTIONS = ("leading", "uniform", "norm", "pivoted")
# Of LoRA².
VECTORS = ("gaussian", "orthogonal")

# Rows of a 16-bit weight that are held in fp32 at a time: 8 MB at 4096 columns.
_TILE_ROWS = 512


def nystrom(
    weight: Tensor,
    r: int,
    *,
    core: str = "sample",
    select: str = "leading",
    rows: Tensor | Sequence[int] | None = None,
    cols: Tensor | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A = W[I, :],  B = W[:, J],  N by `core`, for row indices I and column indices J of W.

    The Nyström initialisation of NLoRA (arXiv 2502.14482); its weight is the transpose of ours.

    Args:
        weight: W (out, in), any floating dtype, or those of several experts, (experts, out, in), each with rows and
            columns of its own; or quantised, of which no more than the chosen rows and columns, or a tile of rows, is
            decoded at a time. On the meta device only shapes are made.
        r: number of rows and columns, 1 <= r <= min(out, in).
        core: "sample"   N = `W[I][:, J]` as it stands. As published; B·N·A is then no approximation of W but a
                         perturbation correlated with it.
              "optimal"  N = B⁺·W·A⁺ by two QR factorisations: of all cores for this A and B it brings B·N·A nearest
                         to W.
              "pinv"     N = `W[I][:, J]`⁺, the published derivation. On real weights B·N·A is several times as large
                         as W.
        select: how I and J are chosen, see `select`. `rows` and `cols`, of length r, stand in for I and J.
        generator: for select="uniform".

    Returns:
        A (r, in), N (r, r), B (out, r), new tensors in the weight's dtype, stacked as it is; "optimal" and "pinv"
        compute in fp32 (fp64 for an fp64 weight).

    Raises:
        TypeError: weight is no floating tensor, r is no integer.
        ValueError: r, an index, core or select out of range; weight holds NaN or infinity.
    """
    weight = _check_weight(weight, stacked=True)
    check_rank(r, min(weight.shape[-2:]), "min(out, in)")
    check_choice("core", core, CORES)
    check_choice("select", select, SELECTIONS)
    _check_generator(generator)
    _check_finite(weight)
    if weight.dim() == 3:
        if rows is not None or cols is not None:
            raise ValueError("rows and cols must be None for a weight of several experts")
        return _nystrom_of_experts(weight.detach(), r, core, select, generator)
    chosen_rows, chosen_cols = None, None
    if rows is None or cols is None:
        chosen_rows, chosen_cols = _select(weight, r, select, generator)
    rows = chosen_rows if rows is None else _indices("rows", rows, r, weight.shape[0], weight.device)
    cols = chosen_cols if cols is None else _indices("cols", cols, r, weight.shape[1], weight.device)
    if gather := _kernel("gather", weight, r):
        A, N, B = gather(weight, rows, cols)
    else:
        A, B = weight.index_select(0, rows), weight.index_select(1, cols)
        N = A.index_select(1, cols)
    return A, core_of(core, weight, A, B, N), B


def core_of(core: str, weight: Tensor | None, A: Tensor, B: Tensor, sample: Tensor) -> Tensor:
    """N of a core for rows A and columns B of W, given where they cross, in their dtype; only "optimal" reads W."""
    if core == "optimal":
        return _optimal_core(weight, A, B).to(A.dtype)
    if core == "pinv":
        return torch.linalg.pinv(sample.to(_accumulator(A.dtype))).to(A.dtype)
    return sample


def _nystrom_of_experts(weight: Tensor, r: int, core: str, select: str, generator) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = _select(weight, r, select, generator)
    A = weight.take_along_dim(rows[:, :, None], 1)
    B = weight.take_along_dim(cols[:, None, :], 2)
    return A, core_of(core, weight, A, B, A.take_along_dim(cols[:, None, :], 2)), B


def select(weight: Tensor, r: int, how: str, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """(I, J): r row indices and r column indices of W, int64 on its device.

    Args:
        weight: W (out, in).
        how: "leading"  0 … r-1, as published.
             "uniform"  drawn without replacement, ascending.
             "norm"     those of the greatest Euclidean norm, greatest first.
             "pivoted"  those that QR with column pivoting takes first: each adds the most to the span of those before.

    The product of the largest rows and columns may be larger than W: take "norm" and "pivoted" with residual=True.

    Raises ValueError and TypeError as `nystrom` does.
    """
    weight = _check_weight(weight)
    check_rank(r, min(weight.shape), "min(out, in)")
    check_choice("how", how, SELECTIONS)
    _check_generator(generator)
    _check_finite(weight)
    return _select(weight, r, how, generator)


def idle(A: Tensor, N: Tensor, B: Tensor, train: str = "all") -> str | None:
    """Why no gradient reaches any matrix that trains, or None: A or B is zero and, unless N trains alone, N as well."""
    if any(t.is_meta or not t.numel() for t in (A, N, B)) or (A.any() and B.any()):
        return None
    if not N.any():
        advice = "choose others, as select='norm' does, or 'slora'"
        return f"the rows or columns of the weight that it is made of are zero: {advice}"
    if train == "core":
        return "lora_A or lora_B is zero and stays so with train='core', which is for 'nystrom' or trained matrices"
    return None


def subtract_(weight: Tensor, A: Tensor, N: Tensor | None, B: Tensor, scaling: float) -> Tensor:
    """W ← W − s·B·N·A, in place; returns W.

    The product is accumulated in fp32 and W rounded once. 16-bit weights pass through fp32 in tiles of rows, so nothing
    of W's size is allocated. An interrupt comes before or after, never between two tiles.

    Args:
        weight: W (out, in), any strides.
        A: (r, in), N: (r, r) or None for the identity, B: (out, r), each fp32, bf16, fp16 or fp64.

    Raises, before anything is changed:
        TypeError: an argument is no tensor, of another dtype, or no number. ValueError: shapes or devices do not fit.
    """
    check_real("scaling", scaling)
    add_product(weight, A, N, B, -scaling)
    return weight


@torch.no_grad()
def add_product(
    weight: Tensor, A: Tensor, N: Tensor | None, B: Tensor, scaling: float, *steps: Callable[[], object]
) -> None:
    """W ← W + s·B·N·A in place, as `subtract_` has it, and the steps in one `commit`."""
    if isinstance(_check_weight(weight), Quantised):
        raise TypeError(f"weight must be a dense tensor to be added to, got a quantised {type(weight).__qualname__}")
    check_tensors({"A": A, "N": N, "B": B}, optional=("N",), device=weight.device)
    check_adapter(weight.shape, {"A": A, "B": B, "N": N})
    check_memory(weight=weight, A=A, N=N, B=B)
    A, N, B = (None if t is None else t.clone() if internals.shares_memory(t, weight) else t for t in (A, N, B))
    if subtract := _kernel("subtract_products", weight, A.shape[0]):
        # Between a launch and what follows it an interrupt could come: then the launch is made on a copy.
        target = weight.detach().clone() if steps else weight
        subtract([target], [A], [N], [B], -scaling)
        if steps:
            commit(partial(Tensor.copy_, weight, target), *steps)
        else:
            torch.autograd.graph.increment_version(weight)
        return
    dtype = _accumulator(weight.dtype)
    left, right = B.to(dtype), A.to(dtype)
    left = left * scaling if N is None else left @ (N.to(dtype) * scaling)
    if weight.dtype == dtype:
        add = backends.select(None, weight, operation="initialisation").add_product(weight, left, right)
        if add and commit(*steps, given=add):
            torch.autograd.graph.increment_version(weight)
        else:
            commit(partial(Tensor.addmm_, weight, left, right), *steps)
        return
    tiles = weight.split(_TILE_ROWS)
    # Lazily: one tile is in fp32 at a time.
    sums = map(Tensor.addmm_, map(Tensor.to, tiles, repeat(dtype)), left.split(_TILE_ROWS), repeat(right))
    commit(partial(deque, map(Tensor.copy_, tiles, sums), 0), *steps)


def adapter(
    weight: Tensor,
    r: int,
    method: str = "nystrom",
    *,
    core: str = "sample",
    select: str = "leading",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(A, N, B) of one method for a weight W (out, in), in its dtype and on its device.

    Of the weights of several experts, W (experts, out, in), they are stacked alike.

    method  "lora"            A ~ U(±1/√in), no N, B = 0                    (Kaiming uniform with a = √5)
            "slora"           A ~ U(±1/√in), N ~ U(±1/√r), B = 0           (arXiv 2502.14482)
            "slora_gaussian"  A ~ U(±1/√in), N ~ N(0, 1/r²), B = 0
            "nystrom"         `nystrom(weight, r, core=core, select=select)`

    Raises TypeError and ValueError as `nystrom` does; only "nystrom" limits r to min(out, in) and reads the weight.
    """
    check_choice("method", method, METHODS)
    if method == "nystrom":
        return nystrom(weight, r, core=core, select=select, generator=generator)
    weight = _check_weight(weight, stacked=True)
    check_rank(r)
    _check_generator(generator)
    *experts, out_features, in_features = weight.shape
    A = _uniform((*experts, r, in_features), 1 / math.sqrt(in_features), weight, generator)
    B = _zeros((*experts, out_features, r), weight)
    if method == "lora":
        return A, None, B
    if method == "slora":
        return A, _uniform((*experts, r, r), 1 / math.sqrt(r), weight, generator), B
    return A, _normal((*experts, r, r), 1 / r, weight, generator), B


def lora2(
    weight: Tensor, r: int, k: int, vectors: str = "gaussian", *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """v (k, in), u (r, k), E (r), U (k, r), V (out, k): N(0, 0.02²) but for E = 0   (LoRA², arXiv 2408.06854)

    With vectors="orthogonal" v, u, U and V are Q of such matrices, of orthonormal rows or columns, whichever are fewer:
    the penalty of every pair then begins at 0 where it can be 0, and E alone has to grow for the update to.

    In the weight's dtype and on its device. Raises ValueError and TypeError as `nystrom` does; r and k have no upper
    limit, and the weight is not read.
    """
    check_choice("vectors", vectors, VECTORS)
    weight = _check_weight(weight)
    check_rank(r)
    check_rank(k, name="k")
    _check_generator(generator)
    out_features, in_features = weight.shape
    shapes = ((k, in_features), (r, k), (k, r), (out_features, k))
    if vectors == "orthogonal":
        v, u, U, V = (_orthonormal(shape, weight, generator) for shape in shapes)
    else:
        v, u, U, V = (_normal(shape, 0.02, weight, generator) for shape in shapes)
    return v, u, _zeros((r,), weight), U, V


def _kernel(name: str, weight: Tensor, r: int):
    """A kernel for this weight of a backend named by NLORA_BACKEND or verified on its device; None if there is none."""
    if isinstance(weight, Quantised):
        return None
    return getattr(backends.select(None, weight, operation="initialisation").initialisation(weight, r), name)


def _optimal_core(weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    # With B = Q_B·R_B and Aᵀ = Q_A·R_A:  B⁺·W·A⁺ = R_B⁺·(Q_Bᵀ·W·Q_A)·R_A⁺ᵀ. Only r×r matrices are inverted, and the
    # pseudo-inverse stands in for the triangular solve because rows of a real weight can be dependent.
    dtype = _accumulator(weight.dtype)
    Q_A, R_A = torch.linalg.qr(A.mT.to(dtype))
    Q_B, R_B = torch.linalg.qr(B.to(dtype))
    tiles = zip(Q_B.split(_tile_rows(weight), dim=-2), _tiles(weight, dtype), strict=True)
    projected = sum(q.mT @ (tile @ Q_A) for q, tile in tiles)
    if weight.dim() == 2 and (solve := _kernel("solve_triangular", weight, A.shape[0])):
        return solve(R_B, solve(R_A, projected.T).T)
    return torch.linalg.pinv(R_B) @ projected @ torch.linalg.pinv(R_A).mT


def _select(weight: Tensor | Quantised, r: int, how: str, generator) -> tuple[Tensor, Tensor]:
    """(I, J), each (r,), or (experts, r) for the weights of several experts."""
    experts = weight.shape[:-2]
    if how == "leading" or weight.device.type == "meta":
        rows = torch.arange(r, device=weight.device).expand(*experts, r)
        return rows.clone(), rows.clone()
    if how == "uniform":
        # Of one expert after the other, as they would be drawn for each alone.
        drawn = [[_permutation(n, generator)[:r] for n in weight.shape[-2:]] for _ in range(math.prod(experts))]
        rows, cols = (torch.stack(each).sort().values for each in zip(*drawn, strict=True))
        return tuple(each.view(*experts, r).to(weight.device) for each in (rows, cols))
    if how == "norm":
        if len(weight.shape) == 2 and (squared_norms := _kernel("squared_norms", weight, r)):
            norms = squared_norms(weight)
        else:
            norms = (_norms(weight, dim) for dim in (-2, -1))
        return tuple(n.argsort(dim=-1, descending=True, stable=True)[..., :r] for n in norms)
    return _pivots(weight, r, -2), _pivots(weight, r, -1)


def _norms(weight: Tensor | Quantised, dim: int) -> Tensor:
    """The Euclidean norms of the rows (dim -2) or columns (dim -1)."""
    norm = partial(torch.linalg.vector_norm, dim=-3 - dim, dtype=_accumulator(weight.dtype))
    # NOTE: on a CPU a norm in another dtype makes a copy in it.
    return torch.cat([norm(t) for t in weight.split(_tile_rows(weight), dim)], -1)


def _pivots(weight: Tensor | Quantised, r: int, dim: int) -> Tensor:
    """The first r pivots of a QR factorisation with column pivoting of Wᵀ (dim -2), whose columns are the rows of W, or
    of W (dim -1), of every expert by itself; no host synchronisation but for a weight in few bits."""
    dtype = _accumulator(weight.dtype)
    squares = _norms(weight, dim).square()
    experts = squares.shape[:-1]
    negligible = squares.amax(-1, keepdim=True) * torch.finfo(dtype).eps
    basis = torch.zeros(*experts, r, weight.shape[-3 - dim], dtype=dtype, device=weight.device)
    pivots = torch.empty(*experts, r, dtype=torch.int64, device=weight.device)
    for step in range(r):
        pivot = squares.argmax(-1, keepdim=True)
        pivots[..., step : step + 1] = pivot
        q = _line(weight, pivot, dim).to(dtype)
        known = basis[..., :step, :]
        # Twice is enough for orthogonality to rounding.
        for _ in range(2):
            q = q - _times(known.mT, _times(known, q))
        square = q.square().sum(-1, keepdim=True)
        q = torch.where(square > negligible, q * square.rsqrt(), torch.zeros_like(q))
        basis[..., step, :] = q
        explained = [_times(tile if dim == -2 else tile.mT, q) for tile in _tiles(weight, dtype, dim)]
        squares = (squares - torch.cat(explained, -1).square()).clamp_(min=0)
        # A chosen row never returns, though all others be explained as well.
        squares.scatter_(-1, pivots[..., : step + 1], -1)
    return pivots


def _line(weight: Tensor | Quantised, index: Tensor, dim: int) -> Tensor:
    """A row (dim -2) or column (dim -1), by its index (1,), of each expert by one of its own."""
    if isinstance(weight, Quantised):
        return weight.index_select(dim + 2, index).flatten()
    return weight.take_along_dim(index[..., None], dim).squeeze(dim)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None]).squeeze(-1)


def _tiles(weight: Tensor | Quantised, dtype: torch.dtype, dim: int = -2) -> Iterator[Tensor]:
    for part in weight.split(_tile_rows(weight), dim):
        yield part.to(dtype)


def _tile_rows(weight: Tensor | Quantised) -> int:
    """How many rows, or columns, of every expert are taken at a time: all, where none has to be converted."""
    if isinstance(weight, Tensor) and weight.dtype == _accumulator(weight.dtype):
        return max(weight.shape[-2:])
    return max(1, _TILE_ROWS // math.prod(weight.shape[:-2]))


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _uniform(shape, bound, like: Tensor, generator) -> Tensor:
    return _sample(shape, like, generator, lambda t: t.uniform_(-bound, bound, generator=generator))


def _normal(shape, std, like: Tensor, generator) -> Tensor:
    return _sample(shape, like, generator, lambda t: t.normal_(0, std, generator=generator))


def _orthonormal(shape, like: Tensor, generator) -> Tensor:
    return _sample(shape, like, generator, lambda t: torch.nn.init.orthogonal_(t, generator=generator))


def _zeros(shape, like: Tensor | Quantised) -> Tensor:
    return torch.zeros(shape, dtype=like.dtype, device=like.device)


def _sample(shape, like: Tensor | Quantised, generator, fill) -> Tensor:
    if like.device.type == "meta":
        return torch.empty(shape, dtype=like.dtype, device="meta")
    device = "cpu" if generator is None else generator.device
    return fill(torch.empty(shape, device=device)).to(like.device, like.dtype)


def _permutation(n: int, generator) -> Tensor:
    return torch.randperm(n, generator=generator, device="cpu" if generator is None else generator.device)


def _indices(name: str, indices, r: int, limit: int, device) -> Tensor:
    if isinstance(indices, Tensor):
        check_memory(**{name: indices})
    indices = torch.as_tensor(indices, device=device)
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must hold integers, got {indices.dtype}")
    if indices.shape != (r,):
        raise ValueError(f"{name} must have shape ({r},), got {tuple(indices.shape)}")
    if not indices.is_meta and not (0 <= int(indices.min()) and int(indices.max()) < limit):
        raise ValueError(f"{name} must lie in 0 … {limit - 1}, got {int(indices.min())} … {int(indices.max())}")
    return indices.long()


def _check_weight(weight, stacked: bool = False) -> Tensor | Quantised:
    """The weight as it is read here."""
    if isinstance(weight, Quantised):
        return weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a Tensor, got {type(weight).__name__}")
    if (quantised := view(weight)) is not None:
        return quantised
    check_dense(weight=weight)
    if not weight.is_floating_point():
        raise TypeError(f"weight must be a floating tensor, got {weight.dtype}")
    if weight.dim() != 2 and not (stacked and weight.dim() == 3):
        shapes = "(out, in) or (experts, out, in)" if stacked else "(out, in)"
        raise ValueError(f"weight must have shape {shapes}, got {tuple(weight.shape)}")
    return weight.detach()


def check_rank(r, limit: float = math.inf, limit_name: str = "", name: str = "r") -> None:
    if not isinstance(r, int) or isinstance(r, bool):
        raise TypeError(f"{name} must be an integer, got {type(r).__name__}")
    if not 1 <= r <= limit:
        bound = f" and at most {limit_name} = {limit}" if limit_name else ""
        raise ValueError(f"{name} must be at least 1{bound}, got {r}")


def check_choice(name: str, value, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_generator(generator) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")


def _check_finite(weight: Tensor | Quantised) -> None:
    if weight.device.type == "meta" or weight.shape.numel() == 0:
        return
    check_memory(weight=weight)
    for part in weight.split(_TILE_ROWS) if isinstance(weight, Quantised) else (weight,):
        # Passes without a temporary of the weight's size. A sum is finite only if every element is; where it overflows,
        # the extremes decide, which are NaN where any element is.
        if not math.isfinite(part.sum()) and not all(map(math.isfinite, torch.aminmax(part))):
            raise ValueError("weight must be finite, got NaN or infinity")
