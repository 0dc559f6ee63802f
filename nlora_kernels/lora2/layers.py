"""What makes a LoRA² layer, the same for the plain module and the PEFT layer."""

from typing import NamedTuple

from torch import Tensor, nn

from ..layers import engines
from ..ops.checks import check_module
from .flat import Flattened

_TENSORS = ("lora_E", "lora_u", "lora_U", "lora_v", "lora_V", "lora_mask")


class Layer(NamedTuple):
    """The tensors of one LoRA² adapter: E (r), u (r, k), U (k, r), v (k, in), V (out, k) and the mask (r).

    Those of a mixture's experts are packed, and r is the sum of theirs: v (experts·k, in), V (out, k·experts) with the
    experts of one k side by side, and in all others the experts one after another.
    """

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
    def target(self) -> str:
        """The name of what is adapted: the module, or one of its parameters, which stands within wrappers."""
        if not hasattr(self.module, "parameter_name"):
            return self.name
        return f"{self.name.replace('.base_layer', '')}.{self.module.parameter_name}"

    @property
    def r(self) -> int:
        return engines.shape(self.lora_u)[0]

    @property
    def k(self) -> int:
        return engines.shape(self.lora_u)[1]

    @property
    def count(self) -> int:
        """How many layers it is: one, or the experts of a mixture, whose factors are packed."""
        return getattr(self.module, "num_experts", 1)

    @property
    def scored(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three small tensors that importance is computed from."""
        return self.lora_E, self.lora_u, self.lora_U

    @classmethod
    def of(cls, name: str, module: nn.Module, adapter: str | None) -> "Layer":
        if adapter is None:
            held = module._parameters | module._buffers
            found = {kind: held.get(kind) for kind in _TENSORS}
        else:
            found = {kind: _weight(module._modules[kind][adapter]) for kind in _TENSORS}
        for kind, t in found.items():
            if t is None or engines.is_flattened(t):
                raise ValueError(
                    "the penalty and the allocator of LoRA² need each matrix to be a unit of FSDP1 "
                    "(FullyShardedDataParallel) by itself, as PEFT's fsdp_auto_wrap_policy makes them, or shards of "
                    f"FSDP2 (fully_shard), got {kind} of {name} flattened with other parameters"
                )
        return cls(name, module, adapter, *found.values())

    def again(self) -> "Layer":
        """The same with the tensors that the module holds now: moving a model replaces its buffers."""
        return Layer.of(self.name, self.module, self.adapter)


def _weight(holder: nn.Module) -> Tensor | Flattened:
    # A unit of what does not train has no parameter.
    if engines.is_unit(holder) and holder._handle is not None:
        return Flattened(holder)
    return engines.inside(holder).weight


def unpacked(count: int, v: Tensor, u: Tensor, V: Tensor, U: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """v, u, V and U of each of so many layers, views of the packed ones."""
    if count == 1:
        return [(v, u, V, U)]
    parts = v.chunk(count), u.chunk(count), V.unflatten(1, (-1, count)).unbind(2), U.chunk(count, 1)
    return list(zip(*parts, strict=True))


def layers(model: nn.Module) -> list[Layer]:
    """The LoRA² adapters of a model in the order of its modules.

    A layer is a module with parameters lora_E, lora_u, lora_U, lora_v and lora_V and the buffer lora_mask, or with
    modules of these names that map adapters to modules whose weight is such; of a mapping it is the one active adapter
    that counts.

    Raises TypeError if the model is no module, and ValueError if it has none, a layer more than one active, or FSDP1
    has flattened one with others.
    """
    check_module(model)
    found = []
    for name, module in model.named_modules():
        # NOTE: asking a module for an attribute that it lacks raises, which costs most of a walk over a model.
        if "lora_mask" not in module._modules and "lora_mask" not in module._buffers:
            continue
        name = engines.own_name(name)
        if "lora_mask" in module._buffers:
            found.append(Layer.of(name, module, None))
            continue
        active = [adapter for adapter in module.active_adapters if adapter in module._modules["lora_E"]]
        if len(active) > 1:
            raise ValueError(f"model must have one active LoRA² adapter, layer {name} has {', '.join(active)}")
        found += [Layer.of(name, module, adapter) for adapter in active]
    if not found:
        raise ValueError("model must have layers with an active LoRA² adapter, got none")
    return found
