"""PEFT's LoRA linear layer with base layer and adapter computed as one operation."""

from typing import NamedTuple

import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from .. import fusion
from ..ops import lora_linear


class Term(NamedTuple):
    """One adapter's part in a forward."""

    name: str
    # Which samples of the batch take part; None for all.
    rows: list[int] | None = None


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
        base = self.base_layer
        A, N, B = self.matrices(name)
        options = {"scaling": self.scaling_of(name), "dropout": self.dropped(name)}
        return lora_linear(x, fusion.weight_of(base), A, B, N, base.bias, **options)

    def dtype_of(self, name: str) -> torch.dtype:
        return self.lora_A[name].weight.dtype

    def scaling_of(self, name: str) -> float:
        return self.scaling[name]

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
        if len(terms) == 1 and terms[0].rows is None and not args and not kwargs and self._fuses(terms[0].name, x):
            return self.fused(terms[0].name, x)
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for name, rows in terms:
            if rows is None:
                result = result + self.branch(name, x)
            else:
                result[rows] += self.branch(name, x[rows]).to(dtype)
        return result.to(dtype)

    def _fuses(self, name: str, x: Tensor) -> bool:
        if type(x) not in (Tensor, nn.Parameter) or self.obstacle(name):
            return False
        # The base layer's own bits, as from PEFT, where the adapter weighs nothing.
        if not self.scaling_of(name):
            return False
        # Where casting is switched off, the branch takes x as it is.
        return self.cast_input_dtype_enabled or x.dtype == self.dtype_of(name)

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
        A, N, B = self.matrices(adapter)
        dtype = B.dtype
        # Half precision is multiplied in fp32 and rounded once.
        A, N, B = (None if t is None else t.float() if t.itemsize < 4 else t for t in (A, N, B))
        delta = ((B if N is None else B @ N) @ A * self.scaling_of(adapter)).to(dtype)
        return delta.T if self.fan_in_fan_out else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        weight = self.get_base_layer().weight
        if not fusion.is_dense(weight):
            raise ValueError(f"merge needs a dense base weight, got {type(weight).__qualname__} of {weight.dtype}")
        super().merge(safe_merge, adapter_names)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, holding what PEFT's unload and merge_and_unload promise."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.get_base_layer()

    def update_layer(self, adapter_name, r, lora_alpha, config, **kwargs) -> None:
        # Known from the layer: a model can hold both kinds, and the configuration has one flag.
        self.fan_in_fan_out = fusion.is_conv1d(self.get_base_layer())
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def __repr__(self) -> str:
        return f"nlora_kernels.{nn.Module.__repr__(self)}"


def check_whole(base: nn.Module, method: str) -> None:
    """ValueError if tensor parallelism splits the base layer: a core would have to be kept equal on its ranks."""
    plan = getattr(base, "_hf_tp_plan", None)
    if plan is not None:
        raise ValueError(f"{method} is not supported on a tensor-parallel layer, got the plan {plan!r}")


def base_weight(layer: Linear) -> Tensor:
    """W as (out, in) for reading, in full and dequantised: gathered from its shards if need be."""
    base = layer.get_base_layer()
    weight = dequantize_module_weight(base).detach()
    if hasattr(weight, "full_tensor"):
        weight = weight.full_tensor()
    return weight.T if fusion.is_conv1d(base) else weight
