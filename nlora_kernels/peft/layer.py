"""PEFT's LoRA linear layer with base layer and adapter computed as one operation."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from .. import fusion
from ..commit import commit
from ..ops import lora_linear
from ..ops.checks import PLAIN
from . import base as base_weights


class Term(NamedTuple):
    """One adapter's part in a forward."""

    name: str
    # Which samples of the batch take part; None for all.
    rows: list[int] | None = None
    # The factor of the adapter's initial product, if the term is that product; None if it is the adapter.
    initial: float | None = None


class FusedLinear(Linear):
    """y = x·Wᵀ + bias + Σ s·((x·Aᵀ)·Nᵀ)·Bᵀ over the active adapters

    One active adapter is fused into its base layer, dropout included where the backend takes it in; everything else is
    the base layer's own call and a branch per adapter, as in PEFT.
    """

    # The type of a module among the factors beside nn.Linear.
    other_factor: type[nn.Module] | None = None

    def matrices(self, name: str) -> tuple[Tensor, Tensor | None, Tensor]:
        """(A (r, in), N (r, r) or None, B (out, r)) of an adapter."""
        return self.lora_A[name].weight, None, self.lora_B[name].weight

    def factors(self, name: str) -> tuple[nn.Module, ...]:
        """The modules that hold the matrices of an adapter: hooks on them must run."""
        return self.lora_A[name], self.lora_B[name]

    def branch(self, name: str, x: Tensor) -> Tensor:
        """s·((x·Aᵀ)·Nᵀ)·Bᵀ in the adapter's dtype, with dropout, by calling the modules."""
        x = self.lora_dropout[name](self._cast_input_dtype(x, self.dtype_of(name)))
        return self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]

    def fused(self, name: str, x: Tensor) -> Tensor:
        """The base layer and an adapter as one operation."""
        A, N, B = self.matrices(name)
        return self._fused(x, A, N, B, self.scaling[name], self.dropped(name))

    def _fused(self, x: Tensor, A: Tensor, N: Tensor | None, B: Tensor, scaling: float, dropout: float = 0.0) -> Tensor:
        base = self.base_layer
        return lora_linear(x, fusion.weight_of(base), A, B, N, base.bias, scaling=scaling, dropout=dropout)

    def dtype_of(self, name: str) -> torch.dtype:
        return self.lora_A[name].weight.dtype

    def obstacle(self, name: str | None = None) -> str | None:
        """None if the base layer, and the adapter if named, can be computed as one operation, else why not."""
        reason = fusion.obstacle(self.base_layer)
        if reason or name is None:
            return reason
        for factor in self.factors(name):
            reason = fusion.obstacle(factor, self.other_factor)
            if reason:
                return f"a matrix of adapter {name!r} cannot be fused: {reason}"
        dropout = self._modules["lora_dropout"]._modules[name]
        if dropout.training and type(dropout) is not nn.Identity:
            foreign = None if type(dropout) is nn.Dropout else f"its type is {type(dropout).__qualname__}"
            reason = foreign or fusion.dropout_obstacle(self.base_layer)
            if reason:
                return f"adapter {name!r} has dropout: {reason}"
        if self.lora_bias.get(name):
            return f"adapter {name!r} has a bias"
        if isinstance(self.scaling[name], Tensor):
            return f"the scaling of adapter {name!r} is a tensor"
        return None

    def dropped(self, name: str) -> float:
        """The probability of dropout that is in effect, where it is PyTorch's own."""
        # As in `fusion.obstacle`: in every forward, so by the dictionaries.
        dropout = self._modules["lora_dropout"]._modules[name]
        return dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if self.lora_variant:
            return super().forward(x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        for key in VARIANT_KWARG_KEYS:
            kwargs.pop(key, None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        terms = self._terms(adapter_names)
        if len(terms) == 1 and terms[0].rows is None and not args and not kwargs and self._fuses(terms[0], x):
            return self._whole(terms[0], x)
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for term in terms:
            if term.rows is None:
                result = result + self._part(term, x)
            else:
                result[term.rows] += self._part(term, x[term.rows]).to(dtype)
        return result.to(dtype)

    def _fuses(self, term: Term, x: Tensor) -> bool:
        if type(x) not in PLAIN or x.is_nested or self.obstacle(term.name):
            return False
        # The base layer's own bits, as from PEFT, where the adapter weighs nothing.
        if not self.scaling[term.name]:
            return False
        # Where casting is switched off, the branch takes x as it is.
        return self.cast_input_dtype_enabled or x.dtype == self.dtype_of(term.name)

    def _whole(self, term: Term, x: Tensor) -> Tensor:
        return self.fused(term.name, x)

    def _part(self, term: Term, x: Tensor) -> Tensor:
        return self.branch(term.name, x)

    def _terms(self, adapter_names: list[str] | None) -> list[Term]:
        if self.disable_adapters or (self.merged and adapter_names is None):
            return []
        if adapter_names is None:
            return [Term(name) for name in self.active_adapters if name in self.lora_A]
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(adapter_names):
            if name in self.lora_A:
                rows.setdefault(name, []).append(row)
        return [Term(name, indices) for name, indices in rows.items()]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the base layer's weight, in that weight's layout and the adapter's dtype."""
        return self._product(self.scaling[adapter], *self.matrices(adapter))

    def _product(self, scaling: float, A: Tensor, N: Tensor | None, B: Tensor) -> Tensor:
        """s·B·N·A in the layout of the base layer's weight and the dtype of B."""
        dtype = B.dtype
        # Half precision is multiplied in fp32 and rounded once.
        A, N, B = (None if t is None else t.float() if t.itemsize < 4 else t for t in (A, N, B))
        delta = ((B if N is None else B @ N) @ A * scaling).to(dtype)
        return delta.T if self.fan_in_fan_out else delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """W ← W + s·B·N·A for each of the adapters, by default the active ones; a quantised W is quantised again.

        What is added is made first. Then weight and `merged_adapters` change in one step that nothing can interrupt.

        Raises:
            ValueError: W is of a kind that cannot be added to, or with safe_merge the sum is not finite.
        """
        if self.lora_variant:
            super().merge(safe_merge, adapter_names)
            return
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.lora_A:
                self._merge(name, safe_merge)

    def _merge(self, name: str, safe: bool) -> None:
        commit(*self._adding(name, 1, safe), partial(self.merged_adapters.append, name))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes every merged adapter out of the base weight, the last first: undoes `merge` up to one rounding of W."""
        if self.lora_variant or not self.merged:
            super().unmerge()
            return
        while self.merged_adapters:
            self._unmerge(self.merged_adapters[-1])

    def _unmerge(self, name: str) -> None:
        # An adapter that was deleted since stays in the weight, as in PEFT.
        steps = self._adding(name, -1) if name in self.lora_A else ()
        commit(*steps, self.merged_adapters.pop)

    def _adding(self, name: str, sign: int, safe: bool = False) -> tuple[Callable[[], object], ...]:
        """Steps for `commit` that add what the adapter adds to the base layer, or take it away."""
        base = self.get_base_layer()
        check = partial(_check_finite, name) if safe else None
        torchao = self.kwargs.get("get_apply_tensor_subclass")
        steps = base_weights.adding(base, self._shift(name), sign, check=check, torchao=torchao)
        if self.lora_bias[name]:
            if base.bias is None:
                raise RuntimeError("Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias.")
            bias = self.lora_B[name].bias * self.scaling[name]
            if check is not None:
                check(base.bias + bias)
            steps = (*steps, partial(Tensor.add_, base.bias.data, bias, alpha=sign))
        return steps

    def _shift(self, name: str) -> Tensor:
        """What merging the adapter adds to the base weight as it is."""
        return self.get_delta_weight(name)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, holding what PEFT's unload and merge_and_unload promise."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.get_base_layer()

    def _get_name(self) -> str:
        # Printed, plain LoRA is PEFT's own layer, as it is to whoever asks for its type.
        return Linear.__name__ if type(self) is FusedLinear else super()._get_name()

    def extra_repr(self) -> str:
        return "fused by nlora_kernels"


def check_whole(base: nn.Module, method: str) -> None:
    """ValueError if tensor parallelism splits the base layer: a core would have to be kept equal on its ranks."""
    plan = getattr(base, "_hf_tp_plan", None)
    if plan is not None:
        raise ValueError(f"{method} is not supported on a tensor-parallel layer, got the plan {plan!r}")


def _check_finite(adapter: str, merged: Tensor) -> None:
    if not torch.isfinite(merged).all():
        # In the words of PEFT, which its users look for.
        raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
