"""What a configuration names in a model: found, and checked, before PEFT walks through the modules."""

import copy
import math
import warnings

from peft import LoraConfig
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
    is_transformers_ge_v5,
)
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from .. import patterns, saved
from ..layers import branch as branches
from ..layers.modules import check_alpha
from . import tensor_parallel
from .config import NLoraConfig, as_lora, is_lora


def find_experts(model: nn.Module, config: LoraConfig) -> None:
    """Has a configuration name the parameters that transformers keeps in place of the layers it names, fused experts.

    PEFT does so where the type is its own.
    """
    if is_lora(config) or not is_transformers_ge_v5 or not hasattr(getattr(model, "config", None), "model_type"):
        return
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    converted = copy.deepcopy(as_lora(config))
    convert_peft_config_for_transformers(converted, model=model, conversions=None)
    if not converted.target_parameters:
        return
    named_none = config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND
    for name in ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern"):
        setattr(config, name, getattr(converted, name))
    if named_none and config.init_lora_weights == "nystrom":
        fit_ranks(model, config)


def fit_ranks(model: nn.Module, config: NLoraConfig) -> None:
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
        f"{saved.some([f'{name} ({rank})' for name, rank in ranks.items()])}. Their scaling stays; "
        "exclude_modules leaves them out",
        stacklevel=2,
    )
    config.rank_pattern = {patterns.exact(name): rank for name, rank in ranks.items()} | config.rank_pattern
    config.alpha_pattern = patterns.overridden(config.alpha_pattern, alphas, limits)


# Layers whose weight is read instead of calling them, always or on some device, by the class that does.
_READ = {
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "DabDetrMHAttentionMap": ("k_linear",),
    "DetrMHAttentionMap": ("k_proj",),
    "FalconMambaMixer": ("dt_proj",),
    "JambaMambaMixer": ("dt_proj",),
    "LongcatFlashTopkRouter": ("classifier",),
    "MambaMixer": ("dt_proj",),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
    "MobileBertLMPredictionHead": ("decoder", "dense"),
    "TDNNLayer": ("kernel",),
}


def reader(parent: nn.Module, target_name: str) -> str | None:
    """The class that reads the weight of its layer of this name instead of calling it, if it does."""
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention"
    names = [kind.__name__ for kind in type(parent).__mro__]
    return next((name for name in names if target_name in _READ.get(name, ())), None)


def refuse_shared_weights(model: nn.Module, config: NLoraConfig) -> None:
    """A residual base weight must have no second user, as the output layer tied to the embedding has."""
    config = _maybe_include_all_linear_layers(copy.copy(config), model)
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name.rpartition(".")[0].removesuffix(".base_layer"))
    for names in users.values():
        targets = [name for name in names if check_target_module_exists(config, name)]
        if len(names) > 1 and targets:
            raise ValueError(f"residual=True needs a base weight of its own, and {' and '.join(names)} share one")
