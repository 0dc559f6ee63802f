"""Checks of the operations' arguments. Every message names the argument, what was expected and what came."""

import contextlib
import numbers
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import Call, Factors, quantised
from ..backends.base import PLAIN, short
from ..backends.native import _C
from ..backends.quantised import Quantised
from ..internals import autocasts

REAL = (numbers.Real, torch.SymFloat, torch.SymInt)
DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
DTYPE_NAMES = ", ".join(sorted(map(short, DTYPES)))
# What stands for lora_A, lora_B and lora_N in LoRA².
LORA2_NAMES = ("lora_v", "lora_V", "the core of lora_u, lora_E and lora_U")


def check_module(model) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")


def check_dense(**tensors: Tensor | None) -> None:
    """TypeError, by name, for a layout that no operation here reads."""
    for name, t in tensors.items():
        if t is not None and (t.layout is not torch.strided or t.is_nested):
            raise TypeError(f"{name} must be a dense tensor, got {'a nested one' if t.is_nested else t.layout}")


def check_memory(**tensors: Tensor | None) -> None:
    """TypeError or ValueError, by name, for what cannot be read: asked where a call has failed, or would not return."""
    tensors = {name: t for name, t in tensors.items() if not isinstance(t, Quantised)}
    check_dense(**tensors)
    for name, t in tensors.items():
        if t is not None and type(t) in PLAIN and t.device.type != "meta" and t.numel():
            # Tensors of a transform have none to ask.
            with contextlib.suppress(RuntimeError):
                # Of a part of freed memory the tensor itself has an address.
                if not t.untyped_storage().data_ptr():
                    raise ValueError(f"{name} has no memory: its storage was freed, or is held elsewhere")


def foreign(**tensors: Tensor | None) -> str:
    """Names the tensors of types that only PyTorch's own operations can know: all subclasses but its fakes."""
    found = {name: type(t) for name, t in tensors.items() if t is not None and type(t) not in PLAIN}
    if found:
        from torch._subclasses.fake_tensor import FakeTensor
        from torch._subclasses.functional_tensor import FunctionalTensor

        known = FakeTensor, FunctionalTensor
        found = {n: kind for n, kind in found.items() if kind not in known and not issubclass(kind, Quantised)}
    return " and ".join(f"{name} is a {kind.__qualname__}" for name, kind in found.items())


def composed_of(foreign: str, composed: Callable[[Any], Any], call):
    """What PyTorch's own operations make of a call with `foreign` tensors. TypeError, by their names, if nothing."""
    try:
        return composed(call)
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise TypeError(f"{foreign}, which PyTorch cannot compute with here: {error}") from error


def seen_through(weight: Tensor, x: Tensor) -> Quantised | None:
    """A quantised weight as one that is decoded to x's dtype; None for any other. ValueError if it is to train."""
    found = quantised.view(weight) if isinstance(weight, Tensor) and isinstance(x, Tensor) else None
    if found is None:
        return None
    if weight.requires_grad:
        raise ValueError("weight is quantised and gets no gradient: call weight.requires_grad_(False)")
    return found.to(x.dtype)


def resolved(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors with the sign of negative views in memory."""
    # Of a weight in few bits there is none.
    return [t.resolve_neg() if isinstance(t, Tensor) and t.is_neg() else t for t in tensors]


def fits(call: Call) -> bool:
    """Whether a call is plainly right, at a look. Where it is not, `check_call` says what is wrong, if anything is."""
    x, weight, lora_A, lora_B, lora_N, bias, scaling, _ = call
    # The compiler looks into no extension.
    if _C is None or torch.compiler.is_compiling() or type(scaling) is not float or type(lora_N) is tuple:
        return False
    if weight is None or lora_A is None:
        return False
    if isinstance(weight, Quantised):
        fits = _C.fits(x, None, lora_A, lora_B, lora_N, bias) and weight.dtype is x.dtype
        return fits and weight.shape == (lora_B.shape[0], x.shape[-1]) and weight.device == x.device
    return _C.fits(x, weight, lora_A, lora_B, lora_N, bias)


def fits_linear(x, weight, bias) -> bool:
    """The same of a layer without an adapter."""
    seen = _C is not None and weight is not None and not torch.compiler.is_compiling()
    return seen and _C.fits(x, weight, None, None, None, bias)


def check_call(call: Call):
    """TypeError or ValueError, by the name of its argument, for what is wrong with a call."""
    if type(call.lora_N) is not Factors:
        check_lora_linear(*call[:7])
        return
    names = dict(zip(("lora_A", "lora_B", "lora_N"), LORA2_NAMES, strict=True))
    check_lora_linear(*call._replace(lora_N=core_of(call.lora_N))[:7], names)


def core_of(factors: Factors) -> Tensor:
    """Stands for the core, which has yet to be made. TypeError or ValueError where it cannot be."""
    check_lora2_core(*factors)
    k = factors.lora_u.shape[1]
    return factors.lora_u.new_empty(k, k)


def check_lora_linear(x, weight, lora_A, lora_B, lora_N, bias, scaling, names=None):
    tensors = {"x": x, "weight": weight, "lora_A": lora_A, "lora_B": lora_B, "lora_N": lora_N, "bias": bias}
    if names:
        tensors = {names.get(name, name): t for name, t in tensors.items()}
    x_name, weight_name, A_name, B_name, N_name, bias_name = tensors
    check_tensors(tensors, optional=(N_name, bias_name))
    check_real("scaling", scaling)
    if weight.dim() != 2:
        raise ValueError(f"{weight_name} must have shape (out, in), got {tuple(weight.shape)}")
    out_features, in_features = weight.shape
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"{x_name} must have shape (..., {in_features}), got {tuple(x.shape)}")
    check_adapter(weight.shape, {A_name: lora_A, B_name: lora_B, N_name: lora_N})
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"{bias_name} must have shape ({out_features},), got {tuple(bias.shape)}")
    _check_dtypes({x_name: x, weight_name: weight, bias_name: bias})


def check_adapter(shape: Sequence[int], matrices: dict[str, Tensor | None]) -> None:
    """ValueError, by name, unless A (r, in), B (out, r) and N (r, r) or None fit a weight of shape (out, in)."""
    (A_name, A), (B_name, B), (N_name, N) = matrices.items()
    out_features, in_features = shape
    if A.dim() != 2 or A.shape[1] != in_features or A.shape[0] == 0:
        raise ValueError(f"{A_name} must have shape (r, {in_features}) with r >= 1, got {tuple(A.shape)}")
    r = A.shape[0]
    if B.shape != (out_features, r):
        raise ValueError(f"{B_name} must have shape ({out_features}, {r}), got {tuple(B.shape)}")
    if N is not None and N.shape != (r, r):
        raise ValueError(f"{N_name} must have shape ({r}, {r}), got {tuple(N.shape)}")


def check_linear(x, weight, bias, names):
    """The same of a layer without an adapter."""
    tensors = {"x": x, names["weight"]: weight, names["bias"]: bias}
    check_tensors(tensors, optional=(names["bias"],))
    if weight.dim() != 2:
        raise ValueError(f"{names['weight']} must have shape (out, in), got {tuple(weight.shape)}")
    out_features, in_features = weight.shape
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x must have shape (..., {in_features}), got {tuple(x.shape)}")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"{names['bias']} must have shape ({out_features},), got {tuple(bias.shape)}")
    _check_dtypes(tensors)


def check_group(weights, adapters, biases):
    """Of the arguments of a group each is a list with one of every layer."""
    if not isinstance(weights, Sequence) or not weights:
        raise TypeError(f"weights must be a list of at least one tensor, got {_said(weights)}")
    for name, given in (("adapters", adapters), ("biases", biases)):
        if given is None and name == "biases":
            continue
        if not isinstance(given, Sequence):
            raise TypeError(f"{name} must be a list, got {_said(given)}")
        if len(given) != len(weights):
            raise ValueError(f"{name} must have one for each of the {len(weights)} weights, got {len(given)}")
    for i, adapter in enumerate(adapters):
        if adapter is not None and not (isinstance(adapter, Sequence) and len(adapter) in (2, 3)):
            raise TypeError(
                f"adapters[{i}] must be (lora_A, lora_B), (lora_A, lora_B, lora_N) or None, got {_said(adapter)}"
            )


def _said(given) -> str:
    return f"{type(given).__name__} of {len(given)}" if isinstance(given, Sequence) else type(given).__name__


def check_experts(x, offsets, weight, lora_A, lora_B, lora_N, bias, scaling):
    tensors = {"x": x, "weight": weight, "lora_A": lora_A, "lora_B": lora_B, "lora_N": lora_N, "bias": bias}
    check_tensors(tensors, optional=("lora_N", "bias"))
    check_real("scaling", scaling)
    if weight.dim() != 3 or weight.shape[0] == 0:
        raise ValueError(f"weight must have shape (experts, out, in) with experts >= 1, got {tuple(weight.shape)}")
    experts, out_features, in_features = weight.shape
    if x.dim() != 2 or x.shape[1] != in_features:
        raise ValueError(f"x must have shape (rows, {in_features}), got {tuple(x.shape)}")
    A_shape = tuple(lora_A.shape)
    if len(A_shape) != 3 or A_shape[::2] != (experts, in_features) or A_shape[1] == 0:
        raise ValueError(f"lora_A must have shape ({experts}, r, {in_features}) with r >= 1, got {A_shape}")
    r = A_shape[1]
    for name, t, shape in (
        ("lora_B", lora_B, (experts, out_features, r)),
        ("lora_N", lora_N, (experts, r, r)),
        ("bias", bias, (experts, out_features)),
    ):
        if t is not None and t.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")
    _check_dtypes({"x": x, "weight": weight, "bias": bias})
    _check_offsets(offsets, x, experts)


def _check_offsets(offsets, x: Tensor, experts: int):
    if not isinstance(offsets, Tensor):
        raise TypeError(f"offsets must be a Tensor, got {type(offsets).__name__}")
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"offsets must be int32 or int64, got {offsets.dtype}")
    if offsets.shape != (experts,):
        raise ValueError(f"offsets must have shape ({experts},), got {tuple(offsets.shape)}")
    if offsets.device != x.device:
        raise ValueError(f"offsets must be on x's device {x.device}, got {offsets.device}")
    if not torch.compiler.is_compiling():
        check_ends(offsets, x.shape[0])


def check_ends(offsets: Tensor, rows: int) -> None:
    """ValueError where an expert would have other rows than those of x: asked also where compiled code knows them."""
    # Elsewhere to read them would wait for the device, and of a fake there is nothing to read.
    if type(offsets) in PLAIN and offsets.is_cpu:
        try:
            ends = offsets.tolist()
        except RuntimeError:
            check_memory(offsets=offsets)
            raise
        if any(last < first for first, last in pairwise([0, *ends, rows])):
            raise ValueError(f"offsets must rise from 0 to at most the {rows} rows of x, got {ends}")


def check_real(name: str, value) -> None:
    # NOTE: a float first, because asking an abstract class costs more than all other checks of a number.
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, REAL)):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")


def check_dropout(dropout):
    check_real("dropout", dropout)
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be within [0, 1], got {dropout}")


def check_lora2_core(lora_u, lora_E, lora_U, mask):
    tensors = {"lora_u": lora_u, "lora_E": lora_E, "lora_U": lora_U}
    check_tensors(tensors)
    if lora_u.dim() != 2 or 0 in lora_u.shape:
        raise ValueError(f"lora_u must have shape (r, k) with r, k >= 1, got {tuple(lora_u.shape)}")
    r, k = lora_u.shape
    if lora_E.shape != (r,):
        raise ValueError(f"lora_E must have shape ({r},), got {tuple(lora_E.shape)}")
    if lora_U.shape != (k, r):
        raise ValueError(f"lora_U must have shape ({k}, {r}), got {tuple(lora_U.shape)}")
    for name, t in tensors.items():
        if t.dtype != lora_u.dtype:
            raise TypeError(f"{name} must have lora_u's dtype {lora_u.dtype}, got {t.dtype}")
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a Tensor or None, got {type(mask).__name__}")
        if mask.shape != (r,):
            raise ValueError(f"mask must have shape ({r},), got {tuple(mask.shape)}")
        if mask.device != lora_u.device:
            raise ValueError(f"mask must be on lora_u's device {lora_u.device}, got {mask.device}")


def _check_dtypes(tensors: dict[str, Tensor | None]):
    """Of x, weight and bias, unless autocast makes them one."""
    (_, x), *others = tensors.items()
    for name, t in others:
        if t is not None and t.dtype != x.dtype and not autocasts(x.device.type):
            raise TypeError(f"{name} must have x's dtype {x.dtype}, got {t.dtype}")


def check_dtype(name: str, dtype) -> None:
    """TypeError unless it is one that the operations take."""
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        raise TypeError(f"{name} must be one of {DTYPE_NAMES}, got {dtype!r}")


def check_tensors(
    tensors: dict[str, Tensor | None], optional: tuple[str, ...] = (), device: torch.device | None = None
) -> None:
    """TypeError or ValueError, by name, for what no operation reads, or what is not on `device`, that of the first."""
    for name, t in tensors.items():
        if t is None and name in optional:
            continue
        if not isinstance(t, Quantised):
            if not isinstance(t, Tensor):
                raise TypeError(f"{name} must be a Tensor, got {type(t).__name__}")
            check_dense(**{name: t})
        check_dtype(name, t.dtype)
        device = device or t.device
        if t.device != device:
            raise ValueError(f"{name} must be on {device} like the tensors before it, got {t.device}")
