"""The adapter layer of LoRA²."""

import math

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from .. import fusion, init
from ..modules import check_alpha
from ..ops import lora2_core, lora2_linear
from .config import LoRA2Config
from .layer import FusedLinear, check_whole


class LoRA2Linear(FusedLinear):
    """y = x·Wᵀ + bias + s·((x·vᵀ)·Cᵀ)·Vᵀ  with  C = U·diag(E ⊙ mask)·u,  s = alpha / r, per adapter

    lora_v (k, in), lora_u (r, k), lora_E (r), lora_U (k, r), lora_V (out, k) hold parameters and lora_mask (r) a
    persistent buffer, by adapter name. To PEFT, which asks for lora_A and lora_B, these are v and V.
    """

    adapter_layer_names = ("lora_v", "lora_u", "lora_E", "lora_U", "lora_V")
    other_param_names = ("r", "k", "lora_alpha", "scaling", "lora_dropout", "use_dora", "use_rslora", "lora_bias")

    @property
    def lora_A(self) -> nn.ParameterDict:
        return self.lora_v

    @property
    def lora_B(self) -> nn.ParameterDict:
        return self.lora_V

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoRA2Config, **kwargs) -> None:
        init.check_rank(r)
        check_alpha(lora_alpha, "lora_alpha")
        check_whole(self.get_base_layer(), "LoRA²")
        # NOTE: not in __init__, because PEFT's __init__ adds the first adapter.
        if "lora_v" not in self._modules:
            for name in self.adapter_layer_names:
                setattr(self, name, nn.ParameterDict())
            self.lora_mask = BufferDict(persistent=True)
            self.k: dict[str, int] = {}
            # PEFT's empty containers, which the properties stand in for.
            del self._modules["lora_A"], self._modules["lora_B"]
        self.fan_in_fan_out = fusion.is_conv1d(self.get_base_layer())
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
            getattr(self, name)[adapter_name] = nn.Parameter(
                tensor if config.init_lora_weights else torch.randn(tensor.shape)
            )
        self.lora_mask[adapter_name] = torch.ones(r)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def matrices(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        core = lora2_core(self.lora_u[name], self.lora_E[name], self.lora_U[name], self.lora_mask[name])
        return self.lora_v[name], core, self.lora_V[name]

    def fused(self, name: str, x: Tensor) -> Tensor:
        base = self.base_layer
        v, u, E, U, V = (self._tensor(kind, name) for kind in self.adapter_layer_names)
        options = {"scaling": self.scaling[name], "dropout": self.dropped(name)}
        return lora2_linear(x, fusion.weight_of(base), v, u, E, U, V, self.lora_mask[name], base.bias, **options)

    def _tensor(self, kind: str, name: str) -> Tensor:
        """One of the adapter's matrices, for every forward: ParameterDict takes three times as long to give it."""
        found = self._modules[kind]._parameters.get(name)
        return getattr(self, kind)[name] if found is None else found

    def dtype_of(self, name: str) -> torch.dtype:
        return self._tensor("lora_v", name).dtype

    def branch(self, name: str, x: Tensor) -> Tensor:
        x = self.lora_dropout[name](self._cast_input_dtype(x, self.dtype_of(name)))
        v, core, V = self.matrices(name)
        return fusion.branch(x, v, V, core, self.scaling[name])

    def obstacle(self, name: str | None = None) -> str | None:
        reason = super().obstacle(name)
        if reason or name is None:
            return reason
        for kind in self.adapter_layer_names:
            tensor = self._tensor(kind, name)
            if type(tensor) not in (nn.Parameter, Tensor):
                return f"{kind} of adapter {name!r} is a {type(tensor).__qualname__}"
        return None

    def factors(self, name: str) -> tuple[nn.Module, ...]:
        return ()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        # Parameters on the meta device are loaded later, and the mask, which is not there, must not follow them.
        if adapter_name in self.lora_E and not self.lora_E[adapter_name].is_meta:
            self.lora_mask[adapter_name] = self.lora_mask[adapter_name].to(self.lora_E[adapter_name])

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.lora_mask:
            del self.lora_mask[adapter_name]
        super().delete_adapter(adapter_name)
