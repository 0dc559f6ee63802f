"""Where PEFT's own functions would do wrong with the adapters of this package and ask nobody: they ask here first."""

import functools

from peft import PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType, hotswap, save_and_load
from torch import nn

from .config import LORA2, NLORA, LoRA2Config, NLoraConfig, is_lora
from .experts import FusedExperts
from .layer import FusedLinear
from .nlora import NLoraLinear, deferred, subtract_initial
from .tuner import withdraw

# What must be equal before the weights of one adapter may be swapped for another's: of a core, ranks too, because PEFT
# fills what is larger in one dimension only.
_KEYS = [*hotswap.CONFIG_KEYS_TO_CHECK[PeftType.LORA], "init_lora_weights", "r", "rank_pattern"]
_FIXED_IN_HOT_SWAP = {NLORA: [*_KEYS, "residual", "train"], LORA2: _KEYS}


def _refuse_hot_swap(first, second) -> None:
    # With train="core" W is whole, and lora_N0 is swapped with the others.
    if any(getattr(config, "residual", False) and config.train == "all" for config in (first, second)):
        raise ValueError(
            'an adapter with residual=True and train="all" cannot be hot-swapped: its initial product is out of the '
            "base weights, which hot-swapping leaves as they are. Load it under a name of its own and delete the other"
        )


def _refuse_base_state(model) -> None:
    for name, module in model.named_modules():
        if isinstance(module, NLoraLinear) and module.subtracted is not None:
            raise ValueError(
                f"the base weight of {name} is W − s·B₀·N₀·A₀ while the residual adapter {module.subtracted!r} "
                "is there: read or load the state dict of the base model before the adapter is added, or after unload()"
            )


def _refuse_plain_tuner(self, model, config, *args, **kwargs) -> None:
    for given in config.values() if isinstance(config, dict) else (config,):
        if type(self) is LoraModel and isinstance(given, NLoraConfig | LoRA2Config) and not is_lora(given):
            raise ValueError(
                f"LoraModel makes no adapters of a {type(given).__name__}: use nlora_kernels.peft's models"
            )


def _check_hot_swap(check):
    @functools.wraps(check)
    def check_hotswap_configs_compatible(config0, config1):
        """PEFT's, which compares what its table lists; the types of this package are in it for the call alone, because
        PEFT names the types in the table to those who pass another."""
        _refuse_hot_swap(config0, config1)
        kind, known = config0.peft_type, hotswap.CONFIG_KEYS_TO_CHECK
        if kind in known or kind not in _FIXED_IN_HOT_SWAP:
            return check(config0, config1)
        known[kind] = _FIXED_IN_HOT_SWAP[kind]
        try:
            return check(config0, config1)
        finally:
            del known[kind]

    return check_hotswap_configs_compatible


def _asking(owner, name: str, refuse) -> None:
    function = getattr(owner, name)

    @functools.wraps(function)
    def asking(*args, **kwargs):
        refuse(*args, **kwargs)
        return function(*args, **kwargs)

    setattr(owner, name, asking)


def _load_adapter_whole(load):
    @functools.wraps(load)
    def load_adapter(self, model_id, adapter_name, *args, **kwargs):
        """PEFT's, but a load that fails leaves no adapter with initial weights behind."""
        known = adapter_name in self.peft_config
        try:
            with deferred():
                result = load(self, model_id, adapter_name, *args, **kwargs)
            subtract_initial(self)
            return result
        except BaseException:
            if not known and isinstance(self.peft_config.get(adapter_name), NLoraConfig | LoRA2Config):
                self.delete_adapter(adapter_name)
            raise

    return load_adapter


def _from_pretrained_whole(load):
    @functools.wraps(load)
    def from_pretrained(cls, model, model_id, adapter_name="default", *args, **kwargs):
        """PEFT's, but a load that fails leaves the base model as it was."""
        before = _layers(model)
        try:
            with deferred():
                loaded = load(cls, model, model_id, adapter_name, *args, **kwargs)
            subtract_initial(loaded)
            return loaded
        except BaseException:
            after = _layers(model)
            if not before and after and all(isinstance(layer, FusedLinear | FusedExperts) for layer in after.values()):
                withdraw(model, adapter_name, set())
                model.__dict__.pop("peft_config", None)
            raise

    return classmethod(from_pretrained)


def _layers(model) -> dict[str, nn.Module]:
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    return {name: module for name, module in modules if isinstance(module, BaseTunerLayer)}


hotswap.check_hotswap_configs_compatible = _check_hot_swap(hotswap.check_hotswap_configs_compatible)
# Both get_base_model_state_dict and set_base_model_state_dict ask it which keys are an adapter's.
_asking(save_and_load, "_get_adapter_state_dict_key_prefixes", _refuse_base_state)
_asking(LoraModel, "__init__", _refuse_plain_tuner)
PeftModel.load_adapter = _load_adapter_whole(PeftModel.load_adapter)
PeftModel.from_pretrained = _from_pretrained_whole(PeftModel.from_pretrained.__func__)
