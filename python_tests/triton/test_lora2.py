"""LoRA² training by Triton: on a GPU, or in Triton's interpreter on the CPU where TRITON_INTERPRET=1 is set."""

import copy
import math

import pytest
import torch

import nlora_kernels as nk
from nlora_kernels.backends import TABLE
from nlora_kernels.lora2 import RankAllocator, orthogonal_penalty
from nlora_kernels.lora2 import allocator as rank_allocator
from nlora_kernels.lora2 import penalty as penalty_of_model
from python_tests.lora2 import test_training as equations

if reason := TABLE["triton"].unavailable():
    pytest.skip(f"{reason}; TRITON_INTERPRET=1 pytest {__file__} runs these tests", allow_module_level=True)

from nlora_kernels.backends.triton import allocator, device, launch, penalty  # noqa: E402

DEVICE = "cpu" if device.interpreted() else "cuda"
DTYPES = [torch.float32, torch.float16] + ([] if device.interpreted() else [torch.bfloat16])


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """Training by these kernels, while the layers themselves run as everywhere. Holds whether each call was taken."""
    calls = []

    def kernels(tensors, size=1):
        found = TABLE["triton"].lora2_training(tensors, size)
        calls.append(found is not None)
        return found

    for module in (rank_allocator, penalty_of_model):
        monkeypatch.setattr(module, "kernels", kernels)
    return calls


@pytest.fixture(params=["blocks", "small blocks"])
def blocks(request, monkeypatch):
    """Blocks so small that every loop of the kernels is taken."""
    if request.param == "small blocks":
        monkeypatch.setattr(allocator, "BLOCK", 16)
        monkeypatch.setattr(penalty, "BLOCK_N", 16)
        monkeypatch.setattr(penalty, "CHUNK", 32)


@pytest.mark.skipif(DEVICE != "cpu", reason="tests of a model on the CPU")
@pytest.mark.parametrize(
    "test",
    [
        lambda: equations.test_a_whole_run_equals_the_equations(0, "rows"),
        equations.test_a_masked_value_may_regrow_until_the_mask_is_frozen,
        equations.test_ties_go_to_the_earlier_layer_then_the_smaller_index,
        lambda: equations.test_a_non_finite_gradient_leaves_everything_as_it_was(math.nan, "rows", "lora_U", 3),
        lambda: equations.test_a_non_finite_gradient_leaves_everything_as_it_was(math.inf, "rows", "lora_E", 5),
        lambda: equations.test_steps_that_a_gradient_scaler_skips(False),
        lambda: equations.test_steps_that_a_gradient_scaler_skips(True),
        lambda: equations.test_the_penalty_of_orthogonal_vectors_and_its_gradient_are_zero("paper"),
        lambda: equations.test_the_penalty_of_orthogonal_vectors_and_its_gradient_are_zero("reference"),
    ],
    ids=["equations", "regrowth", "ties", "nan", "inf", "scaler", "scaler, clipped", "zero, paper", "zero, reference"],
)
def test_what_holds_on_the_cpu(test, blocks, taken):
    test()
    assert taken and all(taken)


def net(ranks=equations.RANKS, **options):
    return equations.net(ranks=ranks, **options).to(DEVICE)


def allocator_of(model, **changed):
    return RankAllocator(model, **{**equations.SCHEDULE, **changed})


def fill_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for layer in model.layers:
        layer.lora_E.data += 0.1
        for t in (layer.lora_E, layer.lora_u, layer.lora_U):
            t.grad = torch.randn(t.shape, generator=generator).to(t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_equal_those_of_pytorch(dtype, blocks, taken, monkeypatch):
    # More values than a block holds.
    ranks = [(17, 3), (4, 4), (32, 20), (1, 1)] * (allocator.BLOCK // 54 + 2)
    model = net(ranks=ranks).to(dtype)
    twin = copy.deepcopy(model)
    ours, theirs = (
        allocator_of(m, target_rank=4, total_steps=8, t_init=1, t_final=3, delta_t=2) for m in (model, twin)
    )
    for step in range(5):
        for m in (model, twin):
            fill_gradients(m, step)
            m.layers[5].lora_u.grad = None
            # Equal scores at any threshold.
            for layer in m.layers[6:16]:
                for t in (layer.lora_E, layer.lora_u, layer.lora_U):
                    t.grad = None
        budget = ours.step()
        assert all(taken)
        with monkeypatch.context() as patch:
            patch.setattr(rank_allocator, "kernels", lambda *_: None)
            assert theirs.step() == budget
        torch.testing.assert_close(ours.exp_avg, theirs.exp_avg, rtol=1e-6, atol=0)
        torch.testing.assert_close(ours.exp_unc, theirs.exp_unc, rtol=1e-5, atol=1e-9)
        assert ours.ranks() == theirs.ranks()
        for layer, other in zip(model.layers, twin.layers, strict=True):
            assert torch.equal(layer.lora_E, other.lora_E) and torch.equal(layer.lora_mask, other.lora_mask)
    assert sum(ours.ranks().values()) == 4 * len(ranks) and ours._progress == 0


def test_the_flag_stays_on_the_device_until_the_next_masking(monkeypatch):
    monkeypatch.setattr(RankAllocator, "_reports_at_once", False)
    model = net()
    allocator = allocator_of(model)

    def step(seed, value=None):
        fill_gradients(model, seed)
        if value is not None:
            model.layers[2].lora_u.grad[1, 2] = value
        return allocator.step()

    for seed in range(3):
        step(seed)
    scores = allocator.importance()
    # Every layer's averages are taken back, not only those of the layer at fault.
    assert step(3, math.nan) == allocator.budget(4)
    equations.assert_same(allocator.importance(), scores)
    step(4)
    before = copy.deepcopy([dict(model.state_dict()), allocator.importance(), allocator.t])
    fill_gradients(model, 5)
    E = [layer.lora_E.data.clone() for layer in model.layers]
    with pytest.raises(nk.lora2.NonFiniteGradientError, match="1 step"):
        allocator.step()
    equations.assert_same([allocator.importance(), allocator.t], before[1:])
    assert all(torch.equal(layer.lora_E, e) for layer, e in zip(model.layers, E, strict=True))
    assert allocator.step() == allocator.budget(6)


def test_the_scores_of_the_first_rank_decide(monkeypatch):
    model = net()
    first = torch.arange(19.0).to(DEVICE)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda scores, **_: scores.copy_(first))
    allocator = allocator_of(model, t_init=0, t_final=1, total_steps=2, target_rank=1)
    allocator.group = object()
    fill_gradients(model, 0)
    allocator.step()
    kept = torch.cat([layer.lora_mask for layer in model.layers])
    assert kept.tolist() == [0] * 15 + [1] * 4


def vectors(shapes, dtype):
    model = equations.Net(ranks=[(1, 1)] * len(shapes))
    generator = torch.Generator().manual_seed(0)
    for layer, (n_in, n_out, r, k) in zip(model.layers, shapes, strict=True):
        sizes = {"lora_v": (k, n_in), "lora_u": (r, k), "lora_V": (n_out, k), "lora_U": (k, r)}
        for name, size in sizes.items():
            values = 0.3 * torch.randn(size, generator=generator)
            setattr(layer, name, torch.nn.Parameter(values.to(DEVICE, dtype)))
    return model


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("form", ["paper", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_penalties_equal_autograd_through_their_definitions(form, dtype, blocks, taken):
    model = vectors([(70, 33, 5, 3), (1, 100, 2, 7), (40, 40, 20, 17), (64, 700, 8, 8)], dtype)
    exact = copy.deepcopy(model).double()
    expected = equations.penalty_by_definition(exact, form)
    (0.3 * expected).backward()
    with torch.autocast(DEVICE, torch.bfloat16):
        value = orthogonal_penalty(model, form)
        (0.3 * value).backward()
    assert all(taken) and value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    tolerance = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        if name.split(".")[-1] in ("lora_v", "lora_u", "lora_U", "lora_V"):
            assert p.grad.dtype == dtype and p.grad.is_contiguous()
            scale = q.grad.abs().max()
            torch.testing.assert_close(p.grad.double() / scale, q.grad / scale, rtol=0, atol=tolerance)


def test_results_repeat_bitwise():
    results = []
    for _ in range(2):
        model = vectors([(300, 40, 8, 8)] * 3, torch.float32)
        value = orthogonal_penalty(model)
        value.backward()
        results.append([value, *(layer.lora_v.grad for layer in model.layers)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_is_left_to_pytorch():
    takes = TABLE["triton"].lora2_training
    t = torch.zeros(4, 3, device=DEVICE)
    assert takes([t, t], 32).smooth is allocator.smooth
    assert takes([t, t], 33) is None
    assert takes([t, t.half()]) is None
    assert takes([t, t.T]) is None
    assert takes([t.double()]) is None
    assert takes([t.to("meta")]) is None
    # Its sign is a flag, which an address does not tell.
    assert takes([t, torch._neg_view(t)]) is None


def test_the_backend_in_the_environment_decides(monkeypatch, prefer):
    from nlora_kernels.lora2.kernels import kernels

    t = torch.zeros(4, 3, device=DEVICE)
    ours = TABLE["triton"].lora2_training([t])
    assert kernels([t]) != ours
    prefer("triton")
    assert kernels([t]) == ours
    prefer("reference")
    assert kernels([t]) is None


def test_in_the_capture_of_a_graph_pytorch_takes_over_and_no_table_leaves_the_host(taken, monkeypatch):
    model = torch.nn.Sequential(nk.LoRA2Linear.from_linear(torch.nn.Linear(24, 18, device=DEVICE), r=4, k=5))
    tensors = [t for layer in model for t in (layer.lora_v, layer.lora_u, layer.lora_V, layer.lora_U)]
    expected = orthogonal_penalty(model)
    gradients = torch.autograd.grad(expected, tensors)
    value, saved = penalty.penalty([t.detach() for t in tensors], True, 1.0)
    begun_outside = orthogonal_penalty(model)
    monkeypatch.setattr(launch, "capturing", lambda on: True)
    taken.clear()
    captured = orthogonal_penalty(model)
    assert taken == [False]
    torch.testing.assert_close(captured, expected)
    for begun in (captured, begun_outside):
        for actual, gradient in zip(torch.autograd.grad(begun, tensors), gradients, strict=True):
            torch.testing.assert_close(actual, gradient)
    E, averages = model[0].lora_E.detach(), torch.zeros(2, 4, device=DEVICE)
    where, kept = torch.zeros(4, 1, dtype=torch.int64, device=DEVICE), torch.zeros(4, dtype=torch.bool, device=DEVICE)
    flags = {name: torch.zeros((), dtype=torch.int64, device=DEVICE) for name in ("nonfinite", "progress")}
    u, U, before = model[0].lora_u.detach(), model[0].lora_U.detach(), E.clone()
    for call in (
        lambda: penalty.penalty(tensors, True, 1.0),
        lambda: penalty.penalty_backward(tensors, saved, value),
        lambda: allocator.smooth([4, 5], [E, u, U], [E, u, U], *averages, 0.9, 0.9, **flags, hold=False),
        lambda: allocator.prune([E], [], *averages, where, where.float(), None, kept, 1),
    ):
        with pytest.raises(RuntimeError, match="a CUDA graph cannot capture this call"):
            call()
    assert torch.equal(E, before)
