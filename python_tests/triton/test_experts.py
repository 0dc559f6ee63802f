"""lora_grouped_linear on Triton against fp64: on a GPU, or in the interpreter where TRITON_INTERPRET=1 is set."""

import functools

import pytest
import torch

from nlora_kernels import testing
from nlora_kernels.backends import TABLE, ExpertsCall, Needs
from python_tests.ops import test_experts as cases
from python_tests.ops.test_experts import COUNTS, budget_of, short

# The interpreter has to be chosen before triton is imported, and then holds for the whole process.
if TABLE["triton"].unavailable():
    reason = f"{TABLE['triton'].unavailable()}; `TRITON_INTERPRET=1 pytest {__file__}` runs these tests"
    pytest.skip(reason, allow_module_level=True)

from nlora_kernels.backends.triton import device, experts, launch  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_plans")
DEVICE = "cpu" if device.interpreted() else "cuda"
DTYPES = [torch.float32, torch.float16] + ([] if device.interpreted() else [torch.bfloat16])


def problem(*args, **options):
    offsets, tensors, dy = cases.problem(*args, **options)
    return offsets.to(DEVICE), {name: t.to(DEVICE) for name, t in tensors.items()}, dy.to(DEVICE)


def results(offsets, tensors, dy, wrt=None):
    return testing.outputs(cases.ours(offsets, backend="triton"), tensors, dy, wrt)


def call_of(offsets, tensors):
    names = ("weight", "lora_A", "lora_B", "lora_N", "bias")
    return ExpertsCall(tensors["x"], offsets, *(tensors.get(name) for name in names), 0.7)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_results_are_within_the_error_budget(counts, dtype):
    for core, bias, wide, tail in ((True, True, False, 0), (False, False, True, 3)):
        adapter = torch.float32 if wide else None
        offsets, tensors, dy = problem(counts, dtype, core=core, bias=bias, adapter=adapter, tail=tail)
        budget_of(offsets, tensors, dy).check(results(offsets, tensors, dy))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("seed", range(16))
def test_random_experts(seed, small_tiles):
    # In turn the tiles of the rule and small ones, by pointers and by descriptors, which need aligned rows.
    if seed % 3:
        small_tiles(capability=(80, 90)[seed % 2])
    said, ours, plain, base, tensors, dy, wrt = cases.configuration(seed, DTYPES, 8 if seed % 3 else 1, DEVICE)
    print(said)
    budget = testing.Budget(plain, base, tensors, dy, wrt)
    budget.check(testing.outputs(functools.partial(ours, backend="triton"), tensors, dy, wrt))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("capability", [80, 90], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("splits", [1, 3])
def test_every_form_of_launch(small_tiles, capability, splits):
    small_tiles(capability=capability, splits=splits)
    # The strides of the first sizes allow descriptors, those of the others do not.
    for sizes in ((48, 32, 24), (25, 37, 13)):
        offsets, tensors, dy = problem((17, 0, 1, 50, 16), torch.float16, *sizes, tail=2)
        budget_of(offsets, tensors, dy).check(results(offsets, tensors, dy))


@pytest.mark.parametrize("sizes", [(40, 24, 257), (1, 1, 1), (33, 1, 2), (1, 20, 40)], ids=str)
def test_the_edges_of_sizes_and_ranks(sizes):
    offsets, tensors, dy = problem((3, 0, 20), torch.float32, *sizes)
    budget_of(offsets, tensors, dy).check(results(offsets, tensors, dy))


@pytest.mark.parametrize("capability", [80, 90], ids=["pointers", "descriptors"])
def test_any_strides_are_read_in_place(small_tiles, capability, monkeypatch):
    small_tiles(capability=capability)
    offsets, tensors, dy = problem((3, 0, 20, 40), torch.float32, 32, 48, 8)
    expected = testing.outputs(cases.ours(offsets, backend="reference"), tensors, dy)
    # Weights kept as (experts, in, out), lora_B as PEFT packs it, (out, r · experts), and every second of the offsets.
    views = dict(tensors, x=torch.cat([tensors["x"]] * 2, 1)[:, :32])
    views["weight"] = tensors["weight"].transpose(1, 2).contiguous().transpose(1, 2)
    views["lora_B"] = tensors["lora_B"].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    of_weight = []
    known = launch.TensorDescriptor.from_tensor

    def from_tensor(t, block):
        of_weight.append(t.data_ptr() == views["weight"].data_ptr())
        return known(t, block)

    monkeypatch.setattr(launch.TensorDescriptor, "from_tensor", staticmethod(from_tensor))
    spread = torch.stack([offsets, offsets + 1000], 1)[:, 0]
    call = call_of(spread, views)
    y, T = experts.forward(call)
    grads = experts.backward(call, dy.T.contiguous().T, T, Needs(*[True] * 6))
    actual = {"y": y} | {f"d{name}": grad for name, grad in zip(testing.TENSORS, grads, strict=True)}
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-4)
    # Read the other way round, a transposed weight has descriptors too.
    assert any(of_weight) == (capability == 90)


@pytest.mark.parametrize("needed", testing.TENSORS)
def test_each_gradient_alone(needed):
    offsets, tensors, dy = problem(COUNTS["ragged"])
    call = call_of(offsets, tensors)
    _, T = experts.forward(call)
    expected = testing.outputs(cases.ours(offsets, backend="reference"), tensors, dy)[f"d{needed}"]
    kept = call._replace(x=call.x if needed in ("lora_A", "weight") else None, bias=None)
    T = T if needed in ("lora_B", "lora_N") else None
    grads = experts.backward(kept, dy, T, Needs(*(name == needed for name in testing.TENSORS)))
    for name, grad in zip(testing.TENSORS, grads, strict=True):
        if name == needed:
            torch.testing.assert_close(grad, expected)
        else:
            assert grad is None


def test_the_launches_are_as_many_whatever_the_experts(monkeypatch):
    launches, run = [], launch.run

    def counted(kernel, *args, **options):
        launches.append(kernel.fn.__name__)
        return run(kernel, *args, **options)

    monkeypatch.setattr(launch, "run", counted)
    # And nothing asks the device how many rows an expert has.
    monkeypatch.setattr(ExpertsCall, "experts", property(lambda call: pytest.fail("the host waits for the offsets")))
    for counts in ((5,), (3, 0, 1, 9), (1,) * 20):
        offsets, tensors, dy = problem(counts)
        call = call_of(offsets, tensors)
        launches.clear()
        _, T = TABLE["triton"].forward_experts(call)
        assert launches == ["narrow_experts", "extended_experts"]
        launches.clear()
        TABLE["triton"].backward_experts(call, dy, T, Needs(True, False, True, True, True, False))
        assert launches.count("narrow_experts") == 2 and launches.count("expert_sums") == 3
        assert set(launches) <= {"narrow_experts", "extended_experts", "expert_sums", "sum_slices"}


def test_results_repeat_bitwise():
    offsets, tensors, dy = problem((30, 0, 70, 3), K=64, N=48, R=8)
    first, second = (results(offsets, tensors, dy) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("wrong", [[3, 2, 5, 5], [0, 0, 900, 900], [-7, 2, 5, 5], [5, 0, 0, 5]], ids=str)
def test_whatever_the_offsets_no_row_outside_is_touched(monkeypatch, wrong):
    _, tensors, dy = problem((1, 1, 2, 1))
    buffers, empty = [], torch.empty

    def guarded(*shape, dtype, device):
        size = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        count = torch.Size(size).numel()
        buffers.append(torch.full((count + 8192,), 7, dtype=dtype, device=device))
        return buffers[-1][4096 : 4096 + count].view(size)

    call = call_of(torch.tensor(wrong, dtype=torch.int32, device=DEVICE), tensors)
    monkeypatch.setattr(experts.torch, "empty", guarded)
    _, T = experts.forward(call)
    experts.backward(call, dy, T, Needs(*[True] * 6))
    monkeypatch.setattr(experts.torch, "empty", empty)
    assert len(buffers) > 8
    for buffer in buffers:
        assert (buffer[:4096] == 7).all() and (buffer[-4096:] == 7).all()
