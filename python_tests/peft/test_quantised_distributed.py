"""Two processes and a base of four bits: DDP and FSDP2 train its adapters as one process does."""

import functools

import peft
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from nlora_kernels.layers import unfused
from nlora_kernels.peft.layer import FusedLinear
from python_tests.peft.adapters import config
from python_tests.peft.test_distributed import RANKS, STEPS, batch, train
from python_tests.peft.test_quantised import tiny_nf4
from python_tests.ranks import needs_gloo, run
from python_tests.tiny import counted_fusions, perturb

pytestmark = needs_gloo
METHODS = ("slora", "nlora_residual", "lora2")
# How FSDP2 keeps the codes: as bytes, and as `bnb_4bit_quant_storage` says, in the dtype of the other parameters.
STORED = {"ddp": torch.uint8, "fsdp2_bytes": torch.uint8, "fsdp2": torch.float32, "fsdp2_by_linear": torch.float32}


def build(method, kind):
    torch.manual_seed(0)
    model = peft.prepare_model_for_kbit_training(tiny_nf4(quant_storage=STORED[kind]), use_gradient_checkpointing=False)
    model = peft.get_peft_model(model, config(method)).train()
    perturb(model, 0.01)
    return model


def adapter(model) -> dict[str, torch.Tensor]:
    named = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in named.items()}


def sharded(model, mesh, by_linear):
    if by_linear:
        # Every base layer gathers its codes in its own forward, and only there.
        for module in [m for m in model.modules() if isinstance(m, FusedLinear)]:
            fully_shard(module.base_layer, mesh=mesh)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def parallel(rank):
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("fsdp",))
    ids, results = batch().chunk(RANKS)[rank], {}
    for method in METHODS:
        for kind in STORED:
            model = build(method, kind)
            if kind == "ddp":
                whole = DistributedDataParallel(model)
            else:
                whole = sharded(model, mesh, kind == "fsdp2_by_linear")
                codes = [p for name, p in model.named_parameters() if name.endswith("base_layer.weight")]
                assert all(type(p).__name__ == "DTensor" and p.to_local().numel() < p.numel() for p in codes)
            with counted_fusions() as calls:
                losses = train(whole, ids, method)
            dist.all_reduce(losses, dist.ReduceOp.SUM)
            results[kind, method] = losses / RANKS, adapter(model), len(calls), set(unfused(model).values())
    return results


@pytest.fixture(scope="module")
def results():
    pytest.importorskip("bitsandbytes")
    return run(parallel, RANKS)


@functools.cache
def alone(method):
    model = build(method, "ddp")
    return train(model, batch(), method), adapter(model), sum(isinstance(m, FusedLinear) for m in model.modules())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", STORED)
def test_losses_and_adapters_are_those_of_one_process(kind, method, results):
    losses, trained, fused, reasons = results[kind, method]
    expected_losses, expected, layers = alone(method)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-5)
    for name, t in expected.items():
        # One step of Adam is lr = 1e-2 wide, whatever the gradient: rounding must not turn a sign.
        torch.testing.assert_close(trained[name], t, rtol=1e-4, atol=1e-4)
    assert fused == (0 if kind == "fsdp2_by_linear" else STEPS * layers)
    if kind == "fsdp2_by_linear":
        assert reasons == {"its type is FSDPLinear4bit, not nn.Linear or Conv1D"}
