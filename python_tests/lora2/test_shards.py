"""DTensors made whole by one sum, on four ranks: every way in which a tensor can lie on a mesh."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from nlora_kernels.lora2 import shards
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
