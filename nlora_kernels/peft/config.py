"""The configurations: PEFT's LoraConfig and the options of the methods here."""

import copy
import os
from dataclasses import dataclass, field, fields
from typing import Literal

from peft import LoraConfig
from peft.utils import PeftType

from .. import init, patterns, saved
from ..layers.modules import TRAIN, check_method
from ..lora2.allocator import check_schedule


class _PeftType(str):
    """The name of an adapter type, with what PEFT's own, the members of an enumeration, have beside it."""

    value = property(str.__str__)

    def __str__(self) -> str:
        return f"PeftType.{self.value}"


class _NLoraType(_PeftType):
    """The type of an adapter of NLoraConfig: "LORA" wherever PEFT asks whether it is LoRA, or "NLORA".

    The two differ as strings, and yet neither is unlike the other: before PEFT lets an adapter stand beside those of a
    model it asks whether the types differ.
    """

    def __eq__(self, other) -> bool:
        return isinstance(other, _NLoraType) or str.__eq__(self, other)

    def __ne__(self, other) -> bool:
        return not self == other

    __hash__ = str.__hash__


# Plain LoRA is LoRA to everything that asks for the type; an adapter with a core is what nothing takes for LoRA.
PLAIN = _NLoraType(PeftType.LORA.value)
NLORA = _NLoraType("NLORA")
LORA2 = _PeftType("LORA2")

# Variants of LoRA that replace its product B·A, and options that tie or spread A and B: none knows of a core between.
_VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "ensure_weight_tying",
    "kasa_config",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
# Initialisations that rewrite the base weight, or are variants themselves.
_VARIANT_INITS = ("corda", "kasa", "loftq", "lora_ga", "mica", "olora", "pissa")
_INIT = LoraConfig.__dataclass_fields__["init_lora_weights"]


class _Checked:
    """A configuration that is read only where the weights beside it can be: before a model is touched."""

    def __post_init__(self):
        super().__post_init__()
        for name in saved.FLAGS:
            saved.check_flag(name, getattr(self, name, None))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs):
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        # On a hub nothing is there to look at yet.
        if os.path.isdir(folder):
            saved.check_readable(folder)
        file = os.path.join(folder, saved.CONFIG)
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        saved.check_config(file, config.to_dict())
        return config

    def to_dict(self) -> dict:
        # What PEFT saves, sorted.
        options = super().to_dict()
        named = ("rank_pattern", "alpha_pattern")
        return options | {name: patterns.in_any_order(options[name]) for name in named if options[name]}


@dataclass
class NLoraConfig(_Checked, LoraConfig):
    """SLoRA, NLoRA, IntTune (arXiv 2502.14482) and plain LoRA, fused with their base layers.

    All options of LoraConfig hold. With "nystrom" and target_modules="all-linear", layers that have fewer rows or
    columns than r get rank min(out, in), which is written to rank_pattern, and keep their scaling. Further:

    Args:
        init_lora_weights: "nystrom" (NLoRA, the default), "slora", "slora_gaussian" (see `nlora_kernels.init.adapter`),
            or any value of LoraConfig: then it is PEFT's LoRA without lora_N, which may stand beside the others.
        train: "all", or "core" for lora_N alone (IntTune, with "nystrom").
        core: N of "nystrom": "sample", "optimal" or "pinv".
        select: rows and columns of "nystrom": "leading", "uniform", "norm" or "pivoted".
        select_seed: of "uniform", which does not read the global generator.
        residual: make step 0 of "nystrom" exact: its initial product leaves the base weight (train="all") or the core
            (train="core"). Of several such adapters on a layer, the product of one leaves the weight, and those of the
            others are branches, as is that of one on a quantised weight.

    Raises:
        ValueError: an unknown name, options that exclude each other, a variant of LoRA with a method that has a core.
    """

    # The metadata tell PEFT which values of the field are variants of LoRA.
    init_lora_weights: bool | str = field(default="nystrom", metadata=_INIT.metadata)
    train: Literal["all", "core"] = "all"
    core: Literal["sample", "optimal", "pinv"] = "sample"
    select: Literal["leading", "uniform", "norm", "pivoted"] = "leading"
    select_seed: int = 0
    residual: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = NLORA if self.has_core else PLAIN
        init.check_choice("train", self.train, TRAIN)
        check_method(self.init_lora_weights, self.core, self.select, self.residual)
        if self.train == "core" and not self.has_core:
            raise ValueError(f"train='core' needs a lora_N, which init_lora_weights={self.init_lora_weights!r} has not")
        if self.has_core and (other := variant(self)):
            raise ValueError(f"{other} is not supported with {method(self)}")
        if self.residual and self.layer_replication:
            raise ValueError("layer_replication shares base weights and is not supported with residual=True")

    def to_dict(self) -> dict:
        # What is saved is read as an NLoraConfig again.
        return super().to_dict() | {"peft_type": NLORA.value}

    @property
    def has_core(self) -> bool:
        """Whether the adapter has a lora_N."""
        return self.init_lora_weights in saved.CORE_METHODS


@dataclass
class LoRA2Config(_Checked, LoraConfig):
    """LoRA² (arXiv 2408.06854), fused with its base layers.

    All options of LoraConfig hold; `r` is the number of singular values, and lora_alpha / r the scaling, whatever k is
    and however many values are pruned.

    Args:
        k: rank of the outer pair lora_v, lora_V.
        init_lora_weights: True (the published code's), "orthogonal" (see `nlora_kernels.init.lora2`), or False for all
            five matrices from N(0, 1), with which step 0 moves the function.
        target_rank: of `nlora_kernels.lora2.RankAllocator`, as are total_steps, t_init, t_final, delta_t, beta1 and
            beta2, for `nlora_kernels.trainer.RankAllocatorCallback`, which alone reads them: in a training loop of
            one's own the ranks stay until an allocator is made and stepped.

    Raises:
        ValueError: a number out of range, t_init + t_final ≥ total_steps, or a variant of LoRA.
        TypeError: k or another count is no integer, a beta no real number.
    """

    init_lora_weights: bool | str = field(default=True, metadata=_INIT.metadata)
    k: int = 1
    target_rank: int | None = None
    total_steps: int | None = None
    t_init: int = 0
    t_final: int = 0
    delta_t: int = 1
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = LORA2
        init.check_rank(self.k, name="k")
        numbers = {name: getattr(self, name) for name in ("t_init", "t_final", "delta_t", "beta1", "beta2")}
        # These may be the callback's to say.
        later = {name: getattr(self, name) for name in ("target_rank", "total_steps")}
        check_schedule(**numbers, **{name: value for name, value in later.items() if value is not None})
        if not isinstance(self.init_lora_weights, bool) and self.init_lora_weights != "orthogonal":
            known = "True, False or 'orthogonal'"
            raise ValueError(f"init_lora_weights must be {known} for LoRA², got {self.init_lora_weights!r}")
        if other := variant(self):
            raise ValueError(f"{other} is not supported with {method(self)}")


def is_lora(config: LoraConfig) -> bool:
    """Whether its adapter is LoRA to PEFT: nothing between lora_A and lora_B."""
    return config.peft_type == PeftType.LORA


def as_lora(config: LoraConfig) -> LoraConfig:
    """The same with the type that PEFT's rules for LoRA ask for."""
    config = copy.copy(config)
    config.peft_type = PeftType.LORA
    return config


def method(config: LoraConfig) -> str:
    """What a configuration trains, for a message."""
    return "LoRA²" if isinstance(config, LoRA2Config) else f"init_lora_weights={config.init_lora_weights!r}"


def variant(config: LoraConfig) -> str | None:
    """The option that makes it another method than plain LoRA or one of those here, as name=value."""
    present = {f.name for f in fields(config)}
    for name in _VARIANTS:
        if name in present and getattr(config, name):
            return f"{name}={getattr(config, name)!r}"
    if str(config.init_lora_weights).startswith(_VARIANT_INITS):
        return f"init_lora_weights={config.init_lora_weights!r}"
    return None
