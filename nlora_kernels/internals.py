"""What PyTorch does not document of `torch._C`, its modes and its compiler: here alone, each with what it gains, and
each with a test that fails where PyTorch changes it (python_tests/ops/test_internals.py, of `DisableTorchFunction`
python_tests/peft/test_interrupts.py).

Times are those of one call on an AVX-512 CPU, beside 10 µs for a 64×64 `lora_linear` of one row without gradients.
"""

import contextlib
import functools
from collections.abc import Callable

import torch
from torch.autograd import forward_ad

# The dispatch keys that PyTorch itself keeps active while nothing but plain eager mode is.
_ORDINARY = torch._C._dispatch_tls_local_include_set().raw_repr()
# The mode of vmap in torch.autograd.grad, for a batch of gradients.
_VMAP = torch._C._parse_dispatch_key("VmapMode")

# Whether autocast is on for any device: one question, where torch.is_autocast_enabled wants the name of a device.
any_autocast = torch._C._is_any_autocast_enabled


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device. PyTorch raises for those that have none, such as "meta"."""
    # NOTE: whether a device has autocast takes as long to ask as whether it is on.
    has = any_autocast() and (device in ("cpu", "cuda") or torch.amp.is_autocast_available(device))
    return has and torch.is_autocast_enabled(device)


def no_autocast(device: str) -> contextlib.AbstractContextManager:
    """Without autocast on a type of device."""
    has = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if has else contextlib.nullcontext()


# What products of fp32 may lose on a CPU: "ieee" nothing, "tf32" and "bf16" what these do; "none" where nothing is set.
# By torch.set_float32_matmul_precision ("highest", "high", "medium"), whose getter raises where the other way was used,
# or by torch.backends.mkldnn.matmul.fp32_precision, which takes 1.7 µs to read; this 0.07.
fp32_precision = functools.partial(torch._C._get_fp32_precision_getter, "mkldnn", "matmul")


# Whether two tensors have one storage, fakes and those without memory too, whose storages have no address to compare.
shares_memory = torch._C._is_alias_of


# Without modes for functions, and without Python between its two ends, where an interrupt could come.
DisableTorchFunction = torch._C.DisableTorchFunction


def watched() -> bool:
    """Whether anything beyond plain eager mode is active that wants to see operators.

    Dispatch modes, tracing, functionalization and torch.func are dispatch keys of the thread and are asked for as one,
    not by name; modes for functions and the profiler have their own place. The way past the dispatcher, which this
    allows, saves 7.7 µs for 0.5 µs of asking.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._dispatch_tls_local_include_set().raw_repr() | _ORDINARY != _ORDINARY
        or torch._C._len_torch_function_stack() > 0
        or torch._C._autograd._profiler_enabled()
    )


def tracing() -> bool:
    """Whether torch.jit.trace records."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def dual() -> bool:
    """Whether forward mode is active."""
    return forward_ad._current_level >= 0


def composing(shown: bool | None = None) -> bool:
    """Whether a transform of torch.func, forward mode or the export to ONNX wants PyTorch's own operations.

    `shown`: what `watched` said, where it was asked already.
    """
    if torch.compiler.is_compiling():
        return False
    if dual():
        return True
    return (watched() if shown is None else shown) and (
        torch._C._are_functorch_transforms_active()
        or torch._C._dispatch_tls_local_include_set().has(_VMAP)
        or (tracing() and torch.onnx.is_in_onnx_export())
    )


def in_backward() -> bool:
    """Whether autograd computes gradients in this thread now, as where a checkpoint makes its forward again."""
    return torch._C._current_graph_task_id() != -1


def plain_apply(function: type[torch.autograd.Function]) -> Callable:
    """function.apply for calls where nothing is `watched`.

    torch.autograd.Function.apply itself first looks through all arguments for what torch.func may have left behind,
    for 2.3 µs.
    """
    return super(torch.autograd.Function, function).apply


def plain_backward(function: type[torch.autograd.Function]) -> None:
    """Has the engine call function.backward at once.

    What PyTorch puts between first looks whether the function has a vjp too, and wants its gradients as a list, for
    1 µs.
    """
    function._backward_cls.apply = function.backward


def constant_in_compiled_code(function: Callable) -> Callable:
    """What torch.compiler.assume_constant_result does after it has imported the compiler, which takes a second."""
    function._dynamo_marked_constant = True
    return function
