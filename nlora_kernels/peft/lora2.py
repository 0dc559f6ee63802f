"""The adapter layers of LoRA²."""

import math
import re

import torch
from torch import Tensor, nn

from .. import init
from ..internals import no_autocast
from ..layers import branch as branches
from ..layers.branch import Lora2Branch
from ..layers.modules import check_alpha
from . import tensor_parallel
from .config import LoRA2Config
from .experts import FusedExperts
from .layer import FusedLinear


class Diagonal(nn.Module):
    """y = x ⊙ weight"""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Mask(nn.Module):
    """y = x ⊙ weight, of ones and zeros that are saved and not trained. It is read and set as the tensor is."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight

    def __getitem__(self, index) -> Tensor:
        return self.weight[index]

    def __setitem__(self, index, value) -> None:
        self.weight[index] = value


class HasFactors:
    """What an adapter of LoRA² has in place of PEFT's two matrices, of a layer and of experts alike.

    lora_v, lora_u, lora_E, lora_U, lora_V hold modules with a `weight` by adapter name, and so does lora_mask, whose
    weight is a persistent buffer. To PEFT, which asks for lora_A and lora_B, these are v and V.
    """

    adapter_layer_names = factor_names = ("lora_v", "lora_u", "lora_E", "lora_U", "lora_V")
    factor_types = (nn.Linear, Diagonal)
    other_param_names = ("r", "k", "lora_alpha", "scaling", "lora_dropout", "use_dora", "use_rslora", "lora_bias")

    @property
    def lora_A(self) -> nn.ModuleDict:
        return self.lora_v

    @property
    def lora_B(self) -> nn.ModuleDict:
        return self.lora_V

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoRA2Config, **kwargs) -> None:
        init.check_rank(r)
        check_alpha(lora_alpha, "lora_alpha")
        tensor_parallel.check(self.get_base_layer(), "LoRA²")
        # NOTE: not in __init__, because PEFT's __init__ adds the first adapter.
        if "lora_v" not in self._modules:
            for name in (*self.adapter_layer_names, "lora_mask"):
                setattr(self, name, nn.ModuleDict())
            self.k: dict[str, int] = {}
            # PEFT's empty containers, which the properties stand in for.
            del self._modules["lora_A"], self._modules["lora_B"]
        self._orient()
        self.r[adapter_name] = r
        self.k[adapter_name] = config.k
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.use_rslora[adapter_name] = config.use_rslora
        self.use_dora[adapter_name] = self.lora_bias[adapter_name] = False
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        # Only shape, dtype and device of the weight count.
        like = torch.empty(()).expand(self.out_features, self.in_features)
        vectors = "orthogonal" if config.init_lora_weights == "orthogonal" else "gaussian"
        tensors = self._packed([init.lora2(like, r, config.k, vectors) for _ in range(self._count)])
        for name, tensor in zip(self.adapter_layer_names, tensors, strict=True):
            tensor = tensor if config.init_lora_weights else torch.randn(tensor.shape)
            getattr(self, name)[adapter_name] = Diagonal(tensor) if name == "lora_E" else _linear(tensor)
        self.lora_mask[adapter_name] = Mask(torch.ones(self._count * r))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    # How many layers it is.
    _count = 1

    def _orient(self) -> None:
        """Learns how the base layer keeps its weight."""

    def _packed(self, factors: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The factors of every layer as they are kept."""
        return factors[0]

    def copy_mask(self, source: str, target: str) -> None:
        """Lets the mask of one adapter be that of another."""
        if source in self.lora_mask and target in self.lora_mask:
            self.lora_mask[target].weight.copy_(self.lora_mask[source].weight)

    def factors(self, name: str) -> tuple[nn.Module, ...]:
        modules = self._modules
        return tuple([modules[kind]._modules[name] for kind in self.adapter_layer_names])

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        self.place_mask(adapter_name)

    def place_mask(self, adapter_name: str) -> None:
        """Moves the mask of an adapter to where its parameters are, in their dtype."""
        # Parameters on the meta device are loaded later, and the mask, which is not there, must not follow them.
        if adapter_name in self.lora_E and not self.lora_E[adapter_name].weight.is_meta:
            E = self.lora_E[adapter_name].weight
            self.lora_mask[adapter_name].to(E.device, E.dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.lora_mask:
            del self.lora_mask[adapter_name]
        super().delete_adapter(adapter_name)


class LoRA2Linear(HasFactors, FusedLinear):
    """y = x·Wᵀ + bias + s·((x·vᵀ)·Cᵀ)·Vᵀ  with  C = U·diag(E ⊙ mask)·u,  s = alpha / r, per adapter

    with v (k, in), u (r, k), E (r), U (k, r), V (out, k) and the mask (r).
    """

    def _orient(self) -> None:
        self.fan_in_fan_out = branches.is_conv1d(self.get_base_layer())

    # Forward

    def _branch_of(self, name: str, weights: list[Tensor]) -> Lora2Branch:
        v, u, E, U, V = weights
        k = u.shape[1]
        if v.shape[0] != k:
            # Padded for compiled hot swaps, v and V alone have grown.
            v, V = v[:k], V[:, :k]
        mask = self._modules["lora_mask"]._modules[name]._buffers["weight"]
        return Lora2Branch(v, u, E, U, V, mask, self.scaling[name], self.dropped(name))

    def matrices(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        return self.branch(name).collapsed[:3]

    def _apart(self, name: str, x: Tensor) -> Tensor:
        if x.is_nested:
            # A nested tensor is multiplied by matrices, not by vectors.
            return self.branch(name).collapsed._replace(scaling=1.0, dropout=0.0)(x)
        v, u, E, U, V = self.factors(name)
        P = U(self.lora_mask[name](E(u(branches.resized(v(x), u)))))
        return V(branches.resized(P, V))

    def _held(self, name: str) -> tuple[Tensor, ...]:
        return *super()._held(name), self.lora_mask[name].weight

    # Loading

    @staticmethod
    def renamed(key: str) -> str:
        """The key of a checkpoint as it is called now: the tensors were once not held by modules."""
        return re.sub(r"\.(lora_[vuEUV]|lora_mask)$", r".\1.weight", key)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        for kind in (*self.adapter_layer_names, "lora_mask"):
            for name in self._modules[kind]:
                if (key := f"{prefix}{kind}.{name}") in state_dict:
                    state_dict[f"{key}.weight"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


class LoRA2Experts(HasFactors, FusedExperts):
    """The same for the experts e of one parameter, with a core C_e of each.

    v (E·k, in), u (E·r, k), E and the mask (E·r) hold those of one expert below those of another, U (k, E·r) one beside
    another, and V (out, k·E) as lora_B does, with the experts of one k side by side.
    """

    def _orient(self) -> None:
        # PEFT's own update_layer does so for lora_A and lora_B.
        swapped = self._param_ndim == 3 and not getattr(self.get_base_layer(), "is_transposed", False)
        if swapped and not self._did_swap_in_out_features:
            self.in_features, self.out_features = self.out_features, self.in_features
            self._did_swap_in_out_features = True

    @property
    def _count(self) -> int:
        return self.num_experts

    def _packed(self, factors: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        v, u, E, U, V = zip(*factors, strict=True)
        return torch.cat(v), torch.cat(u), torch.cat(E), torch.cat(U, 1), torch.stack(V, 2).flatten(1)

    def matrices(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        v, u, E, U, V = [factor.weight for factor in self.factors(name)]
        u, values = self._A(u), self._A(E * self.lora_mask[name].weight)
        U = U.unflatten(1, (self.num_experts, -1)).transpose(0, 1)
        with no_autocast(u.device.type):
            dtype = torch.promote_types(u.dtype, torch.float32)
            core = (U.to(dtype) * values.to(dtype)[:, None, :]) @ u.to(dtype)
        return self._A(v), core.to(u.dtype), self._B(V)


# NOTE: as for the other wrappers, by this name PEFT asks whether a parameter has one already.
LoRA2Experts.__name__ = FusedExperts.__name__


def _linear(weight: Tensor) -> nn.Linear:
    """The layer with this weight, without drawing another one first."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear
