"""Layers that share x on Triton against fp64: on a GPU, or in the interpreter where TRITON_INTERPRET=1 is set."""

import pytest
import torch

from nlora_kernels import testing
from nlora_kernels.backends import TABLE, Call, Dropout, Needs
from python_tests.ops import test_group as cases
from python_tests.ops.test_group import apart, ours

# The interpreter has to be chosen before triton is imported, and then holds for the whole process.
if TABLE["triton"].unavailable():
    reason = f"{TABLE['triton'].unavailable()}; `TRITON_INTERPRET=1 pytest {__file__}` runs these tests"
    pytest.skip(reason, allow_module_level=True)

from nlora_kernels.backends.triton import device, group, launch  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_plans")
DEVICE = "cpu" if device.interpreted() else "cuda"
DTYPES = [torch.float32, torch.float16] + ([] if device.interpreted() else [torch.bfloat16])


def problem(*args, **options):
    tensors, dys = cases.problem(*args, **options)
    return {name: t.to(DEVICE) for name, t in tensors.items()}, torch.cat(dys, -1).to(DEVICE)


def check(tensors, dy, count, scalings, wrt=None):
    budget = testing.Budget(apart(count, scalings), apart(count, [0.0] * count), tensors, dy, wrt)
    budget.check(testing.outputs(ours(count, scalings, backend="triton"), tensors, dy, wrt))


def launched(monkeypatch):
    """The names of the kernels that are launched."""
    names, run = [], launch.run
    monkeypatch.setattr(launch, "run", lambda kernel, *a, **k: names.append(kernel.fn.__name__) or run(kernel, *a, **k))
    return names


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("capability", [80, 90], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_within_the_error_budget(small_tiles, monkeypatch, capability, dtype):
    small_tiles(capability=capability)
    names = launched(monkeypatch)
    # Rows of the first two are aligned, of the last they are not; then layers without adapter, core or bias.
    for Ns, M, K, ranks in (((48, 16, 16), 40, 32, None), ((40, 8), 17, 16, (8, 24)), ((37, 12, 9), 19, 25, (3, 0, 7))):
        which = [bool(i % 2) for i in range(len(Ns))]
        options = {"M": M, "K": K, "ranks": ranks, "dtype": dtype, "adapter": dtype if M == 17 else torch.float32}
        tensors, dy = problem(Ns, **options, cores=True if ranks is None else which, biases=which)
        names.clear()
        check(tensors, dy, len(Ns), [0.7] * len(Ns))
        assert names.count("extended_group") == 1 and names.count("extended_sum") == 1
        assert "extended_product" not in names and "single_launch" not in names


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("seed", range(10))
def test_random_groups(seed):
    _, count, scalings, tensors, dy, wrt = cases.configuration(seed)
    if dy.dtype not in DTYPES:
        dy, tensors = dy.float(), {name: t.float() for name, t in tensors.items()}
    if seed % 2:
        scalings = scalings[:1] * count
    tensors = {name: t.to(DEVICE) for name, t in tensors.items()}
    check(tensors, dy.to(DEVICE), count, scalings, wrt)


def test_what_is_not_taken_together_is_computed_apart(monkeypatch):
    tensors, dy = problem((16, 8), ranks=(4, 4))
    calls = [
        Call(tensors["x"], tensors[f"weight{i}"], tensors[f"lora_A{i}"], tensors[f"lora_B{i}"], scaling=0.7)
        for i in range(2)
    ]
    assert group.takes(calls)
    apart = [
        calls[:1],
        [calls[0], calls[1]._replace(scaling=0.5)],
        [calls[0], calls[1]._replace(dropout=Dropout(0.5, torch.tensor(1, device=DEVICE)))],
        [call._replace(lora_A=None, lora_B=None) for call in calls],
        [call._replace(lora_A=call.lora_A.repeat(40, 1), lora_B=call.lora_B.repeat(1, 40)) for call in calls],
    ]
    names = launched(monkeypatch)
    for each in apart:
        assert not group.takes(each)
        results = TABLE["triton"].forward_group(each)
        needs = [
            Needs(True, *[call.lora_A is not None and flag for flag in (False, True, True, False, False)])
            for call in each
        ]
        TABLE["triton"].backward_group(each, list(dy.split([16, 8], 1))[: len(each)], [T for _, T in results], needs)
    assert not {"extended_group", "extended_sum"} & set(names)
    check(tensors, dy, 2, [0.7, -0.5])


@pytest.mark.parametrize("capability, together", [(80, 1), (90, 0)])
def test_layers_are_computed_apart_where_triton_cannot_launch_descriptors_of_several(
    small_tiles, monkeypatch, capability, together
):
    small_tiles(capability=capability)
    monkeypatch.setattr(launch, "nests_descriptors", lambda: False)
    names = launched(monkeypatch)
    check(*problem((16, 48), M=40, K=32, dtype=torch.float16), 2, [0.7, 0.7])
    assert names.count("extended_group") == names.count("extended_sum") == together


def test_x_is_read_once_for_all_ranks(monkeypatch):
    tensors, dy = problem((16, 8, 8), ranks=(4, 4, 8))
    names = launched(monkeypatch)
    with torch.no_grad():
        ours(3, [0.7] * 3, backend="triton")(**tensors)
    assert names.count("narrow_product") == 1 and names.count("extended_group") == 1


def test_results_repeat_bitwise():
    tensors, dy = problem((48, 16, 16), M=70, K=64)
    function = ours(3, [0.7] * 3, backend="triton")
    first, second = (testing.outputs(function, tensors, dy) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
