"""The tuners, which put adapter layers into a model, and their registration with PEFT."""

import copy
import sys
import warnings

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _filter_state_dict_by_key_prefixes,
    _get_tuner_state_dict_key_prefixes,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import PeftType, _get_submodules
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK
from torch import nn

from .. import fusion
from .config import LORA2, NLORA, LoRA2Config, NLoraConfig
from .layer import FusedLinear
from .lora2 import LoRA2Linear
from .nlora import NLoraLinear


class _FusedModel(LoraModel):
    """What the two tuners share: an injection that fails leaves the model as it was, and loading checks first."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        before = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            _withdraw(model, adapter_name, before)
            raise
        for module in model.modules():
            if isinstance(module, NLoraLinear):
                module.settle()
        _advise(model, self.peft_config[adapter_name])

    def add_weighted_adapter(self, adapters, weights, adapter_name, *args, **kwargs) -> None:
        for name in adapters:
            if name in self.peft_config and getattr(self.peft_config[name], "has_core", True):
                raise ValueError(
                    f"add_weighted_adapter combines lora_A and lora_B alone, and adapter {name!r} has a core between "
                    "them: convert it with nlora_kernels.checkpoint.to_lora first"
                )
        super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)

    @classmethod
    def _convert_state_dict_for_initial_model(cls, peft_model, peft_config, path, output_state_dict, kwargs):
        raise ValueError(
            "path_initial_model_for_weight_conversion is not supported: save the adapter, then convert it with "
            "nlora_kernels.checkpoint.to_lora"
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
        expected = _filter_state_dict_by_key_prefixes(model.state_dict(), prefixes)
        missing = sorted(expected.keys() - remapped.keys())
        if missing:
            raise ValueError(f"the checkpoint of adapter {adapter_name!r} lacks {_some(missing)}")
        return remapped

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # PyTorch fills what fits and then complains of the rest: check before anything is filled.
        for name, tensor in self.named_parameters(prefix.rstrip("."), remove_duplicate=False):
            value = state_dict.get(name)
            # Parameters that FSDP1 or DeepSpeed took apart are theirs to load.
            apart = hasattr(tensor, "_fsdp_flattened") or hasattr(tensor, "ds_shape")
            if ".lora_" in name and isinstance(value, torch.Tensor) and not apart and value.shape != tensor.shape:
                raise ValueError(f"{name} must have shape {tuple(tensor.shape)}, got {tuple(value.shape)}")
        super()._load_from_state_dict(state_dict, prefix, *args)


class NLoraModel(_FusedModel):
    """The tuner of NLoraConfig."""

    def _check_new_adapter_config(self, config: NLoraConfig) -> None:
        super()._check_new_adapter_config(config)
        configs = self.peft_config.values()
        for other in configs:
            if other.variant and any(c.has_core for c in configs):
                raise ValueError(f"{other.variant} is not supported beside an adapter that has a lora_N")

    def _prepare_model(self, peft_config: NLoraConfig, model: nn.Module) -> None:
        if peft_config.residual:
            _refuse_shared_weights(model, peft_config)
        super()._prepare_model(peft_config, model)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # NOTE: that key and parameter differ in name keeps PEFT's hot swap away, which copies by name and would leave
        # the base weight as it is.
        key = super()._remove_adapter_name_from_key(key, adapter_name)
        return f"{key.removesuffix('kept')}weight" if key.endswith("0.kept") else key

    def _create_and_replace(self, lora_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        if lora_config.has_core and isinstance(target, LoraLayer) and not isinstance(target, NLoraLinear):
            raise _unsupported(lora_config, target.get_base_layer(), current_key)
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
        )

    @staticmethod
    def _create_new_module(lora_config, adapter_name, target, **kwargs):
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        linear = isinstance(base, nn.Linear) or fusion.is_conv1d(base)
        if linear and (lora_config.has_core or fusion.is_dense(base.weight)) and not kwargs.get("parameter_name"):
            return NLoraLinear(target, adapter_name, config=lora_config, **kwargs)
        if lora_config.has_core:
            raise _unsupported(lora_config, base, kwargs.get("target_name"))
        return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)


class LoRA2Model(_FusedModel):
    """The tuner of LoRA2Config."""

    @staticmethod
    def _create_new_module(lora_config, adapter_name, target, **kwargs):
        if not isinstance(target, nn.Linear) and not fusion.is_conv1d(target):
            raise _unsupported(lora_config, target, kwargs.get("target_name"))
        return LoRA2Linear(target, adapter_name, config=lora_config, **kwargs)


def _advise(model: nn.Module, config) -> None:
    """One warning for what works but is not what the user came for."""
    unfused = fusion.unfused(model)
    if unfused:
        name, reason = next(iter(unfused.items()))
        warnings.warn(
            f"{len(unfused)} adapter layers cannot be fused and run as base layer plus adapter, as in PEFT: {name}, "
            f"because {reason}",
            stacklevel=2,
        )
    patched = [name for name in fusion.READ_ONLY_A_AND_B if name in sys.modules]
    if patched and (config.peft_type == LORA2 or config.has_core):
        warnings.warn(
            f"{patched[0]} is loaded: its own LoRA kernels read lora_A and lora_B alone and would leave the core out. "
            "Switch them off",
            stacklevel=2,
        )


def _refuse_shared_weights(model: nn.Module, config: NLoraConfig) -> None:
    """A residual base weight must have no second user, as the output layer tied to the embedding has."""
    config = _maybe_include_all_linear_layers(copy.copy(config), model)
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name.rpartition(".")[0].removesuffix(".base_layer"))
    for names in users.values():
        targets = [name for name in names if check_target_module_exists(config, name)]
        if len(names) > 1 and targets:
            raise ValueError(f"residual=True needs a base weight of its own, and {' and '.join(names)} share one")


def _unsupported(config, base: nn.Module, key: str) -> ValueError:
    method = getattr(config, "init_lora_weights", None) if isinstance(config, NLoraConfig) else "LoRA²"
    return ValueError(f"target_modules must be linear layers for {method!r}, got {type(base).__qualname__} at {key!r}")


def _withdraw(model: nn.Module, adapter_name: str, before: set[str]) -> None:
    for key, module in list(model.named_modules()):
        if not isinstance(module, BaseTunerLayer):
            continue
        if key in before:
            module.delete_adapter(adapter_name)
            continue
        parent, _, name = _get_submodules(model, key)
        if isinstance(module, FusedLinear):
            module.delete_adapter(adapter_name)
        setattr(parent, name, module.get_base_layer())


def _some(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# What must be equal before the weights of one adapter may be swapped for another's.
CONFIG_KEYS_TO_CHECK[NLORA] = [
    *CONFIG_KEYS_TO_CHECK[PeftType.LORA],
    "init_lora_weights",
    "r",
    "rank_pattern",
    "residual",
    "train",
]
for _type, _config, _tuner in ((NLORA, NLoraConfig, NLoraModel), (LORA2, LoRA2Config, LoRA2Model)):
    PEFT_TYPE_TO_CONFIG_MAPPING[_type] = _config
    PEFT_TYPE_TO_TUNER_MAPPING[_type] = _tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[_type] = LoraModel.prefix
