"""The tuners, which put adapter layers into a model, and their registration with PEFT."""

import copy
import math
import sys
import warnings
from itertools import chain

import torch
from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _filter_state_dict_by_key_prefixes,
    _get_in_out_features,
    _get_tuner_state_dict_key_prefixes,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
    is_transformers_ge_v5,
)
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND, PeftType, _get_submodules
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK
from peft.utils.warning import PeftWarning
from torch import nn
from torch.nn.parameter import is_lazy

from .. import init, patterns, saved
from ..backends.quantised import INPUT_TOO, Unreadable
from ..layers import branch as branches
from ..layers import experts
from ..layers.modules import check_alpha
from . import base as base_weights
from . import tensor_parallel
from .config import LORA2, NLORA, LoRA2Config, NLoraConfig, method, variant
from .experts import FusedExperts, NLoraExperts
from .fuse import fuse_layers, unfuse_layers
from .layer import FusedLinear
from .lora2 import HasFactors, LoRA2Experts, LoRA2Linear
from .nlora import HasCore, NLoraLinear, subtract_initial


class _FusedModel(LoraModel):
    """What the two tuners share: an injection that fails leaves the model as it was, and loading checks first."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        before = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
        # Meanwhile layers of plain LoRA are PEFT's own, made and named in its messages as with LoraConfig.
        unfuse_layers(model)
        try:
            config = self.peft_config[adapter_name]
            _find_experts(model, config)
            self._make_room(model, config)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            withdraw(model, adapter_name, before)
            raise
        finally:
            fuse_layers(model)
        _advise(model, adapter_name, self.peft_config[adapter_name])

    def _make_room(self, model: nn.Module, config: LoraConfig) -> None:
        """What has to be done before PEFT walks through the modules, which must not get others meanwhile."""

    def _check_target_module_compatiblity(self, peft_config, model: nn.Module, target_name: str) -> None:
        super()._check_target_module_compatiblity(_as_lora(peft_config), model, target_name)

    def _create_and_replace(self, lora_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        if isinstance(parent, nn.MultiheadAttention):
            unheard = (
                f"nn.MultiheadAttention reads the weight of {current_key!r} and never calls it, so that an adapter "
                "there has no effect: leave it out, by exclude_modules where a pattern takes it in"
            )
            if not _is_lora(lora_config):
                raise ValueError(unheard)
            warnings.warn(unheard, stacklevel=2)
        if not _is_lora(lora_config) and _registered(lora_config, target):
            raise ValueError(
                f"layers registered by _register_custom_module are LoRA, and not supported with {method(lora_config)}, "
                f"got one for {current_key!r}"
            )
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not _is_lora(lora_config) and any(map(is_lazy, base.parameters(recurse=False))):
            raise ValueError(
                f"{current_key!r} cannot be adapted: its weight must be initialised, got a {type(base).__qualname__} "
                "that was not called yet"
            )
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
            known = (Unreadable,) if _is_lora(lora_config) else (TypeError, ValueError, Unreadable)
            if type(error) not in known or repr(current_key) in str(error):
                raise
            raise type(error)(f"{current_key!r} cannot be adapted: {error}") from error
        layer = getattr(parent, target_name)
        layer.layer_name = current_key
        if isinstance(parent, nn.TransformerEncoderLayer) and not layer._forward_pre_hooks:
            layer.register_forward_pre_hook(_called)

    def add_weighted_adapter(self, adapters, weights, adapter_name, *args, **kwargs) -> None:
        for name in adapters:
            if name in self.peft_config and not _is_lora(self.peft_config[name]):
                raise ValueError(
                    f"add_weighted_adapter combines lora_A and lora_B alone, and adapter {name!r} has a core between "
                    "them: convert it with nlora_kernels.checkpoint.to_lora first"
                )
        super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        tensors = tensor_parallel.gathered(model, tensors)
        if not _is_lora(config):
            _warn_of_shards(tensors, adapter_name)
        return tensors

    @classmethod
    def _convert_state_dict_for_initial_model(cls, peft_model, peft_config, path, output_state_dict, kwargs):
        if _is_lora(peft_config):
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
        if _is_lora(config):
            return remapped
        prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
        expected = _filter_state_dict_by_key_prefixes(model.state_dict(), prefixes)
        missing = sorted(expected.keys() - remapped.keys())
        if missing:
            raise ValueError(f"the checkpoint of adapter {adapter_name!r} lacks {_some(missing)}")
        layers = {_layer_of(key) for key in expected}
        foreign = sorted(key for key in remapped.keys() - expected.keys() if _layer_of(key) in layers)
        if foreign:
            raise ValueError(
                f"the checkpoint of adapter {adapter_name!r} has {_some(foreign)}, for which an adapter of "
                f"{method(config)} has no place: load it with the configuration that was saved with it"
            )
        return remapped

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # PyTorch fills what fits and then complains of the rest: check before anything is filled.
        own = (self.named_parameters, self.named_buffers)
        for name, tensor in chain(*(named(prefix.rstrip("."), remove_duplicate=False) for named in own)):
            value = state_dict.get(name)
            # Parameters that FSDP1 or DeepSpeed took apart are theirs to load.
            apart = hasattr(tensor, "_fsdp_flattened") or hasattr(tensor, "ds_shape")
            if not isinstance(value, torch.Tensor) or apart or is_lazy(tensor):
                continue
            if value.shape != tensor.shape:
                # In the words of PyTorch, which its users look for.
                raise RuntimeError(
                    f"Error(s) in loading state_dict: size mismatch for {name}: copying a param with shape "
                    f"{value.shape} from checkpoint, the shape in current model is {tensor.shape}."
                )
        saved.check_state(state_dict, [key for key in state_dict if key.startswith(prefix) and ".lora_" in key])
        super()._load_from_state_dict(state_dict, prefix, *args)


class NLoraModel(_FusedModel):
    """The tuner of NLoraConfig, and of LoraConfig beside it.

    It stands for "LORA" in PEFT's table, because plain LoRA of NLoraConfig has this type; a model whose adapters are of
    LoraConfig alone still gets PEFT's own tuner.
    """

    def __new__(cls, model: nn.Module | None = None, config=None, *args, **kwargs):
        configs = config.values() if isinstance(config, dict) else [config]
        if config is None or any(isinstance(each, NLoraConfig) for each in configs):
            plain = cls is NLoraModel and config is not None and all(map(_is_lora, configs))
            return super().__new__(_PlainModel if plain else cls)
        return LoraModel(model, config, *args, **kwargs)

    def _make_room(self, model: nn.Module, config: LoraConfig) -> None:
        if config.target_parameters and not _is_lora(config):
            for module in list(model.modules()):
                NLoraExperts.adopt(module)

    def _check_new_adapter_config(self, config: LoraConfig) -> None:
        super()._check_new_adapter_config(config)
        configs = list(self.peft_config.values())
        for each in configs:
            if (other := variant(each)) and not all(map(_is_lora, configs)):
                raise ValueError(f"{other} is not supported beside an adapter that has a lora_N")
        # NOTE: reduce_intruder_dimension adds an adapter with the configuration of another to write lora_A and lora_B
        # into it. It asks for the type of the first adapter alone, so a core behind plain LoRA must be kept from it.
        again = sum(each is config for each in configs) > 1
        if again and not _is_lora(config) and _is_lora(configs[0]):
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
            _refuse_shared_weights(model, peft_config)
        super()._prepare_model(peft_config, model)
        if peft_config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND and (
            getattr(peft_config, "init_lora_weights", None) == "nystrom"
        ):
            _fit_ranks(model, peft_config)

    def _create_and_replace(self, lora_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        if not _is_lora(lora_config) and isinstance(target, LoraLayer):
            if not (NLoraLinear.adopt(target) or NLoraExperts.adopt(target)):
                raise _unsupported(lora_config, target.get_base_layer(), current_key)
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
        )

    @staticmethod
    def _create_new_module(lora_config, adapter_name, target, **kwargs):
        if _is_lora(lora_config):
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


def _is_lora(config: LoraConfig) -> bool:
    """Whether its adapter is LoRA to PEFT: nothing between lora_A and lora_B."""
    return config.peft_type == PeftType.LORA


def _registered(config: LoraConfig, target: nn.Module) -> bool:
    """Whether the user has registered an adapter layer of their own for the base layer."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    return isinstance(base, tuple(config._custom_modules or ()))


def _called(module: nn.Module, args: tuple) -> None:
    """Does nothing: nn.TransformerEncoderLayer calls its layers in eval mode, and does not read their weights past the
    adapter, where one of them has a hook."""


def _as_lora(config: LoraConfig) -> LoraConfig:
    """The same with the type that PEFT's rules for LoRA ask for."""
    config = copy.copy(config)
    config.peft_type = PeftType.LORA
    return config


def _find_experts(model: nn.Module, config: LoraConfig) -> None:
    """Has a configuration name the parameters that transformers keeps in place of the layers it names, fused experts.

    PEFT does so where the type is its own.
    """
    if _is_lora(config) or not is_transformers_ge_v5 or not hasattr(getattr(model, "config", None), "model_type"):
        return
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    converted = copy.deepcopy(_as_lora(config))
    convert_peft_config_for_transformers(converted, model=model, conversions=None)
    if not converted.target_parameters:
        return
    named_none = config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND
    for name in ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern"):
        setattr(config, name, getattr(converted, name))
    if named_none and config.init_lora_weights == "nystrom":
        _fit_ranks(model, config)


def _layer_of(key: str) -> str | None:
    """The name of the layer to which a tensor of an adapter belongs, as it is in the base model."""
    layer, found, _ = key.removeprefix("base_model.model.").rpartition(".lora_")
    return layer if found else None


def _warn_of_shards(tensors: dict[str, torch.Tensor], adapter_name: str) -> None:
    """PEFT's warning for lora_A and lora_B that were not gathered, for all that these methods save."""
    vectors = (".lora_E.", ".lora_mask.")
    bad = [
        f"{name}: {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if ".lora_" in name and (not tensor.numel() or tensor.dim() < 1 + (not any(v in name for v in vectors)))
    ]
    if bad:
        warnings.warn(
            # In the words of PEFT, which its users' filters match.
            f"Adapter {adapter_name!r}: {len(bad)} LoRA tensor(s) have invalid shape: {_some(bad)}. DeepSpeed ZeRO-3 / "
            "FSDP shards were not gathered before save_pretrained(). Save within deepspeed.zero.GatheredParameters or "
            "FullyShardedDataParallel.summon_full_params",
            PeftWarning,
            stacklevel=2,
        )


def _advise(model: nn.Module, adapter_name: str, config) -> None:
    """One warning for what works but is not what the user came for."""
    # What its user chose, such as dropout, a layer runs unfused for without a word.
    bases = ((name, module.base_layer) for name, module in model.named_modules() if isinstance(module, FusedLinear))
    unfused = {
        name: reason
        for name, base in bases
        if (reason := branches.obstacle(base)) and tensor_parallel.split_of(base) is None
    }
    unfused = {name: reason for name, reason in unfused.items() if reason != INPUT_TOO}
    wrappers = ((name, module) for name, module in model.named_modules() if isinstance(module, FusedExperts))
    # The outermost computes. Nothing is said of routers, whose parameters are no stacks.
    outermost = [
        (name, module.get_base_layer())
        for name, module in wrappers
        if module.num_experts > 1 and not name.endswith(".base_layer")
    ]
    unfused |= {name: reason for name, base in outermost if (reason := experts.obstacle(base))}
    if unfused:
        name, reason = next(iter(unfused.items()))
        warnings.warn(
            f"{len(unfused)} adapter layers cannot be fused and run as base layer plus adapter, as in PEFT: {name}, "
            f"because {reason}",
            stacklevel=2,
        )
    cores = ((name, module) for name, module in model.named_modules() if isinstance(module, HasCore))
    idle = [name for name, module in cores if module.is_idle(adapter_name)]
    if idle:
        warnings.warn(
            f"the adapter {adapter_name!r} of {_some(idle)} gets no gradient and cannot train, because {init.IDLE}",
            stacklevel=2,
        )
    patched = [name for name in branches.READ_ONLY_A_AND_B if name in sys.modules]
    if patched and not _is_lora(config):
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


def _fit_ranks(model: nn.Module, config: NLoraConfig) -> None:
    """Gives layers that have fewer rows or columns than r, as routers and heads have, the rank that they can have.

    It is for "all-linear", which names none of them; a rank that rank_pattern has for a layer stays. So does the
    scaling, which is that of r.
    """
    if not isinstance(config.r, int):
        return
    found = _maybe_include_all_linear_layers(copy.copy(config), model)
    limits = {}
    for name, module in model.named_modules():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if (isinstance(base, nn.Linear) or branches.is_conv1d(base)) and check_target_module_exists(found, name):
            limits[name] = min(tensor_parallel.sides(base, _get_in_out_features(base)))
    for name, parameter in model.named_parameters():
        if any(f".{name}".endswith(f".{target}") for target in found.target_parameters or ()):
            limits[name] = min(parameter.shape[-2:])
    named = {name for name in limits if patterns.lookup(config.rank_pattern, name, None) is not None}
    ranks = {name: limit for name, limit in limits.items() if 0 < limit < config.r and name not in named}
    if not ranks:
        return
    root = math.sqrt if config.use_rslora else lambda value: value
    alphas = {name: patterns.lookup(config.alpha_pattern, name, config.lora_alpha) for name in ranks}
    for alpha in alphas.values():
        check_alpha(alpha, "lora_alpha")
    alphas = {name: alpha * (root(ranks[name]) / root(config.r)) for name, alpha in alphas.items()}
    warnings.warn(
        f"{len(ranks)} layers have fewer rows or columns than r = {config.r} and get rank min(out, in): "
        f"{_some([f'{name} ({rank})' for name, rank in ranks.items()])}. Their scaling stays; exclude_modules leaves "
        "them out",
        stacklevel=2,
    )
    config.rank_pattern = {patterns.exact(name): rank for name, rank in ranks.items()} | config.rank_pattern
    config.alpha_pattern = patterns.overridden(config.alpha_pattern, alphas, limits)


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


def _some(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# What must be equal before the weights of one adapter may be swapped for another's: of a core, ranks too, because PEFT
# fills what is larger in one dimension only.
_FIXED = [*CONFIG_KEYS_TO_CHECK[PeftType.LORA], "init_lora_weights", "r", "rank_pattern"]
FIXED_IN_HOT_SWAP = {NLORA: [*_FIXED, "residual", "train"], LORA2: _FIXED}
for _type, _config, _tuner in ((NLORA, NLoraConfig, NLoraModel), (LORA2, LoRA2Config, LoRA2Model)):
    PEFT_TYPE_TO_CONFIG_MAPPING[_type] = _config
    PEFT_TYPE_TO_TUNER_MAPPING[_type] = _tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[_type] = LoraModel.prefix
PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = NLoraModel
