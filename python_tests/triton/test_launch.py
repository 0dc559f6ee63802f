"""Launches that are made again: the same as Triton's own, with no tensor kept. Kernels are compiled and not run."""

import contextlib
import gc
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch

from python_tests import ROOT

pytest.importorskip("triton")


def install():
    """A Hopper that records its launches: (what was compiled, grid, {name: argument}), operands and descriptors by
    address."""
    import triton

    from nlora_kernels.backends.triton import device, launch
    from python_tests.triton import aot

    launches = []

    def launcher(src, metadata):
        def record(x, y, z, stream, function, packed, launch_metadata, enter, exit_, *arguments):
            plain = dict(zip(src.fn.arg_names, map(argument, arguments), strict=True))
            # Compiled in, and in the hash.
            plain.pop("META", None)
            launches.append((metadata.hash, (x, y, z), plain))

        return record

    def argument(value):
        if type(value) is launch.TensorDescriptor:
            return (
                value.base.data_ptr(),
                tuple(value.shape),
                tuple(value.strides),
                tuple(value.block_shape),
                value.padding,
            )
        if isinstance(value, tuple):
            return tuple(map(argument, value))
        return value.data_ptr() if isinstance(value, torch.Tensor) else value

    class Recorder(aot.Target):
        launcher_cls = staticmethod(launcher)
        utils = SimpleNamespace(
            load_binary=lambda name, binary, shared, device: (1, name, 32, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 232_448},
            unload_module=lambda module: None,
        )

    triton.runtime.driver.set_active(Recorder(90))
    device.target = lambda index: device.Device("recorder", 90, 132, 232_448)
    return launches


def layer(dtype=torch.bfloat16, core=True, M=256, K=64, N=64, R=16):
    shapes = (M, K), (N, K), (R, K), (N, R), (R, R), (N,)
    x, weight, A, B, N_, bias = (torch.ones(shape, dtype=dtype) for shape in shapes)
    return [x, weight, A, B, N_ if core else None, bias]


def both(operands, scaling=0.5, dy=None):
    """Forward and backward; y stands for its own gradient where none is given."""
    from nlora_kernels.backends import Call, Needs
    from nlora_kernels.backends.triton import linear

    call = Call(*operands, scaling)
    y, T = linear.forward(call)
    linear.backward(call, y if dy is None else dy, T, Needs(True, False, True, True, call.lora_N is not None, False))


def addresses(arguments):
    return {name for name, value in arguments.items() if type(value) is tuple or (type(value) is int and value > 2**32)}


def without_addresses(arguments):
    moved = addresses(arguments)
    return {n: v if n not in moved else v[1:] if type(v) is tuple else "address" for n, v in arguments.items()}


def again_is_the_same_but_for_addresses_and_scaling(launches):
    """Under the tuning rule's two launches, and in one."""
    from nlora_kernels.backends.triton import launch, tuning

    for single in (False, True):
        tuning.single_launch = lambda *_, single=single: single
        launch.forget_plans()
        first, second = layer(), layer()
        launches.clear()
        both(first, 0.5)
        count = len(launches)
        both(second, 0.25)
        assert count == (6 if single else 8) and len(launches) == 2 * count, (count, len(launches))
        for before, after in zip(launches[:count], launches[count:], strict=True):
            assert before[:2] == after[:2]
            assert list(before[2]) == list(after[2])
            moved = addresses(before[2]) | addresses(after[2])
            assert moved
            for name in before[2]:
                one, other = before[2][name], after[2][name]
                if type(one) is tuple:
                    assert type(other) is tuple and one[1:] == other[1:], name
                elif name == "alpha" and one == 0.5:
                    assert other == 0.25
                elif name not in moved:
                    assert one == other and type(one) is type(other), name
        for operands, made in ((first, launches[:count]), (second, launches[count:])):
            product = next(arguments for name, _, arguments in made if "weight" in arguments)
            assert (product["x"][0], product["weight"][0]) == (operands[0].data_ptr(), operands[1].data_ptr())
            assert product["bias"] == (operands[5].data_ptr(), 1)


def what_a_kernel_was_compiled_for_is_never_launched_with_another(launches):
    """Each change of a layout gives the launches that Triton itself would make of it: those without any plan."""
    from nlora_kernels.backends.triton import launch

    def shifted(t):
        return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)

    variants = [layer(), layer(core=False), layer(dtype=torch.float16), layer(M=255)]
    for place, change in [*((place, shifted) for place in range(6)), (2, torch.Tensor.float), (4, torch.Tensor.float)]:
        operands = layer()
        operands[place] = change(operands[place])
        variants.append(operands)
    variants.append([*layer()[:5], torch.ones(1, dtype=torch.bfloat16).expand(64)])
    expanded = torch.ones(1, 64, dtype=torch.bfloat16).expand(256, 64)

    def made(operands, scaling, dy):
        launches.clear()
        both(operands, scaling, dy)
        return [(kernel, grid, without_addresses(arguments)) for kernel, grid, arguments in launches]

    def gradient_of(operands):
        return operands[0].new_ones(operands[0].shape[0], 64)

    plain = gradient_of(variants[0])
    calls = [(operands, 0.5, gradient_of(operands)) for operands in variants]
    for operands, scaling, gradient in [
        *calls,
        (variants[0], 1, plain),
        (variants[0], 2, plain),
        (variants[0], 0.5, expanded),
    ]:
        planned = made(operands, scaling, gradient)
        assert all(type(arguments["alpha"]) is float for _, _, arguments in planned if "alpha" in arguments)
        again = made(operands, scaling, gradient)
        launch.forget_plans()
        fresh = made(operands, scaling, gradient)
        assert planned == again == fresh


def mixture_and_group(dtype=torch.bfloat16, M=256, K=64, N=64, R=16, E=3):
    """Calls of a mixture's experts, and of layers that share x, of which one has no adapter."""
    from nlora_kernels.backends import Call, ExpertsCall

    x, weight, A, B, core, bias = layer(dtype, True, M, K, N, R)
    stacks = (t.repeat(E, *[1] * t.dim()) for t in (weight, A, B, core, bias))
    mixture = ExpertsCall(x, torch.full((E,), M, dtype=torch.int32), *stacks, 0.5)
    others = [Call(x, *layer(dtype, core, M, K, width, R)[1:], 0.5) for core, width in ((True, N), (False, 2 * N))]
    return mixture, [*others, Call(x, weight.clone(), None, None)]


def what_takes_several_tensors_is_launched_again_with_its_own(launches):
    from nlora_kernels.backends import TABLE, Needs
    from nlora_kernels.backends.triton.group import takes

    def plain(value):
        if type(value) is tuple:
            return tuple(map(plain, value))
        return "address" if type(value) is int and value > 2**32 else value

    def made(mixture, group):
        launches.clear()
        needs = Needs(True, False, True, True, True, False)
        y, T = TABLE["triton"].forward_experts(mixture)
        TABLE["triton"].backward_experts(mixture, y, T, needs)
        ys, Ts = zip(*TABLE["triton"].forward_group(group), strict=True)
        wanted = [Needs(True, False, *[t is not None for t in (c.lora_A, c.lora_B, c.lora_N)], False) for c in group]
        TABLE["triton"].backward_group(group, ys, Ts, wanted)
        return list(launches)

    first, second = mixture_and_group(), mixture_and_group()
    before, after = made(*first), made(*second)
    assert [(kernel, grid, plain(tuple(arguments.items()))) for kernel, grid, arguments in before] == [
        (kernel, grid, plain(tuple(arguments.items()))) for kernel, grid, arguments in after
    ]
    for (mixture, group), found in ((first, before), (second, after)):
        several = [arguments for _, _, arguments in found if "weights" in arguments]
        # What Triton cannot launch as one is launched layer by layer.
        assert len(several) == (2 if takes(group) else 0)
        for arguments in several:
            assert [weight[0] for weight in arguments["weights"]] == [call.weight.data_ptr() for call in group]
        stacked = [arguments for _, _, arguments in found if "offsets" in arguments and "weight" in arguments]
        assert len(stacked) == 2 and {a["weight"][0] for a in stacked} == {mixture.weight.data_ptr()}
        assert {a["offsets"] for a in stacked} == {(mixture.offsets.data_ptr(), 1)}


def a_weight_in_few_bits_is_launched_again_with_its_own_tensors(launches):
    from nlora_kernels.backends.quantised import Coded
    from nlora_kernels.backends.quantised.base import Nested
    from nlora_kernels.backends.triton import launch

    def coded(nested):
        x, weight, *others = layer(M=16)
        codes, scales = torch.ones(64 * 32, dtype=torch.uint8), torch.ones(64, dtype=torch.uint8)
        inner = Nested(torch.ones(256), torch.ones(1), torch.ones(()), 256) if nested else None
        scales = scales if nested else scales.float()
        return [x, Coded("nibbles", weight.shape, x.dtype, codes, torch.ones(16), scales, 64, None, inner), *others]

    def plain(value):
        if type(value) is tuple:
            return tuple(map(plain, value))
        return "address" if type(value) is int and value > 2**32 else value

    def made(operands):
        launches.clear()
        both(operands)
        return list(launches)

    for nested in (False, True):
        first, second = coded(nested), coded(nested)
        before, after = made(first), made(second)
        launch.forget_plans()
        fresh = made(second)
        kernels = [
            [(kernel, grid, plain(tuple(arguments.items()))) for kernel, grid, arguments in found]
            for found in (before, after, fresh)
        ]
        assert kernels[0] == kernels[1] == kernels[2]
        for operands, found in ((first, before), (second, after)):
            weights = [arguments["weight"] for _, _, arguments in found if "weight" in arguments]
            codes, scales, values, *inner = (t.data_ptr() for t in operands[1].tensors)
            assert weights == 2 * [(codes, values, scales, *(inner or (None, None, None)))]


def no_tensor_is_kept(launches):
    operands = layer()
    both(operands)
    both(operands)
    dead = [weakref.ref(t) for t in operands]
    launches.clear()
    del operands
    gc.collect()
    assert not any(ref() is not None for ref in dead)


def threads_launch_their_own_tensors(launches):
    from nlora_kernels.backends.triton import launch

    launch.forget_plans()
    layers = [layer() for _ in range(8)]
    errors, start = [], threading.Barrier(len(layers))

    def work(operands):
        try:
            start.wait()
            for _ in range(20):
                both(operands)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(operands,)) for operands in layers]
    launches.clear()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    products = [arguments for _, _, arguments in launches if "weight" in arguments and arguments["bias"]]
    expected = {(operands[0].data_ptr(), operands[1].data_ptr(), operands[5].data_ptr()) for operands in layers}
    found = [(a["x"][0], a["weight"][0], a["bias"][0]) for a in products]
    assert len(found) == 160 and set(found) == expected


def plans_are_bounded(launches):
    from nlora_kernels.backends.triton import core, experts, extended, group, launch, narrow

    of_experts = experts.planned_narrow, experts.planned_extended, experts.planned_sums
    for planned in (core.planned, extended.planned, narrow.planned, group.planned, *of_experts):
        assert planned.cache_info().maxsize == launch.PLANS


@pytest.mark.parametrize(
    "check",
    [
        again_is_the_same_but_for_addresses_and_scaling,
        what_a_kernel_was_compiled_for_is_never_launched_with_another,
        what_takes_several_tensors_is_launched_again_with_its_own,
        a_weight_in_few_bits_is_launched_again_with_its_own_tensors,
        no_tensor_is_kept,
        threads_launch_their_own_tensors,
        plans_are_bounded,
    ],
    ids=lambda check: check.__name__,
)
def test(check):
    # A process of its own: the interpreter may be on in this one, and Triton keeps its driver.
    code = f"from python_tests.triton import test_launch as t; t.{check.__name__}(t.install())"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.skipif(not shutil.which("cc"), reason="the stub of the driver needs a C compiler")
def test_a_call_launches_kernels_of_ours_alone():
    """No casts and no zeros by PyTorch, in one launch or two, with adapters in fp32 too."""
    command = [sys.executable, "bench/gpu/host.py", "--rounds", "1", "--calls", "2", "--only", "fp32 adapters"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    counts = {}
    for line in ran.stdout.splitlines():
        case, what, number = re.fullmatch(r"(.{26}) (.{40}) here +([\d.]+)", line).groups()
        counts[case.strip(), what.strip()] = float(number)
    launches = [count for (_, what), count in counts.items() if what.endswith(", launches")]
    others = [count for (_, what), count in counts.items() if what.endswith(", other operations")]
    assert len(launches) == len(others) == 6 and min(launches) >= 2 and max(launches) <= 12 and not any(others)


@pytest.mark.skipif(not shutil.which("cc"), reason="the stub of the driver needs a C compiler")
def test_tritons_own_launcher_takes_operands_of_several_tensors():
    """Layers that share x, codes, and experts, on the launcher itself with a stub for the driver."""
    code = """
    import functools, tempfile
    from pathlib import Path
    from bench.gpu import host
    with tempfile.TemporaryDirectory() as folder:
        host.install(Path(folder))
        import ctypes, torch
        from nlora_kernels.backends import TABLE, Call, ExpertsCall
        from python_tests.triton import aot
        launches, triton = ctypes.c_int.in_dll(host.Stub, "launches"), TABLE["triton"]
        meta = functools.partial(torch.empty, device="meta")
        bf16 = functools.partial(meta, dtype=torch.bfloat16)
        layer = Call(bf16(64, 256), bf16(128, 256), bf16(16, 256), bf16(128, 16), bf16(16, 16), None, 0.5)
        stacks = (bf16(2, *t.shape) for t in layer[1:5])
        experts = ExpertsCall(layer.x, meta(2, dtype=torch.int32), *stacks)
        codes = aot.four_bits(256, 128, torch.bfloat16, meta)[1]
        calls = {
            "group": lambda: triton.forward_group([layer, layer._replace(bias=bf16(128))]),
            "codes": lambda: triton.forward(layer._replace(weight=codes)),
            "experts": lambda: triton.forward_experts(experts),
        }
        for name, call in calls.items():
            # Made again from the first.
            counts = []
            for _ in range(2):
                before = launches.value
                call()
                counts.append(launches.value - before)
            assert counts[0] == counts[1] > 0, (name, counts)
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr


class OnGpu:
    """As much of a tensor on a GPU as its counters look at."""

    is_cuda, device = True, torch.device("cpu")

    def __init__(self, index=0):
        self.index = index

    def get_device(self):
        return self.index


def test_counters_are_kept_by_stream_and_not_by_a_captured_graph(monkeypatch):
    launch = pytest.importorskip("nlora_kernels.backends.triton.launch")
    stream = [1]
    active = SimpleNamespace(get_current_stream=lambda index: stream[0])
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(launch, "_COUNTERS", {})
    monkeypatch.setattr(launch, "_PRIVATE", {})
    monkeypatch.setattr(launch, "PRIVATE", 4096)
    monkeypatch.setattr(launch, "_outlasting", lambda count, on, **_: torch.zeros(count, dtype=torch.int32))
    monkeypatch.setattr(launch, "capturing", lambda on: False)
    first = launch.counters(OnGpu(), 10)
    assert launch.counters(OnGpu(), 20) is first and not first.any()
    assert launch.counters(OnGpu(1), 10) is not first
    more = launch.counters(OnGpu(), 5000)
    assert more.numel() >= 5000 and launch.counters(OnGpu(), 10) is more
    stream[0] = 2
    assert launch.counters(OnGpu(), 10) is not more
    for stream[0] in range(1000):
        launch.counters(OnGpu(), 10)
    assert len(launch._COUNTERS) <= launch.STREAMS
    monkeypatch.setattr(launch, "capturing", lambda on: True)
    captured, other = launch.counters(OnGpu(), 10), launch.counters(OnGpu(), 1)
    assert captured.numel() >= 10 and other.numel() >= 1 and not captured.any()
    # Made before, in no capture, and of no other launch: a replay has nothing to fill.
    private = launch._PRIVATE[0].zeros
    for part, after in ((captured, other), (other, captured)):
        assert part.untyped_storage().data_ptr() == private.untyped_storage().data_ptr() and part.data_ptr() % 16 == 0
        assert part.data_ptr() + 4 * part.numel() <= after.data_ptr() or part.data_ptr() > after.data_ptr()
    # Where they are used up, or none were made before, they are the capture's own.
    assert launch.counters(OnGpu(), 5000).numel() == 5000 == launch.counters(OnGpu(7), 5000).numel()


def test_the_first_launch_of_a_kernel_is_refused_in_a_capture_before_triton_tries(monkeypatch):
    launch = pytest.importorskip("nlora_kernels.backends.triton.launch")
    launched = []

    class Kernel:
        compiled = SimpleNamespace(module=None)

        def warmup(self, grid, **arguments):
            return self.compiled

        def __getitem__(self, grid):
            return lambda **arguments: launched.append(arguments)

    kernel, on = Kernel(), torch.ones(1)
    launch.run(kernel, (1,), on, warps=4, M=3)
    monkeypatch.setattr(launch, "capturing", lambda on: True)
    with pytest.raises(RuntimeError, match="cannot capture the first launch of a kernel: make the call once"):
        launch.run(kernel, (1,), on, warps=4, M=3)
    assert len(launched) == 1
    kernel.compiled.module = 7
    launch.run(kernel, (1,), on, warps=4, M=3)
    assert len(launched) == 2


def test_a_capture_is_looked_for_on_the_device_of_the_tensor(monkeypatch):
    launch = pytest.importorskip("nlora_kernels.backends.triton.launch")
    current = [0]

    @contextlib.contextmanager
    def device_of(t):
        current.append(t.get_device())
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] == 1)
    assert launch.capturing(OnGpu(1)) and not launch.capturing(OnGpu(0)) and not launch.capturing(torch.ones(1))


def test_counters_outlast_the_thread_that_makes_them():
    launch = pytest.importorskip("nlora_kernels.backends.triton.launch")
    here, made_by = threading.get_ident(), []
    original = torch.zeros
    try:
        torch.zeros = lambda *a, **k: (made_by.append(threading.get_ident()), original(*a, **k))[1]
        counters = launch._outlasting(7, original(1))
    finally:
        torch.zeros = original
    assert made_by != [here] and counters.tolist() == [0] * 7
