"""The tensors of an adapter in a state dict: what is wrong with them, before anything is filled or saved."""

import warnings
from collections.abc import Mapping
from itertools import chain
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import _filter_state_dict_by_key_prefixes, _get_tuner_state_dict_key_prefixes
from peft.utils.warning import PeftWarning
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import saved
from .config import method


def check_keys(model: nn.Module, config: LoraConfig, adapter_name: str, state_dict: Mapping[str, Tensor]) -> None:
    """ValueError unless all matrices of an adapter are there, and none that its layers have no place for."""
    prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
    expected = _filter_state_dict_by_key_prefixes(model.state_dict(), prefixes)
    missing = sorted(expected.keys() - state_dict.keys())
    if missing:
        raise ValueError(f"the checkpoint of adapter {adapter_name!r} lacks {saved.some(missing)}")
    layers = {_layer_of(key) for key in expected}
    foreign = sorted(key for key in state_dict.keys() - expected.keys() if _layer_of(key) in layers)
    if foreign:
        raise ValueError(
            f"the checkpoint of adapter {adapter_name!r} has {saved.some(foreign)}, for which an adapter of "
            f"{method(config)} has no place: load it with the configuration that was saved with it"
        )


def check_tensors(module: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> None:
    """RuntimeError for a tensor of another shape than that of the module, ValueError for an adapter's bad values."""
    # PyTorch fills what fits and then complains of the rest: check before anything is filled.
    own = (module.named_parameters, module.named_buffers)
    for name, tensor in chain(*(named(prefix.rstrip("."), remove_duplicate=False) for named in own)):
        value = state_dict.get(name)
        # Parameters that FSDP1 or DeepSpeed took apart are theirs to load.
        apart = hasattr(tensor, "_fsdp_flattened") or hasattr(tensor, "ds_shape")
        if not isinstance(value, Tensor) or apart or is_lazy(tensor):
            continue
        if value.shape != tensor.shape:
            # In the words of PyTorch, which its users look for.
            raise RuntimeError(
                f"Error(s) in loading state_dict: size mismatch for {name}: copying a param with shape "
                f"{value.shape} from checkpoint, the shape in current model is {tensor.shape}."
            )
    saved.check_state(state_dict, [key for key in state_dict if key.startswith(prefix) and ".lora_" in key])


def warn_of_shards(tensors: dict[str, Tensor], adapter_name: str) -> None:
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
            f"Adapter {adapter_name!r}: {len(bad)} LoRA tensor(s) have invalid shape: {saved.some(bad)}. DeepSpeed "
            "ZeRO-3 / FSDP shards were not gathered before save_pretrained(). Save within "
            "deepspeed.zero.GatheredParameters or FullyShardedDataParallel.summon_full_params",
            PeftWarning,
            stacklevel=2,
        )


def _layer_of(key: str) -> str | None:
    """The name of the layer to which a tensor of an adapter belongs, as it is in the base model."""
    layer, found, _ = key.removeprefix("base_model.model.").rpartition(".lora_")
    return layer if found else None
