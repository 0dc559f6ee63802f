"""The adapter layer of LoRA²."""

import math
import re

import torch
from torch import Tensor, nn

from .. import init
from ..layers import branch as branches
from ..layers.branch import Lora2Branch
from ..layers.modules import check_alpha
from . import tensor_parallel
from .config import LoRA2Config
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


class LoRA2Linear(FusedLinear):
    """y = x·Wᵀ + bias + s·((x·vᵀ)·Cᵀ)·Vᵀ  with  C = U·diag(E ⊙ mask)·u,  s = alpha / r, per adapter

    lora_v (k, in), lora_u (r, k), lora_E (r), lora_U (k, r), lora_V (out, k) hold modules with a `weight` by adapter
    name, and so does lora_mask (r), whose weight is a persistent buffer. To PEFT, which asks for lora_A and lora_B,
    these are v and V.
    """

    adapter_layer_names = ("lora_v", "lora_u", "lora_E", "lora_U", "lora_V")
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
        self.fan_in_fan_out = branches.is_conv1d(self.get_base_layer())
        self.r[adapter_name] = r
        self.k[adapter_name] = config.k
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.use_rslora[adapter_name] = config.use_rslora
        self.use_dora[adapter_name] = self.lora_bias[adapter_name] = False
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        # Only shape, dtype and device of the weight count.
        like = torch.empty(()).expand(self.out_features, self.in_features)
        for name, tensor in zip(self.adapter_layer_names, init.lora2(like, r, config.k), strict=True):
            tensor = tensor if config.init_lora_weights else torch.randn(tensor.shape)
            getattr(self, name)[adapter_name] = Diagonal(tensor) if name == "lora_E" else _linear(tensor)
        self.lora_mask[adapter_name] = Mask(torch.ones(r))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def copy_mask(self, source: str, target: str) -> None:
        """Lets the mask of one adapter be that of another."""
        if source in self.lora_mask and target in self.lora_mask:
            self.lora_mask[target].weight.copy_(self.lora_mask[source].weight)

    # Forward

    def branch(self, name: str) -> Lora2Branch:
        v, u, E, U, V = self.weights(name)
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

    def factors(self, name: str) -> tuple[nn.Module, ...]:
        return tuple([self._modules[kind]._modules[name] for kind in self.adapter_layer_names])

    def _held(self, name: str) -> tuple[Tensor, ...]:
        return *super()._held(name), self.lora_mask[name].weight

    # Life cycle

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


def _linear(weight: Tensor) -> nn.Linear:
    """The layer with this weight, without drawing another one first."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear
