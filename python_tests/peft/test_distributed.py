"""Two processes, data-parallel: DDP and FSDP2 train as one process does and save the same checkpoint."""

import copy
import functools

import peft
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from nlora_kernels.checkpoint import WEIGHTS
from nlora_kernels.lora2 import RankAllocator
from nlora_kernels.peft import group
from nlora_kernels.peft.layer import FusedLinear
from python_tests import training
from python_tests.peft.adapters import config
from python_tests.ranks import needs_gloo, run
from python_tests.tiny import counted_fusions, llama, tokens

RANKS = 2
STEPS = 3
# LoRA² with its penalty and its allocator too, and NLoRA with layers that share x as one operation.
METHODS = ("slora", "nlora", "nlora_residual", "nlora_grouped", "inttune", "lora2", "lora2_pruned")
PARALLEL = ("ddp", "fsdp2_sharded", "fsdp2_whole", "fsdp2_by_linear")

pytestmark = needs_gloo


def train(model, ids, method, after_backward=lambda: None):
    # The last step freezes, so that what it takes is 0 in what is saved.
    schedule = {"target_rank": 1, "total_steps": STEPS, "t_init": 0, "t_final": 0, "delta_t": 1}
    allocator = RankAllocator(model, **schedule) if method == "lora2_pruned" else None
    return training.losses(model, ids, STEPS, training.adamw(model.parameters()), allocator, after_backward)


def build(method):
    torch.manual_seed(0)
    model = peft.get_peft_model(llama(), config(method.removesuffix("_pruned").removesuffix("_grouped"))).train()
    return group(model) if method.endswith("_grouped") else model


def batch():
    return tokens(batch=2 * RANKS)


def parallel(rank, folder):
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("fsdp",))
    ids = batch().chunk(RANKS)[rank]
    results = {}
    for method in METHODS:
        for kind in PARALLEL:
            model = build(method)
            target = folder / kind / method
            with counted_fusions() as calls:
                losses = RUN[kind](model, mesh, ids, target, method)
            dist.all_reduce(losses, dist.ReduceOp.SUM)
            results[kind, method] = losses / RANKS, len(calls)
    return results


def ddp(model, mesh, ids, target, method):
    losses = train(DistributedDataParallel(model), ids, method)
    model.save_pretrained(target, is_main_process=dist.get_rank() == 0)
    return losses


def fsdp2(model, mesh, ids, target, method, whole=False, by_linear=False):
    adapters = [p for name, p in model.named_parameters() if ".lora_" in name]
    ignored = {"ignored_params": set(adapters)} if whole else {}
    if by_linear:
        # Every base layer gathers its weight in its own forward, and only there.
        for module in [m for m in model.modules() if isinstance(m, FusedLinear)]:
            fully_shard(module.base_layer, mesh=mesh)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh, **ignored)
    fully_shard(model, mesh=mesh, **ignored)

    def average():
        for p in adapters:
            if whole and p.grad is not None:
                dist.all_reduce(p.grad, dist.ReduceOp.SUM)
                p.grad /= RANKS

    losses = train(model, ids, method, average)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    model.save_pretrained(target, state_dict=state, is_main_process=dist.get_rank() == 0)
    return losses


RUN = {
    "ddp": ddp,
    "fsdp2_sharded": fsdp2,
    "fsdp2_whole": functools.partial(fsdp2, whole=True),
    "fsdp2_by_linear": functools.partial(fsdp2, by_linear=True),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    return folder, run(parallel, RANKS, folder)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", PARALLEL)
def test_losses_and_checkpoint_are_those_of_one_process(kind, method, results, tmp_path):
    folder, runs = results
    model = build(method)
    untouched = copy.deepcopy(model.state_dict())
    losses, fused = runs[kind, method]
    torch.testing.assert_close(losses, train(model, batch(), method), rtol=1e-5, atol=1e-5)
    layers = sum(isinstance(module, FusedLinear) for module in model.modules())
    # Of a group's layers the output of the attention alone is fused by itself.
    alone = len(model.base_model.model.model.layers) if method == "nlora_grouped" else layers
    assert fused == (0 if kind == "fsdp2_by_linear" else STEPS * alone)
    model.save_pretrained(tmp_path)
    expected, actual = (load_file(path / WEIGHTS) for path in (tmp_path, folder / kind / method))
    assert expected.keys() == actual.keys()
    for name in expected:
        # One step of Adam is lr = 1e-2 wide, whatever the gradient: rounding must not turn a sign.
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-4)
    if method == "lora2_pruned":
        values = torch.cat([t.flatten() for name, t in actual.items() if "lora_E" in name])
        assert (values != 0).sum() == layers
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, untouched[name])]
    assert moved and all(".lora_" in name for name in moved)
