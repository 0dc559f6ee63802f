"""Layers whose weight tensor parallelism splits: the engine communicates, and every rank computes its part of the layer
as one operation.

Of y = x·Wᵀ + s·((x·Aᵀ)·Nᵀ)·Bᵀ with W (out, in) on p ranks

    column-wise   out is split: A and N are whole on every rank, B is split as W is. A rank has its part of y, and a
                  summand of dA and dN, for it sees its part of dy alone.
    row-wise      in is split: A is split as W is, N and B are whole. A rank has a summand of y, base and adapter in
                  one, which the engine sums as it does without an adapter, and a summand of dN and dB, for its x·Aᵀ is
                  one.

So forward needs no word more than the base layer alone, and backward one sum over the ranks: of the gradients of the
matrices that are whole, or, where the tokens are so few that this is less, of r values a token.

Nothing is known here of an engine: the base layer is called as it is, with the hooks or the forward that transformers'
plans and `parallelize_module` have put around it, and only the product in their middle is computed otherwise. The
matrices of an adapter are DTensors on the mesh of the weight, so that optimizers, clipping, FSDP2 on another dimension
of the mesh and checkpoints see what lies where.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from .. import init
from ..backends import REFERENCE, Call, Needs
from ..backends.base import PLAIN
from ..internals import no_autocast
from ..layers import branch as branches
from ..layers import engines
from ..layers.branch import Branch, Lora2Branch, local, tensor_of
from ..ops.autograd import as_rows

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# What transformers and torch leave on a layer that they split.
_MARKS = ("_is_hooked", "_distribute_module_applied", "_hf_tp_plan")
# Of the matrices of adapters those that are (·, in) and those that are (out, ·); the others are whole on every rank.
_INNER = ("lora_A", "lora_A0", "lora_v")
_OUTER = ("lora_B", "lora_B0", "lora_V")


class Split(NamedTuple):
    """How a weight W (out, in) lies on the ranks of a mesh."""

    mesh: "DeviceMesh"
    # The dimension of W that is split: 0 column-wise, 1 row-wise.
    dim: int
    # (out, in)
    shape: torch.Size

    def placement(self, kind: str):
        """Where the matrices of a kind, such as "lora_A", lie."""
        from torch.distributed.tensor import Replicate, Shard

        return Shard(self.dim) if kind in (_OUTER, _INNER)[self.dim] else Replicate()


def split_of(base: nn.Module) -> Split | None:
    """How tensor parallelism splits a layer's weight; None if it does not, or in a way that `check` refuses."""
    if type(base) is not nn.Linear:
        return None
    weight = tensor_of(base, "weight")
    if not engines.is_dtensor(weight):
        return None
    mesh, names = weight.device_mesh, weight.device_mesh.mesh_dim_names
    # FSDP2 too has weights as DTensors; those around a product are its shards only while nobody calls the layer.
    if not (any(name in vars(base) for name in _MARKS) or (names and "tp" in names)):
        return None
    placement = weight.placements[-1]
    if not placement.is_shard():
        return None
    if mesh.ndim > 1:
        # FSDP2 puts its own dimensions before that of tensor parallelism.
        mesh = mesh[names[-1]]
    return Split(mesh, placement.dim % 2, weight.shape)


def resident(base: nn.Module) -> Tensor:
    """The weight of a layer, or where tensor parallelism splits it the part that this rank has, to change in place."""
    weight = base.weight
    if type(weight) in PLAIN or split_of(base) is None or weight.device_mesh.ndim > 1:
        return weight
    return weight.detach().to_local()


def sides(base: nn.Module, found: tuple[int, int]) -> tuple[int, int]:
    """(in, out) of a layer; PEFT has found those of a rank's part."""
    split = split_of(base)
    return found if split is None else tuple(reversed(split.shape))


def check(base: nn.Module, method: str) -> None:
    """ValueError if tensor parallelism splits a layer in a way that an adapter of a method cannot follow."""
    weight, plan = getattr(base, "weight", None), getattr(base, "_hf_tp_plan", None)
    split = split_of(base)
    if split is None and plan is not None:
        placed = f" and a weight placed as {weight.placements}" if hasattr(weight, "placements") else ""
        raise ValueError(
            f"{method} is supported on a tensor-parallel layer where that is an nn.Linear and its weight a DTensor, "
            f"split by rows or by columns; got the plan {plan!r}{placed}"
        )
    if split is not None and weight.device_mesh.ndim > 1:
        raise ValueError(
            f"{method} must be added to a tensor-parallel layer before fully_shard shards it too, got a weight on the "
            f"mesh {weight.device_mesh}"
        )


def own(branch: Branch | Lora2Branch) -> Branch | Lora2Branch:
    """A branch with what this rank has of its matrices, which outside of split layers is all."""
    held = {name: getattr(branch, name) for name in branch.matrices}
    return branch._replace(**{name: local(t) for name, t in held.items() if t is not None})


# Forward


def fused(base: nn.Module, x: Tensor, branch: Branch | Lora2Branch) -> Tensor:
    """The output of a split layer and a branch, as one operation."""
    split = split_of(base)
    return _called(base, split, x, partial(_one_operation, split, own(branch)))


def apart(base: nn.Module, x: Tensor, terms: Sequence[tuple[Branch | Lora2Branch, list[int] | None]]) -> Tensor:
    """The output of a split layer and of several branches, each for some rows of the batch or for all."""
    split = split_of(base)

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.linear(x, weight, bias)
        dtype = y.dtype
        for branch, rows in terms:
            branch = _with_sums(split, own(branch).collapsed)
            if rows is None:
                y = y + branch(x)
            else:
                y = y.index_add(0, torch.tensor(rows, device=y.device), branch(x[rows]).to(y.dtype))
        return y.to(dtype)

    return _called(base, split, x, product)


def _called(base: nn.Module, split: Split, x: Tensor, product: Callable) -> Tensor:
    with _Product(partial(_linear, split, product)):
        return base(x)


class _Product(TorchFunctionMode):
    """Within it F.linear is what it is given."""

    def __init__(self, linear: Callable):
        super().__init__()
        self.linear = linear

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (self.linear if func is F.linear else func)(*args, **(kwargs or {}))


def _linear(split: Split, product: Callable, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear of DTensors by a product of what this rank has of them.

    Without gradients transformers has a layer's own forward see this rank's part of everything.
    """
    if type(weight) in PLAIN:
        return product(input, weight, bias)
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    row_wise = split.dim == 1
    mesh = weight.device_mesh
    x = input if isinstance(input, DTensor) else DTensor.from_local(input, mesh, [Replicate()], run_check=False)
    x = x.redistribute(mesh, [Shard(x.dim() - 1) if row_wise else Replicate()])
    # Of a whole x a rank has a summand of the gradient.
    x = x.to_local(grad_placements=None if row_wise else [Partial()])
    if hasattr(x, "trigger_wait"):
        x = _Waited.apply(x)
    y = product(x, weight.to_local(), None if bias is None else _bias(bias, mesh, row_wise))
    shape = torch.Size((*y.shape[:-1], split.shape[0]))
    stride = torch.empty(shape, device="meta").stride()
    placement = Partial() if row_wise else Shard(y.dim() - 1)
    return DTensor.from_local(y, mesh, [placement], run_check=False, shape=shape, stride=stride)


def _bias(bias: Tensor, mesh: "DeviceMesh", row_wise: bool) -> Tensor | None:
    """What a rank adds of the bias: in a sum over the ranks it is there once, and each knows its whole gradient."""
    b = bias.to_local()
    if not row_wise or mesh.get_local_rank() == 0:
        return b
    return b - b.detach() if bias.requires_grad else None


class _Waited(torch.autograd.Function):
    """The values of a tensor that may be on the way still."""

    @staticmethod
    def forward(ctx, x):
        return x.wait()

    @staticmethod
    def backward(ctx, dx):
        return dx


def _one_operation(
    split: Split, branch: Branch | Lora2Branch, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    partial_sums = _partial(split, branch) if torch.is_grad_enabled() else {}
    rank = branch[0].shape[0]
    if branch.dropout or x.shape[:-1].numel() * rank >= sum(t.numel() for t in partial_sums.values()):
        return _with_sums(split, branch).multiplied(x, weight, bias)
    branch = branch.collapsed
    still = branch._replace(**{name: t.detach() for name, t in _partial(split, branch).items()})
    y = still.multiplied(x, weight, bias)
    return _FewTokens.apply(y, x, branch.A, branch.N, branch.B, branch.scaling, split.mesh.get_group(), split.dim)


# Gradients


def _partial(split: Split, branch: Branch | Lora2Branch) -> dict[str, Tensor]:
    """The matrices of which a rank has a summand of the gradient, by name: all but the one that is split."""
    names = branch.matrices[1:] if split.dim else branch.matrices[:-1]
    found = {name: getattr(branch, name) for name in names}
    return {name: t for name, t in found.items() if t is not None and t.requires_grad}


def _with_sums(split: Split, branch: Branch | Lora2Branch) -> Branch | Lora2Branch:
    """The same with gradients that are summed over the ranks."""
    found = _partial(split, branch) if torch.is_grad_enabled() else {}
    if not found:
        return branch
    return branch._replace(**dict(zip(found, _Summed.apply(split.mesh.get_group(), *found.values()), strict=True)))


class _Summed(torch.autograd.Function):
    """Tensors as they are; their gradients are summed over the ranks of a group, all by one all-reduce."""

    @staticmethod
    def forward(ctx, group, *tensors):
        ctx.group = group
        ctx.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        present = [grad for grad in grads if grad is not None]
        flat = torch.cat([grad.reshape(-1) for grad in present])
        dist.all_reduce(flat, group=ctx.group)
        sums = iter(flat.split([grad.numel() for grad in present]))
        return None, *[None if grad is None else next(sums).view(grad.shape).to(grad.dtype) for grad in grads]


class _FewTokens(torch.autograd.Function):
    """y as it is, the output of a layer in which of A, N and B only the one that is split has got its gradient.

    The gradients of the others from a sum over the ranks of r values a token: of T = x·Aᵀ row-wise,

        dN = s·Gᵀ·ΣT,  dB = s·dyᵀ·(ΣT)·Nᵀ  with  G = dy·B

    and column-wise of G, with dy and x, A and Bᵀ, N and Nᵀ in each other's place.
    """

    @staticmethod
    def forward(ctx, y, x, A, N, B, scaling, group, dim):
        ctx.save_for_backward(x, A, N, B)
        ctx.options = scaling, group, dim
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, A, N, B = ctx.saved_tensors
        scaling, group, dim = ctx.options
        outer, inner = as_rows(dy), as_rows(x).to(dy.dtype)
        if dim == 0:
            outer, inner, A, B, N = inner, outer, B.T, A.T, None if N is None else N.T
        T = (inner @ A.to(inner.dtype).T).contiguous()
        dist.all_reduce(T, group=group)
        _, _, dA, dN, dB = ctx.needs_input_grad[:5]
        needs = Needs(False, False, False, dA if dim == 0 else dB, dN, False)
        # Of the weight its dtype alone is asked for.
        call = Call(outer, outer, A, B, N, None, scaling, None)
        with no_autocast(outer.device.type):
            grads = REFERENCE.backward(call, outer, T, needs)
        if dim == 0:
            return dy, None, _turned(grads.lora_B), _turned(grads.lora_N), None, None, None, None
        return dy, None, None, grads.lora_N, grads.lora_B, None, None, None


def _turned(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.T.contiguous()


# Matrices


def obstacle(factors: Sequence[nn.Module]) -> str | None:
    """None if the matrices of an adapter on a split layer are no more than that, else why not."""
    for factor in factors:
        # Of PEFT's own LoRA the matrix that is split has a forward that communicates, which the layer's does.
        if "forward" in vars(factor) and type(tensor_of(factor, "weight")) not in PLAIN:
            if engines.foreign_hooks(factor):
                return "it has hooks"
        elif reason := branches.altered(factor):
            return reason
    return None


def is_distributed(layer: nn.Module) -> bool:
    """Whether an adapter layer has matrices that `distribute` has put where they are."""
    if split_of(layer.get_base_layer()) is None:
        return False
    held = (m for kind, each in layer.named_children() if kind.startswith("lora_") for m in each.modules())
    linears = (m for m in held if isinstance(m, nn.Linear) and type(m.weight) not in PLAIN)
    return any("forward" not in vars(m) for m in linears)


@torch.no_grad()
def distribute(layer: nn.Module, name: str) -> None:
    """Puts an adapter's matrices, whole on every rank, where its layer's weight lies, as the first rank has them."""
    from torch.distributed.tensor import distribute_tensor

    # What PEFT gives a second adapter on parameters for a layer is their module.
    split = split_of(layer.get_base_layer()) if isinstance(layer, BaseTunerLayer) else None
    if split is None:
        return
    for kind, held in layer.named_children():
        if not kind.startswith("lora_") or not isinstance(held, nn.ModuleDict) or name not in held:
            continue
        for of, parameter in list(held[name].named_parameters(recurse=False)):
            if type(parameter) in PLAIN:
                # On the meta device there is nothing to send yet.
                source = None if parameter.is_meta else 0
                placed = distribute_tensor(parameter.data, split.mesh, [split.placement(kind)], src_data_rank=source)
                # NOTE: not by setattr, in whose place there is something else while weights are made empty.
                held[name]._parameters[of] = nn.Parameter(placed, requires_grad=parameter.requires_grad)


@contextlib.contextmanager
def without_plan(model: nn.Module, base: nn.Module) -> Iterator[None]:
    """Hides an engine's plan for a split layer from PEFT, which would have matrices communicate each by itself."""
    if split_of(base) is None:
        yield
        return
    hidden = [(model, "_device_mesh"), (base, "_hf_tp_plan"), (base, "_hf_device_mesh")]
    found: list[tuple[nn.Module, str, Any]] = []
    for module, name in hidden:
        if name in vars(module):
            found.append((module, name, vars(module).pop(name)))
    try:
        yield
    finally:
        for module, name, value in found:
            setattr(module, name, value)


def gathered(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the matrices of a model's split layers whole, to be called on every rank alike."""
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    if not any(split_of(layer.get_base_layer()) is not None for layer in layers):
        return state
    return {key: t.full_tensor() if hasattr(t, "full_tensor") else t for key, t in state.items()}


# Initialisation


def nystrom(
    split: Split, part: Tensor, r: int, *, core: str, select: str, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`init.nystrom` of the weight of which `part` is what this rank has: A, N and B whole, the same on every rank.

    Where rows and columns are chosen without looking at the weight, they alone are gathered, r·(in + out) values;
    otherwise the weight is, for as long as this takes.
    """
    init.check_rank(r, min(split.shape), "min(out, in)")
    finite = part.isfinite().all().to(torch.int32)
    dist.all_reduce(finite, dist.ReduceOp.MIN, group=split.mesh.get_group())
    if not finite:
        raise ValueError("weight must be finite, got NaN or infinity")
    if core == "optimal" or select in ("norm", "pivoted"):
        whole = _whole(split, part, split.shape)
        return init.nystrom(whole, r, core=core, select=select, generator=generator)
    rows, cols = init.select(part.new_zeros(()).expand(split.shape), r, select, generator)
    A, B = (_selected(split, part, dim, indices) for dim, indices in ((0, rows), (1, cols)))
    return A, init.core_of(core, None, A, B, A.index_select(1, cols)), B


def _selected(split: Split, part: Tensor, dim: int, indices: Tensor) -> Tensor:
    """Rows (dim 0) or columns (dim 1) of W."""
    if dim != split.dim:
        shape = list(split.shape)
        shape[dim] = len(indices)
        return _whole(split, part.index_select(dim, indices), shape)
    first, size = _own(split)
    mine = ((indices >= first) & (indices < first + size)).nonzero().flatten()
    chosen = part.new_zeros([len(indices) if d == dim else n for d, n in enumerate(part.shape)])
    chosen.index_copy_(dim, mine, part.index_select(dim, indices[mine] - first))
    dist.all_reduce(chosen, group=split.mesh.get_group())
    return chosen


def _whole(split: Split, part: Tensor, shape: Sequence[int]) -> Tensor:
    """A matrix of which this rank has a part along the dimension that is split."""
    whole = part.new_zeros(shape)
    whole.narrow(split.dim, *_own(split)).copy_(part)
    # A sum of one value and zeros is that value.
    dist.all_reduce(whole, group=split.mesh.get_group())
    return whole


def _own(split: Split) -> tuple[int, int]:
    """Where this rank's rows or columns of W start, and how many they are."""
    from torch.distributed.tensor import Shard

    size, start = Shard.local_shard_size_and_offset(
        split.shape[split.dim], split.mesh.size(), split.mesh.get_local_rank()
    )
    return start, size
