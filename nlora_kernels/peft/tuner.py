"""The tuners, which put adapter layers into a model, and their registration with PEFT."""

import warnings

from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND, PeftType, _get_submodules
from torch import nn

from .. import saved
from ..backends.quantised import Unreadable
from ..layers import branch as branches
from . import base as base_weights
from . import residual, targets, tensor_parallel
from . import state_dict as state_dicts
from .advice import advise
from .config import LORA2, NLORA, LoRA2Config, NLoraConfig, as_lora, is_lora, method, variant
from .experts import NLoraExperts
from .fuse import fuse_layers, unfuse_layers
from .layer import FusedLinear
from .lora2 import HasFactors, LoRA2Experts, LoRA2Linear
from .nlora import NLoraLinear, subtract_initial


class _FusedModel(LoraModel):
    """What the two tuners share: an injection that fails leaves the model as it was, and loading checks first."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        before = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
        # Meanwhile layers of plain LoRA are PEFT's own, made and named in its messages as with LoraConfig.
        unfuse_layers(model)
        try:
            config = self.peft_config[adapter_name]
            targets.find_experts(model, config)
            self._make_room(model, config)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            withdraw(model, adapter_name, before)
            raise
        finally:
            fuse_layers(model)
        advise(model, adapter_name, self.peft_config[adapter_name])

    def _make_room(self, model: nn.Module, config: LoraConfig) -> None:
        """What has to be done before PEFT walks through the modules, which must not get others meanwhile."""

    def _check_target_module_compatiblity(self, peft_config, model: nn.Module, target_name: str) -> None:
        super()._check_target_module_compatiblity(as_lora(peft_config), model, target_name)

    def _create_and_replace(self, lora_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        if reader := targets.reader(parent, target_name):
            unheard = (
                f"{reader} reads the weight of {current_key!r} instead of calling it, so that an adapter there has "
                "no effect: leave it out, by exclude_modules where a pattern takes it in"
            )
            if not is_lora(lora_config):
                raise ValueError(unheard)
            warnings.warn(unheard, stacklevel=2)
        if not is_lora(lora_config) and _registered(lora_config, target):
            raise ValueError(
                f"layers registered by _register_custom_module are LoRA, and not supported with {method(lora_config)}, "
                f"got one for {current_key!r}"
            )
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not is_lora(lora_config):
            branches.check_initialised(base, f"{current_key!r} cannot be adapted: its weight")
        try:
            if tensor_parallel.split_of(base) is not None:
                if other := variant(lora_config):
                    raise ValueError(
                        f"{current_key!r} cannot be adapted: {other} is not supported on a tensor-parallel layer"
                    )
                tensor_parallel.check(base, f"{current_key!r} cannot be adapted: {method(lora_config)}")
            # NOTE: an adapter goes to where the base weight is, and offloaded that would be the meta device.
            with base_weights.brought(base), tensor_parallel.without_plan(self.model, base):
                base_weights.check_readable(base)
                super()._create_and_replace(
                    lora_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
                )
            tensor_parallel.distribute(getattr(parent, target_name), adapter_name)
        except (TypeError, ValueError) as error:
            # What a layer refuses, it refuses without knowing its name.
            known = (Unreadable,) if is_lora(lora_config) else (TypeError, ValueError, Unreadable)
            if type(error) not in known or repr(current_key) in str(error):
                raise
            raise type(error)(f"{current_key!r} cannot be adapted: {error}") from error
        layer = getattr(parent, target_name)
        layer.layer_name = current_key
        if isinstance(parent, nn.TransformerEncoderLayer) and not layer._forward_pre_hooks:
            layer.register_forward_pre_hook(_called)

    def add_weighted_adapter(self, adapters, weights, adapter_name, *args, **kwargs) -> None:
        for name in adapters:
            if name in self.peft_config and not is_lora(self.peft_config[name]):
                raise ValueError(
                    f"add_weighted_adapter combines lora_A and lora_B alone, and adapter {name!r} has a core between "
                    "them: convert it with nlora_kernels.checkpoint.to_lora first"
                )
        super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        # What PEFT takes of base weights it takes afterwards, from this same dictionary, which is its own.
        residual.give_as_they_came(model, state_dict)
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        tensors = tensor_parallel.gathered(model, tensors)
        if not is_lora(config):
            state_dicts.warn_of_shards(tensors, adapter_name)
        return tensors

    @classmethod
    def _convert_state_dict_for_initial_model(cls, peft_model, peft_config, path, output_state_dict, kwargs):
        if is_lora(peft_config):
            return super()._convert_state_dict_for_initial_model(
                peft_model, peft_config, path, output_state_dict, kwargs
            )
        raise ValueError(
            "path_initial_model_for_weight_conversion is not supported: save the adapter, then convert it with "
            "nlora_kernels.checkpoint.to_lora"
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        # Of plain LoRA, what is missing is PEFT's to say.
        if not is_lora(config):
            state_dicts.check_keys(model, config, adapter_name, remapped)
        return residual.take_as_they_came(model, remapped)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # What each layer says too, here, where all is checked before the first is loaded.
        layers = ((name, module) for name, module in self.named_modules() if isinstance(module, NLoraLinear))
        entries = {name: entry for name, layer in layers if (entry := layer.described())}
        saved.describe(destination, prefix, residual.ENTRY, entries)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args) -> None:
        state_dicts.check_tensors(self, state_dict, prefix)
        entries, of_layers = local_metadata.get(residual.ENTRY, {}), residual.by_layer(state_dict)
        for name, module in self.named_modules():
            place = f"{prefix}{name}."
            if isinstance(module, FusedLinear) and place in of_layers:
                residual.check(module, of_layers[place], place, entries.get(name))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class NLoraModel(_FusedModel):
    """The tuner of NLoraConfig, and of LoraConfig beside it.

    It stands for "LORA" in PEFT's table, because plain LoRA of NLoraConfig has this type; a model whose adapters are of
    LoraConfig alone still gets PEFT's own tuner.
    """

    def __new__(cls, model: nn.Module | None = None, config=None, *args, **kwargs):
        configs = config.values() if isinstance(config, dict) else [config]
        if config is None or any(isinstance(each, NLoraConfig) for each in configs):
            plain = cls is NLoraModel and config is not None and all(map(is_lora, configs))
            return super().__new__(_PlainModel if plain else cls)
        return LoraModel(model, config, *args, **kwargs)

    def _make_room(self, model: nn.Module, config: LoraConfig) -> None:
        if config.target_parameters and not is_lora(config):
            for module in list(model.modules()):
                NLoraExperts.adopt(module)

    def _check_new_adapter_config(self, config: LoraConfig) -> None:
        super()._check_new_adapter_config(config)
        configs = list(self.peft_config.values())
        for each in configs:
            if (other := variant(each)) and not all(map(is_lora, configs)):
                raise ValueError(f"{other} is not supported beside an adapter that has a lora_N")
        # NOTE: reduce_intruder_dimension adds an adapter with the configuration of another to write lora_A and lora_B
        # into it. It asks for the type of the first adapter alone, so a core behind plain LoRA must be kept from it.
        again = sum(each is config for each in configs) > 1
        if again and not is_lora(config) and is_lora(configs[0]):
            raise ValueError(
                f"an adapter of {method(config)} behind one of plain LoRA must have a configuration of its own, got "
                "that of another adapter: pass a copy"
            )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        # The last that PEFT does to an adapter, new or loaded.
        subtract_initial(self.model)

    def _prepare_model(self, peft_config: LoraConfig, model: nn.Module) -> None:
        if getattr(peft_config, "residual", False):
            targets.refuse_shared_weights(model, peft_config)
        super()._prepare_model(peft_config, model)
        if peft_config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND and (
            getattr(peft_config, "init_lora_weights", None) == "nystrom"
        ):
            targets.fit_ranks(model, peft_config)

    def _create_and_replace(self, lora_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        if not is_lora(lora_config) and isinstance(target, LoraLayer):
            if not (NLoraLinear.adopt(target) or NLoraExperts.adopt(target)):
                raise _unsupported(lora_config, target.get_base_layer(), current_key)
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
        )

    @staticmethod
    def _create_new_module(lora_config, adapter_name, target, **kwargs):
        if is_lora(lora_config):
            if tensor_parallel.split_of(target) is not None:
                # PEFT's own would have matrices of the size of this rank's part.
                return FusedLinear(target, adapter_name, config=lora_config, **kwargs)
            return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)
        if kwargs.get("parameter_name"):
            return NLoraExperts(target, adapter_name, config=lora_config, **kwargs)
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not (isinstance(base, nn.Linear) or branches.is_conv1d(base)):
            raise _unsupported(lora_config, base, kwargs.get("target_name"))
        return NLoraLinear(target, adapter_name, config=lora_config, **kwargs)


class _PlainModel(NLoraModel):
    """The tuner of plain LoRA, by whose name PEFT's model status and its readers tell the method."""


_PlainModel.__name__ = LoraModel.__name__


class LoRA2Model(_FusedModel):
    """The tuner of LoRA2Config."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        twin = next((name for name, each in self.peft_config.items() if each is config and name != adapter_name), None)
        if twin is None:
            return
        # Trainers make their reference so, and then copy the parameters: a mask is none.
        for module in model.modules():
            if isinstance(module, HasFactors):
                module.copy_mask(twin, adapter_name)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        # PEFT casts parameters alone.
        for module in self.modules():
            if isinstance(module, HasFactors):
                module.place_mask(adapter_name)

    @staticmethod
    def _create_new_module(lora_config, adapter_name, target, **kwargs):
        if kwargs.get("parameter_name"):
            return LoRA2Experts(target, adapter_name, config=lora_config, **kwargs)
        if not isinstance(target, nn.Linear) and not branches.is_conv1d(target):
            raise _unsupported(lora_config, target, kwargs.get("target_name"))
        return LoRA2Linear(target, adapter_name, config=lora_config, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        renamed = {LoRA2Linear.renamed(key): tensor for key, tensor in state_dict.items()}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, renamed)


def _registered(config: LoraConfig, target: nn.Module) -> bool:
    """Whether the user has registered an adapter layer of their own for the base layer."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    return isinstance(base, tuple(config._custom_modules or ()))


def _called(module: nn.Module, args: tuple) -> None:
    """Does nothing: nn.TransformerEncoderLayer calls its layers in eval mode, and does not read their weights past the
    adapter, where one of them has a hook."""


def _unsupported(config, base: nn.Module, key: str) -> ValueError:
    return ValueError(
        f"target_modules must be linear layers for {method(config)}, got {type(base).__qualname__} at {key!r}"
    )


def withdraw(model: nn.Module, adapter_name: str, before: set[str]) -> None:
    """Takes an adapter out again: layers that had none before, by name, become their base layers."""
    removed: list[str] = []
    for key, module in list(model.named_modules()):
        # Layers on parameters of one module stand within each other.
        if not isinstance(module, BaseTunerLayer) or any(key.startswith(f"{name}.") for name in removed):
            continue
        if key in before:
            module.delete_adapter(adapter_name)
            continue
        parent, _, name = _get_submodules(model, key)
        if isinstance(module, NLoraLinear):
            # What is out of the base weight goes back.
            module.delete_adapter(adapter_name)
        setattr(parent, name, module.get_base_layer())
        removed.append(key)


for _type, _config, _tuner in ((NLORA, NLoraConfig, NLoraModel), (LORA2, LoRA2Config, LoRA2Model)):
    PEFT_TYPE_TO_CONFIG_MAPPING[_type] = _config
    PEFT_TYPE_TO_TUNER_MAPPING[_type] = _tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[_type] = LoraModel.prefix
PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = NLoraModel
