"""What the base weight in a state dict of a residual layer is, which its tensors do not tell.

With residual=True it is W less the initial product of one adapter, or W, or W with adapters merged into it. A state
dict says so in PyTorch's metadata, beside the versions of its modules. Where tensors alone were kept, as by safetensors
and torch.distributed.checkpoint, it is taken to be that of a layer at rest: less the product of the first of its
residual adapters by name. Where numbers show that it is not, or nothing shows what it is, loading is an error.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers import branch as branches
from ..layers import engines
from ..layers.branch import Branch, local

# The name of the entry in the metadata of a module.
ENTRY = "residual"
KEPT = ("lora_A0", "lora_N0", "lora_B0")
_REMEDY = (
    "save while nothing is merged, and by torch.save(model.state_dict()), which keeps what a state dict says of itself"
)


class Out(NamedTuple):
    """The initial product that is out of a base weight."""

    name: str | None
    # With which it was taken out; None for that of the layer's own configuration.
    scaling: float | None = None


def described(layer: nn.Module) -> dict[str, Any]:
    """What the base weight of a layer with residual adapters is now, in types that every reader of files has."""
    name = layer.subtracted
    scaling = None if name is None else layer.initial_scaling[name]
    return {"subtracted": name, "scaling": scaling, "merged": list(layer.merged_adapters)}


def by_layer(state_dict: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries of a state dict that belong to adapter layers, by the prefix of the layer."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in state_dict.items():
        layer, mark, _ = key.partition(".lora_")
        if not mark:
            layer, mark, _ = key.rpartition(".base_layer.")
        if mark:
            found.setdefault(f"{layer}.", {})[key] = value
    return found


def weight_in(layer: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> Tensor | None:
    """The base weight in a state dict, if there is one that fits."""
    weight, own = state_dict.get(f"{prefix}base_layer.weight"), getattr(layer.get_base_layer(), "weight", None)
    fits = isinstance(weight, Tensor) and isinstance(own, Tensor) and weight.shape == own.shape
    return weight if fits and not weight.is_meta else None


def is_own(weight: Tensor, layer: nn.Module) -> bool:
    """Whether it is the memory of the layer's own, as in the state dict of a model, into which others may load."""
    t, own = local(weight), local(layer.get_base_layer().weight)
    return _is_whole(t) and _is_whole(own) and own.numel() > 0 and t.data_ptr() == own.data_ptr()


def check(layer: nn.Module, state_dict: Mapping[str, Any], prefix: str, entry: Mapping[str, Any] | None) -> Out | None:
    """What is out of the base weight in a state dict; None where there is none.

    Raises ValueError, with the name of the layer, where that cannot be told, or the layer cannot be such.
    """
    own = list(getattr(layer, "lora_A0", ()))
    saved = _kept_in(state_dict, prefix)
    weight = weight_in(layer, state_dict, prefix) if entry or own or saved else None
    if weight is None:
        return None
    # Codes have nothing taken out of them.
    dense = branches.is_dense(weight) or engines.is_dtensor(weight)
    if entry:
        out, merged = Out(entry["subtracted"], entry["scaling"]), list(entry["merged"])
    else:
        out, merged = Out(saved[0] if saved and dense else None), []
    place = f"layer {prefix.removesuffix('.')!r}: the base weight in the state dict "
    if is_own(weight, layer):
        # The model's own state dict, into which what was saved may have been written since. What it says of itself is
        # from before.
        if own and (layer.merged or layer._subtractable()):
            raise ValueError(
                f"{place}is the model's own, with adapters merged into it or no product out of it yet: call "
                "unmerge_adapter() and eval() before its state dict is made"
            )
        out = Out(getattr(layer, "subtracted", None))
        return out if out.name is None or out.name in saved else None
    if merged != layer.merged_adapters:
        raise ValueError(
            f"{place}has the adapters {merged} merged into it{'' if entry else ', as far as it says'}, and the model's "
            f"own {layer.merged_adapters}: bring both to the same by merge_adapter() or unmerge_adapter()"
        )
    if out.name is not None and out.name not in own:
        raise ValueError(
            f"{place}is W − s·B₀·N₀·A₀ of the residual adapter {out.name!r}, which this model has not: add it before "
            "loading, or delete it before saving"
        )
    if out.name is not None and out.name not in saved:
        raise ValueError(
            f"{place}is W − s·B₀·N₀·A₀ of the residual adapter {out.name!r}, whose initial matrices are not in it: "
            "load the whole state dict"
        )
    if not entry and dense:
        if not saved:
            raise ValueError(
                f"{place}comes without the initial matrices of the residual adapters {own}, and does not say whether a "
                "product is out of it: load a base model before the adapter is added, or after unload()"
            )
        if _is_off_by_an_adapter(layer, weight, out.name, state_dict, prefix):
            raise ValueError(
                f"{place}is that of this model but for products of its adapters: it was saved while one was merged, or "
                f"with no product out of it or another than that of {out.name!r}, and does not say which. To load it, "
                f"{_REMEDY}"
            )
    return out


def give_as_they_came(model: nn.Module, state_dict: dict[str, Any]) -> None:
    """Puts the initial products back into the base weights in a state dict that PEFT saves along with an adapter.

    Those of embeddings and output layers alone. They stand in a file that says nothing of what is out of them, beside
    one adapter, which may be another than that whose product it is; other readers take them for those of the model.
    """
    for name, layer in _beside_adapters(model):
        key = f"{name}.base_layer.weight"
        if isinstance(state_dict.get(key), Tensor) and layer.subtracted is not None:
            state_dict[key] = _moved(layer, state_dict[key], layer.subtracted, layer._kept(layer.subtracted), 1)


def take_as_they_came(model: nn.Module, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict of an adapter with the base weights of such layers as they are at rest, and what is then out of
    them: of the adapter's own product or of that which is out now, the first by name."""
    taken = dict(state_dict)
    for name, layer in _beside_adapters(model):
        prefix = f"{name}."
        weight = weight_in(layer, state_dict, prefix)
        if weight is None or not branches.can_be_added_to(layer.get_base_layer(), weight):
            continue
        kept = {
            loaded: [state_dict[f"{prefix}{kind}.{loaded}.weight"] for kind in KEPT]
            for loaded in _kept_in(state_dict, prefix)
        }
        if layer.subtracted is not None:
            kept.setdefault(layer.subtracted, layer._kept(layer.subtracted))
        if kept:
            out = min(kept)
            taken[f"{prefix}base_layer.weight"] = _moved(layer, weight, out, kept[out], -1)
            taken |= {f"{prefix}{kind}.{out}.weight": t.detach() for kind, t in zip(KEPT, kept[out], strict=True)}
    return taken


def _beside_adapters(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers with residual adapters whose base weights PEFT may save with an adapter."""
    if not hasattr(model, "get_input_embeddings"):
        return []
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [
        (name, m) for name, m in model.named_modules() if any(m is end for end in ends) and getattr(m, "lora_A0", ())
    ]


@torch.no_grad()
def _moved(layer: nn.Module, weight: Tensor, name: str, kept: Sequence[Tensor], sign: int) -> Tensor:
    """A base weight plus or minus the initial product of an adapter."""
    whole = [t.full_tensor() if engines.is_dtensor(t) else t for t in (weight, *kept)]
    matrices = [t.to(layer._kept(name)[0].dtype) for t in whole[1:]]
    product = layer._stored(Branch(*matrices, layer.initial_scaling[name]).product())
    return whole[0] + sign * product.to(whole[0])


def _kept_in(state_dict: Mapping[str, Any], prefix: str) -> list[str]:
    """The residual adapters of a layer whose initial matrices a state dict has, in the order of their names."""
    start = f"{prefix}{KEPT[0]}."
    names = sorted(key[len(start) :].removesuffix(".weight") for key in state_dict if key.startswith(start))
    return [name for name in names if all(f"{prefix}{kind}.{name}.weight" in state_dict for kind in KEPT)]


@torch.no_grad()
def _is_off_by_an_adapter(
    layer: nn.Module, weight: Tensor, out: str, state_dict: Mapping[str, Any], prefix: str
) -> bool:
    """Whether, were the product of `out` out of a weight, W would be this layer's own W, off by what adapters add.

    Both are multiplied by one random vector. What differs then lies within the columns of the adapters' B and B₀ if
    adapters are the reason, and in all directions if the base models are others, which may be.
    """
    # Memory without values may hold those of a tensor that was there before, even of this very weight.
    if layer._is_blank:
        return False
    base, kept = layer.get_base_layer(), [state_dict[f"{prefix}{kind}.{out}.weight"] for kind in KEPT]
    own, taken = base.weight, [] if layer.subtracted is None else layer._initial(layer.subtracted)
    if [t.shape for t in kept] != [t.shape for t in layer._kept(out)] or not all(map(_is_whole, (own, *kept, *taken))):
        return False
    dtype = torch.promote_types(own.dtype, torch.float32)
    columns = [
        tensor.to("cpu", dtype)
        for key, tensor in [*state_dict.items(), *((f"{prefix}{k}", t) for k, t in layer.named_parameters())]
        if key.startswith((f"{prefix}lora_B.", f"{prefix}lora_B0.")) and key.endswith(".weight") and _is_whole(tensor)
    ]
    columns = torch.cat([t for t in columns if t.dim() == 2 and len(t) == layer.out_features], 1)
    v = 2 * torch.randint(0, 2, (layer.in_features,), generator=torch.Generator().manual_seed(0)).to(dtype) - 1
    # Some rows are enough, if they are many more than the columns.
    step = max(1, layer.out_features // (64 + 4 * columns.shape[1]))

    def some(W: Tensor) -> Tensor:
        return (W.T if layer.fan_in_fan_out else W)[::step].to("cpu", dtype)

    def product(matrices: Sequence[Tensor], name: str) -> Tensor:
        return Branch(*(t.to("cpu", dtype) for t in matrices), layer.initial_scaling[name])(v)[::step]

    columns = columns[::step]
    off = some(weight) @ v + product(kept, out) - some(own) @ v
    if taken:
        off -= product(taken, layer.subtracted)
    # As large as what rounding every element a few times, and the sums, makes of the product.
    eps = max(torch.finfo(t.dtype).eps for t in (own, weight)) + 16 * torch.finfo(dtype).eps
    rounding = eps * some(own).norm()
    if off.norm() <= rounding or columns.shape[1] >= len(columns):
        return False
    basis, _ = torch.linalg.qr(columns)
    return bool((off - basis @ (basis.T @ off)).norm() <= rounding)


def _is_whole(t: Any) -> bool:
    return isinstance(t, Tensor) and branches.is_dense(t) and not t.is_meta
