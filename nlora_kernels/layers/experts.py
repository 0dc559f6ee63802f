"""The experts of transformers' mixtures and what adapters add to their two layers, each layer one grouped product."""

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from ..imports import when_imported
from ..internals import autocasts
from ..ops import lora_grouped_linear
from . import branch as branches
from . import engines
from .branch import Branch, tensor_of

# What transformers calls the way of this module, `model.set_experts_implementation("nlora_kernels")`.
IMPLEMENTATION = "nlora_kernels"
# The ways of transformers to compute one and the same; what else is chosen there is left alone.
_IMPLEMENTATIONS = (None, "eager", "batched_mm", "grouped_mm", IMPLEMENTATION)
# What the modules have that transformers lets compute in any of these ways.
_DESCRIBED = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_apply_gate")


def obstacle(experts: nn.Module) -> str | None:
    """None if `forward` computes what calling these experts does, else why it does not."""
    if nn_module._has_any_global_hook():
        return "hooks are registered for all modules"
    if not all(hasattr(experts, name) for name in _DESCRIBED):
        return f"its type is {type(experts).__qualname__}, which is no layer of experts of transformers"
    if reason := branches.altered(experts):
        return reason
    chosen = getattr(experts.config, "_experts_implementation", None)
    if chosen not in _IMPLEMENTATIONS:
        return f"its experts implementation is {chosen!r}"
    for name in (_first(experts), "down_proj"):
        weight = tensor_of(experts, name)
        if engines.is_at_rest(weight):
            return engines.AT_REST
        if not branches.is_dense(weight) or weight.dim() != 3:
            return f"its {name} is a {type(weight).__qualname__} of {weight.dtype}, not a dense tensor of 3 dimensions"
    return None


def layers_of(experts: nn.Module) -> tuple[str, str]:
    """The names of the weights of its two layers."""
    return _first(experts), "down_proj"


def forward(experts: nn.Module, x: Tensor, index: Tensor, weights: Tensor, adapters: dict[str, Branch]) -> Tensor:
    """y_t = Σ_j weights[t, j] · down_e(gate(up_e(x_t)))  with  e = index[t, j]

    Args:
        experts: a module of transformers for which there is no `obstacle`.
        x: (tokens, hidden), index and weights (tokens, k): the experts of a token, and how they weigh. An index past
            the last expert is none, as where experts are spread over devices.
        adapters: what is added to the layers, by the names of their weights.
    """
    k = index.shape[1]
    chosen, order = index.reshape(-1).sort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    first, second = layers_of(experts)
    count = tensor_of(experts, first).shape[0]
    offsets = torch.searchsorted(chosen, torch.arange(count, device=index.device, dtype=index.dtype), right=True)
    rows = _Spread.apply(x, order, inverse, k)
    rows = _layer(experts, first, rows, offsets, adapters.get(first))
    rows = experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows)
    rows = _layer(experts, second, rows, offsets, adapters.get(second))
    if experts.has_post_expert_norm:
        rows = experts.post_expert_norm(rows)
    rows = rows * weights.reshape(-1).index_select(0, order).unsqueeze(-1)
    return _Collect.apply(rows, order, inverse, k).to(x.dtype)


@when_imported("transformers.integrations.moe")
def _offer(moe) -> None:
    """Has transformers know it as one of its ways, for experts without adapters, which no wrapper computes."""

    def implementation(experts, hidden_states, top_k_index, top_k_weights):
        return forward(experts, hidden_states, top_k_index, top_k_weights, {})

    moe.ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, implementation)


def _first(experts: nn.Module) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


def _layer(experts: nn.Module, name: str, x: Tensor, offsets: Tensor, branch: Branch | None) -> Tensor:
    weight = tensor_of(experts, name)
    bias = tensor_of(experts, f"{name}_bias") if experts.has_bias else None
    if not autocasts(x.device.type):
        # As transformers does where its layers have another dtype than what comes to them.
        x = x.to(weight.dtype)
    if experts.is_transposed:
        weight = weight.transpose(1, 2)
    if branch is None:
        # A layer without adapter has one of zeros: of rank 1 it costs as good as nothing.
        count, out_features, in_features = weight.shape
        zeros = weight.new_zeros(1).expand
        branch = Branch(zeros(count, 1, in_features), None, zeros(count, out_features, 1), 0.0)
    return lora_grouped_linear(x, offsets, weight, branch.A, branch.B, branch.N, bias, scaling=branch.scaling)


class _Spread(torch.autograd.Function):
    """A row for each token and each of its k experts, sorted by expert: row i is that of token order[i] // k.

    Its gradient is `_Collect`, and the other way round: every token has k rows, so the sum over them needs no scatter.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, order, inverse, k):
        return x.index_select(0, order // k)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, order, inverse, ctx.k = inputs
        ctx.save_for_backward(order, inverse)

    @staticmethod
    def backward(ctx, d_rows):
        return _Collect.apply(d_rows, *ctx.saved_tensors, ctx.k), None, None, None


class _Collect(torch.autograd.Function):
    """The sum over the k rows of each token."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows, order, inverse, k):
        return rows.index_select(0, inverse).view(-1, k, rows.shape[1]).sum(1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, order, inverse, ctx.k = inputs
        ctx.save_for_backward(order, inverse)

    @staticmethod
    def backward(ctx, dy):
        return _Spread.apply(dy, *ctx.saved_tensors, ctx.k), None, None, None
