"""What an engine keeps in parts, made whole by one sum, on four ranks: every way in which a tensor can lie on a mesh or
in a flat parameter."""

import functools

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from nlora_kernels.lora2 import flat, shards
from nlora_kernels.peft.lora2 import Diagonal
from python_tests.ranks import needs_gloo, run

RANKS = 4

pytestmark = needs_gloo


def values():
    generator = torch.Generator().manual_seed(0)
    # Fewer rows than ranks leave some ranks without any.
    return [torch.randn(shape, generator=generator) for shape in ((8,), (3, 5), (8, 4), (1, 7), (6, 6))]


def check(rank):
    line = init_device_mesh("cpu", (RANKS,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    ways = [(line, (Shard(0),)), (line, (Replicate(),)), (square, (Replicate(), Shard(0)))]
    ways += [(square, (Shard(0), Replicate())), (square, (Shard(0), Shard(0)))]
    for mesh, placements in ways:
        kept = [distribute_tensor(t, mesh, placements).requires_grad_() for t in values()]
        plain = torch.arange(3.0, requires_grad=True)
        with CommDebugMode() as counted:
            whole = shards.gathered([*kept, plain])
        assert counted.get_total_counts() == mesh.ndim, counted.get_comm_counts()
        assert whole[-1] is plain
        for t, expected in zip(whole[:-1], values(), strict=True):
            assert torch.equal(t, expected)
        with CommDebugMode() as counted:
            sum((t**3).sum() for t in whole).backward()
        assert not counted.get_total_counts()
        for t, expected in zip(kept, values(), strict=True):
            assert t.grad.placements == t.placements
            torch.testing.assert_close(t.grad.full_tensor(), 3 * expected**2)
        assert torch.equal(plain.grad, 3 * plain.detach() ** 2)
        shards.write(kept, [2 * t.detach() for t in whole[:-1]])
        for t, expected in zip(kept, values(), strict=True):
            assert torch.equal(t.detach().full_tensor(), 2 * expected)


def test_shards_are_gathered_by_one_sum_and_written_back():
    run(check, RANKS)


class Matrices(nn.Module):
    """LoRA²'s tensors as modules with a weight, each a unit of FSDP1, in a model that calls none of them."""

    def __init__(self):
        super().__init__()
        self.held = nn.ModuleList(Diagonal(t) for t in values())

    def forward(self, x):
        return 2 * x


def check_flat(rank):
    for strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD):
        for original in (True, False):
            options = {"sharding_strategy": strategy, "use_orig_params": original, "device_id": torch.device("cpu")}
            policy = functools.partial(lambda_auto_wrap_policy, lambda_fn=lambda module: isinstance(module, Diagonal))
            model = FullyShardedDataParallel(Matrices(), auto_wrap_policy=policy, **options)
            kept = [flat.Flattened(unit) for unit in model.module.held]
            with pytest.raises(ValueError, match="after a forward of the model"):
                shards.gathered(kept)
            model(torch.ones(1))
            plain = torch.arange(3.0)
            sharded = strategy is not ShardingStrategy.NO_SHARD
            with torch.no_grad(), CommDebugMode() as counted:
                whole = shards.gathered([*kept, plain])
            assert counted.get_total_counts() == sharded and whole[-1] is plain
            for t, found, expected in zip(kept, whole, values(), strict=False):
                assert t.shape == expected.shape and torch.equal(found, expected)
            assert all(len(t.values) for t in kept) and flat.gradients(kept) == [None] * len(kept)
            # Gradients of the last time are added to, unless they were dropped.
            for count, drops in ((1, False), (2, True), (1, False)):
                loss = model(torch.ones(1, requires_grad=True)).sum()
                (loss + sum((t**3).sum() for t in shards.gathered(kept))).backward()
                for found, expected in zip(flat.gradients(kept), values(), strict=True):
                    torch.testing.assert_close(found, count * 3 * expected**2)
                if drops:
                    model.zero_grad()
            shards.write(kept, [2 * t for t in values()])
            with torch.no_grad():
                for found, expected in zip(shards.gathered(kept), values(), strict=True):
                    assert torch.equal(found, 2 * expected)
            with FullyShardedDataParallel.summon_full_params(model):
                for holder, expected in zip(model.module.held, values(), strict=True):
                    assert torch.equal(holder.weight, 2 * expected)


def test_flat_parameters_are_gathered_by_one_sum_and_written_back():
    run(check_flat, RANKS)
