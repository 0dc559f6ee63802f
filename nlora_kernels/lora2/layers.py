"""What makes a LoRA² layer, the same for the plain module and the PEFT layer."""

from typing import NamedTuple

from torch import Tensor, nn

_TENSORS = ("lora_E", "lora_u", "lora_U", "lora_v", "lora_V", "lora_mask")
_NAMES = frozenset(_TENSORS)


class Layer(NamedTuple):
    """The tensors of one LoRA² adapter: E (r), u (r, k), U (k, r), v (k, in), V (out, k) and the mask (r)."""

    name: str
    module: nn.Module
    # Its name in the mappings of a PEFT layer.
    adapter: str | None
    lora_E: Tensor
    lora_u: Tensor
    lora_U: Tensor
    lora_v: Tensor
    lora_V: Tensor
    lora_mask: Tensor

    @property
    def r(self) -> int:
        return self.lora_u.shape[0]

    @property
    def k(self) -> int:
        return self.lora_u.shape[1]

    @property
    def scored(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three small tensors that importance is computed from."""
        return self.lora_E, self.lora_u, self.lora_U

    @classmethod
    def of(cls, name: str, module: nn.Module, adapter: str | None) -> "Layer":
        everything = _held(module)
        held = [everything[attribute] for attribute in _TENSORS]
        return cls(name, module, adapter, *(held if adapter is None else [mapping[adapter] for mapping in held]))

    def again(self) -> "Layer":
        """The same with the tensors that the module holds now: moving a model replaces its buffers."""
        return Layer.of(self.name, self.module, self.adapter)


def layers(model: nn.Module) -> list[Layer]:
    """The LoRA² adapters of a model in the order of its modules.

    A layer is a module with lora_E, lora_u, lora_U, lora_v, lora_V and lora_mask, each a parameter or buffer, or a
    module that maps adapter names to such; of a mapping it is the one active adapter that counts.

    Raises ValueError if the model has none, or a layer more than one active.
    """
    found = []
    for name, module in model.named_modules():
        plain = "lora_E" in module._parameters
        if not (plain or "lora_E" in module._modules) or not _held(module).keys() >= _NAMES:
            continue
        if plain:
            found.append(Layer.of(name, module, None))
            continue
        active = [adapter for adapter in module.active_adapters if adapter in module.lora_E]
        if len(active) > 1:
            raise ValueError(f"model must have one active LoRA² adapter, layer {name} has {', '.join(active)}")
        found += [Layer.of(name, module, adapter) for adapter in active]
    if not found:
        raise ValueError("model must have layers with an active LoRA² adapter, got none")
    return found


def _held(module: nn.Module) -> dict[str, Tensor | nn.Module | None]:
    # NOTE: a module looks an attribute up in three dictionaries, and one that it lacks raises: both cost at every step.
    return module._parameters | module._buffers | module._modules
