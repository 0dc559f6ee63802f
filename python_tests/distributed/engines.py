"""The engines of data parallelism that people use, each as a way to train a model of adapters on some processes."""

import functools
import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import peft
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from nlora_kernels.layers import unfused
from nlora_kernels.lora2 import RankAllocator, orthogonal_penalty
from python_tests import training
from python_tests.peft.adapters import config
from python_tests.ranks import run as in_processes
from python_tests.tiny import counted_fusions, llama, perturb, tokens

# LoRA² with its penalty and its allocator too.
METHODS = ("lora", "slora", "nlora", "nlora_residual", "inttune", "inttune_residual", "lora2", "lora2_pruned")
# So many rows are one batch, on however many processes.
ROWS = 4
# What is trained is so many times the loss: an engine that clips gradients does so at every step then, and is seen.
FACTOR = 16


class Prepared(NamedTuple):
    """A model that an engine has taken, and how a step is made of a loss."""

    model: nn.Module
    backward: Callable[[Tensor], Any]
    step: Callable[[], Any]


def build(method: str, **options) -> nn.Module:
    torch.manual_seed(0)
    model = peft.get_peft_model(llama(), config(method.removesuffix("_pruned"), **options)).train()
    if method.startswith("lora2"):
        # From where it starts it hardly moves in so few steps, and no loss would tell right from wrong.
        perturb(model, 0.3)
    return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    # The root of its second moment divides what is rounding as readily as a gradient: eps keeps the two apart.
    return training.adamw(model.parameters(), eps=1e-4)


def one(model: nn.Module) -> Prepared:
    """A process alone."""
    return _with_optimizer(model, model)


def ddp(model: nn.Module) -> Prepared:
    return _with_optimizer(DistributedDataParallel(model), model)


def fsdp1(model: nn.Module, original: bool = True) -> Prepared:
    """With PEFT's policy, which makes every matrix that trains a unit of its own."""
    policy = peft.utils.other.fsdp_auto_wrap_policy(model)
    sharding = ShardingStrategy.FULL_SHARD
    options = {"auto_wrap_policy": policy, "use_orig_params": original, "sharding_strategy": sharding}
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)
    return _with_optimizer(wrapped, wrapped)


def fsdp2(model: nn.Module, replicas: int = 1, **options) -> Prepared:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if replicas > 1:
        shape = replicas, dist.get_world_size() // replicas
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards"))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return _with_optimizer(model, model)


def zero(model: nn.Module, stage: int, sharding: dict[str, int] | None = None, **options) -> Prepared:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # Where a compiler is it would build an all-reduce of its own first; gloo has one.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    sharding = {"stage": stage, "stage3_param_persistence_threshold": 0} | (sharding or {})
    settings = {"train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(), "zero_optimization": sharding}
    # Untold, it clips gradients to a norm of 1, as no other engine does.
    settings |= {"gradient_clipping": 0.0}
    settings |= {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True} | options
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=settings)
    return Prepared(engine, engine.backward, engine.step)


ENGINES: dict[str, Callable[[nn.Module], Prepared]] = {
    "ddp": ddp,
    "fsdp1": fsdp1,
    "fsdp1_flat": functools.partial(fsdp1, original=False),
    "fsdp2": fsdp2,
    "fsdp2_kept": functools.partial(fsdp2, reshard_after_forward=False),
    "fsdp2_offloaded": functools.partial(fsdp2, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "hsdp": functools.partial(fsdp2, replicas=2),
    **{f"zero{stage}": functools.partial(zero, stage=stage) for stage in (1, 2, 3)},
}


def _with_optimizer(prepared: nn.Module, model: nn.Module) -> Prepared:
    optimizer = optimizer_of(model)

    def step():
        optimizer.step()
        return optimizer

    return Prepared(prepared, Tensor.backward, step)


class Trained(NamedTuple):
    losses: Tensor
    # How often a layer and its adapter were one operation in a step.
    fused: float
    unfused: dict[str, str]
    ranks: dict[str, int] | None


def schedule(steps: int) -> dict[str, int]:
    return {"target_rank": 1, "total_steps": steps, "t_init": 0, "t_final": steps // 4, "delta_t": 1}


def train(engine: Callable[[nn.Module], Prepared], method: str, steps: int, rows: Tensor) -> Trained:
    model = build(method)
    prepared = engine(model)
    pruning = method.endswith("_pruned")
    allocator = RankAllocator(model, **schedule(steps)) if pruning else None
    losses = []
    with ExitStack() as stack:
        calls = stack.enter_context(counted_fusions())
        for _ in range(steps):
            loss = prepared.model(input_ids=rows, labels=rows).loss
            if pruning:
                loss = loss + training.PENALTY * orthogonal_penalty(model)
            prepared.backward(FACTOR * loss)
            optimizer = prepared.step()
            if pruning:
                allocator.step()
            if optimizer is not None:
                optimizer.zero_grad()
            losses.append(loss.detach())
    found = unfused(model)
    return Trained(torch.stack(losses), len(calls) / steps, found, allocator and allocator.ranks())


def _trained(rank: int, cells, steps: int) -> dict[tuple[str, str], Trained]:
    rows = tokens(batch=ROWS).chunk(dist.get_world_size())[rank]
    results = {}
    for engine, method in cells:
        found = train(ENGINES[engine], method, steps, rows)
        dist.all_reduce(found.losses)
        found.losses.div_(dist.get_world_size())
        results[engine, method] = found
    return results


def run(ranks: int, cells: list[tuple[str, str]], steps: int) -> dict[tuple[str, str], Trained]:
    """What training comes to on so many processes, the losses averaged over them."""
    return in_processes(_trained, ranks, cells, steps)


@functools.cache
def alone(method: str, steps: int) -> Trained:
    """What one process comes to on the whole batch."""
    return train(one, method, steps, tokens(batch=ROWS))
