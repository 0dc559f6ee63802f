"""Adapters on several processes: every engine comes to the losses of one process, and its layers are fused."""

import functools
import importlib.util

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from nlora_kernels.layers import unfused
from nlora_kernels.layers.engines import is_unit
from nlora_kernels.lora2 import RankAllocator, compress, orthogonal_penalty, zero
from nlora_kernels.peft.layer import FusedLinear
from python_tests.distributed import engines
from python_tests.distributed.engines import ENGINES, METHODS
from python_tests.ranks import needs_gloo, run
from python_tests.tiny import tokens

pytestmark = needs_gloo

# What the suite tries, on two processes; DDP and FSDP2 have python_tests/peft/test_distributed.py.
QUICK = [("fsdp1", "nlora_residual"), ("fsdp1", "lora2_pruned"), ("fsdp1_flat", "lora2_pruned")]
QUICK += [("fsdp2_offloaded", "lora2_pruned")]
QUICK += [(engine, method) for engine in ("zero2", "zero3") for method in ("nlora_residual", "lora2_pruned")]
QUICK_STEPS, STEPS = 4, 20


def needs(engine: str, ranks: int) -> str | None:
    """Why an engine cannot be tried, if it cannot."""
    if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        return "needs DeepSpeed (make zero)"
    return "needs four processes" if engine == "hsdp" and ranks < 4 else None


def check(engine: str, method: str, found: engines.Trained, steps: int) -> None:
    expected = engines.alone(method, steps)
    torch.testing.assert_close(found.losses, expected.losses, rtol=2e-5, atol=2e-5)
    assert found.losses[-1] < found.losses[0] - 1e-3
    assert found.ranks == expected.ranks
    layers = sum(isinstance(module, FusedLinear) for module in engines.build(method).modules())
    assert (found.fused, found.unfused) == (layers, {})


@pytest.fixture(scope="module")
def quick():
    cells = [cell for cell in QUICK if needs(cell[0], 2) is None]
    return engines.run(2, cells, QUICK_STEPS)


@pytest.mark.parametrize("engine, method", QUICK)
def test_two_processes_come_to_what_one_does(engine, method, quick):
    if reason := needs(engine, 2):
        pytest.skip(reason)
    check(engine, method, quick[engine, method], QUICK_STEPS)


# FSDP's own: what is sharded is fp32, what is gathered and multiplied bf16, and gradients are summed in fp32.
MIXED = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}


def _in_mixed_precision(rank, methods):
    rows = tokens(batch=engines.ROWS).chunk(dist.get_world_size())[rank]
    found = {}
    for method in methods:
        found[method] = engines.train(functools.partial(engines.fsdp2, **MIXED), method, QUICK_STEPS, rows)
        dist.all_reduce(found[method].losses)
        found[method].losses.div_(dist.get_world_size())
    return found


def test_mixed_precision_rounds_on_two_processes_as_on_one():
    methods = ("nlora_residual", "lora2_pruned")
    one, two = (run(_in_mixed_precision, ranks, methods) for ranks in (1, 2))
    for method in methods:
        exact = engines.alone(method, QUICK_STEPS)
        rounded, found = one[method].losses, two[method].losses
        off = (rounded - exact.losses).abs().max()
        assert off > 0 and found.dtype == exact.losses.dtype
        assert (found - exact.losses).abs().max() <= 2 * off + torch.finfo(torch.bfloat16).eps
        assert (two[method].fused, two[method].unfused) == (exact.fused, {})


def _hook_on_a_unit(rank):
    model = engines.fsdp1(engines.build("lora")).model
    unit = next(module for name, module in model.named_modules() if name.endswith("q_proj.lora_B.default"))
    seen = []
    unit.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model(input_ids=tokens(batch=2, length=9))
    assert is_unit(unit) and seen == [(2, 9, 32)]
    [reason] = unfused(model).values()
    assert reason.endswith("cannot be fused: it has hooks")


def test_hook_on_a_unit_of_fsdp1_sees_what_the_matrix_gives():
    run(_hook_on_a_unit, 1)


def _refused(rank):
    model = engines.build("lora2")
    blocks = ModuleWrapPolicy({type(model.base_model.model.model.layers[0])})
    FullyShardedDataParallel(model, auto_wrap_policy=blocks, use_orig_params=True, device_id=torch.device("cpu"))
    for use in (orthogonal_penalty, lambda model: RankAllocator(model, **engines.schedule(8))):
        with pytest.raises(ValueError, match="a unit of FSDP1 .* by itself, .* got lora_E of .*q_proj flattened with"):
            use(model)
    for engine in (engines.fsdp1, engines.fsdp2):
        model = engines.build("lora2")
        engine(model)
        with pytest.raises(ValueError, match="must be whole on every rank, got an engine's shards on .*q_proj"):
            compress(model)


def test_what_no_engine_can_do_is_refused_by_name():
    run(_refused, 1)


def _mask_in_half_precision(rank):
    rows = tokens(batch=engines.ROWS).chunk(2)[rank]
    for stage in (2, 3):
        model = engines.build("lora2").bfloat16()
        prepared = engines.zero(model, stage, bf16={"enabled": True})
        from deepspeed.utils import safe_get_full_fp32_param

        allocator = RankAllocator(model, **engines.schedule(8))
        E = [parameter for name, parameter in model.named_parameters() if "lora_E" in name]
        for _ in range(3):
            prepared.backward(prepared.model(input_ids=rows, labels=rows).loss)
            prepared.step()
            before = torch.cat([safe_get_full_fp32_param(t) for t in E])
            allocator.step()
            after = torch.cat([safe_get_full_fp32_param(t) for t in E])
            kept = allocator._kept
            assert 0 < kept.sum() < kept.numel() and (before != before.bfloat16()).any()
            assert torch.equal(after, before * kept)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
def test_masks_leave_the_optimizers_copy_its_bits():
    run(_mask_in_half_precision, 2)


def test_refused_allocator_puts_no_hook_on_a_parameter(monkeypatch):
    monkeypatch.setattr(zero, "owns", lambda t: True)
    model = engines.build("lora2")
    with pytest.raises(ValueError, match="target_rank must be at most"):
        RankAllocator(model, **engines.schedule(8) | {"target_rank": 99})
    assert not any(parameter._backward_hooks for parameter in model.parameters())
    RankAllocator(model, **engines.schedule(8))
    assert any(parameter._backward_hooks for parameter in model.parameters())


def test_gradients_of_steps_that_score_nothing_are_not_kept(monkeypatch):
    monkeypatch.setattr(zero, "owns", lambda t: True)
    model = engines.build("lora2")
    allocator = RankAllocator(model, **engines.schedule(8))
    start, rows = allocator.state_dict(), tokens(batch=1)

    def backward():
        model(input_ids=rows, labels=rows).loss.backward()

    allocator.t = allocator.total_steps - allocator.t_final
    backward()
    allocator.step()
    assert not allocator._gradients._sums
    backward()
    assert allocator._gradients._sums
    allocator.load_state_dict(start)
    assert not allocator._gradients._sums


def test_value_written_keeps_the_bits_it_has_no_room_for():
    master = torch.tensor([1 + 2**-20, -3 - 2**-15, 2**-30, 5.0])
    kept = torch.tensor([1.0, 0.0, 1.0, 1.0])
    value = master.bfloat16() * kept.bfloat16()
    assert torch.equal(zero._changed(master, value), master * kept)
    value[3] = 6
    assert zero._changed(master, value)[3] == 6


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_method_under_every_engine(engine, ranks, every_engine):
    if reason := needs(engine, ranks):
        pytest.skip(reason)
    found = engines.run(ranks, [(engine, method) for method in METHODS], STEPS)
    for method in METHODS:
        check(engine, method, found[engine, method], STEPS)
