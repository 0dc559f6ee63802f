"""The bytes that examples/recipes/traffic.py has of a step are those that the collectives of a step are given."""

import collections
import functools
import importlib.util
import itertools
import sys

import peft
import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nlora_kernels.lora2 import RankAllocator, orthogonal_penalty
from python_tests import ROOT
from python_tests.distributed import engines
from python_tests.peft.adapters import config
from python_tests.ranks import needs_gloo, run
from python_tests.tiny import llama, tokens

sys.path.insert(0, str(ROOT / "examples"))
from recipes import traffic  # noqa: E402

pytestmark = needs_gloo

# {operator: (collective, which of its arguments is the whole tensor, in lists of parts it may be)}
KINDS = {
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "allreduce_": ("all_reduce", 0),
    "all_reduce": ("all_reduce", 0),
    "broadcast_": ("broadcast", 0),
}
# Those that send nothing.
SILENT = ("wait_tensor", "_wrap_tensor_autograd")


class Counted(TorchDispatchMode):
    """Bytes of the whole tensors that collectives are given."""

    def __init__(self):
        super().__init__()
        self.bytes: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(hasattr(kind, "device_mesh") for kind in types):
            return NotImplemented
        name = func._schema.name.partition("::")[2]
        if func.namespace in ("c10d", "_c10d_functional") and name not in SILENT:
            # A collective that is not known here must not pass for none.
            kind, place = KINDS[name]
            self.bytes[kind] += sum(t.numel() * t.element_size() for t in tree_leaves(args[place]))
        return func(*args, **(kwargs or {}))


def total(*parts: dict[str, int]) -> dict[str, int]:
    found = collections.Counter()
    for part in parts:
        found.update(part)
    return dict(found)


def blocks(model):
    return model.base_model.model.model.layers


# How ZeRO-3 holds parameters: let go after forward, as it would those of a large model, or the small ones never.
RELEASED = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
PERSISTENT = 1000
STAGES = {
    "zero3_released": functools.partial(engines.zero, stage=3, sharding=RELEASED),
    "zero3_persistent": functools.partial(
        engines.zero, stage=3, sharding=RELEASED | {"stage3_param_persistence_threshold": PERSISTENT}
    ),
}


def build(method: str) -> nn.Module:
    # Of a rank that leaves something to fill up: the last shards, and FSDP1's addresses.
    return engines.build(method, r=3)


def modelled(engine: str, method: str, ranks: int) -> dict[str, int]:
    model = build(method)
    pruning = method.endswith("_pruned")
    if engine == "ddp":
        return traffic.ddp(model)
    if engine.startswith("fsdp1"):
        return traffic.fsdp1(model, blocks(model), ranks, original=engine == "fsdp1", pruning=pruning)
    if engine.startswith("zero"):
        options = {"persistent": PERSISTENT if engine == "zero3_persistent" else 0, "released": engine in STAGES}
        first = model.base_model.model.model.embed_tokens, blocks(model)[0].input_layernorm
        return traffic.zero(model, int(engine[4]), ranks, **options, first=first, pruning=pruning)
    replicas = 2 if engine == "hsdp" else 1
    options = {"replicas": replicas, "reshard": engine != "fsdp2_kept"}
    return traffic.fsdp2(model, blocks(model), ranks // replicas, **options, pruning=pruning)


def counted(prepared, model, rows, allocator=None) -> dict[str, int]:
    """Of the last of three steps."""
    for _ in range(3):
        # DDP finds its buckets in the first step and tells the ranks in the second, as ZeRO-3 does of modules.
        with Counted() as found:
            loss = prepared.model(input_ids=rows, labels=rows).loss
            prepared.backward(loss + orthogonal_penalty(model) if allocator else loss)
            optimizer = prepared.step()
            if allocator:
                allocator.step()
            if optimizer is not None:
                optimizer.zero_grad()
    return dict(found.bytes)


def count(rank, cells):
    ranks = dist.get_world_size()
    rows = tokens(batch=ranks).chunk(ranks)[rank]
    found = {}
    for engine, method in cells:
        model = build(method)
        prepared = (engines.ENGINES | STAGES)[engine](model)
        pruned = method.endswith("_pruned") and engine != "ddp"
        found[engine, method] = counted(prepared, model, rows, RankAllocator(model, **SCHEDULE) if pruned else None)
    return found


# No step masks, and all of them score.
SCHEDULE = {"target_rank": 1, "total_steps": 9, "t_init": 4, "t_final": 1, "delta_t": 1}
METHODS = ("nlora_residual", "lora2_pruned")
CELLS = {
    "torch": [*itertools.product(("ddp", "fsdp1", "fsdp2", "fsdp2_kept"), METHODS), ("fsdp1_flat", "nlora_residual")],
    "zero": list(itertools.product(("zero1", "zero2", "zero3", *STAGES), METHODS)),
}


# Three ranks divide hardly anything evenly: with them what is filled up is counted.
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("kind", CELLS)
def test_the_bytes_of_a_step_are_those_that_are_counted(kind, ranks, request):
    if kind == "zero" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed (make zero)")
    if ranks != 3 and not request.config.getoption("--engines"):
        pytest.skip("needs --engines")
    cells = CELLS[kind] + ([("hsdp", "lora2_pruned")] if kind == "torch" and ranks == 4 else [])
    for (engine, method), found in run(count, ranks, cells).items():
        assert found == modelled(engine, method, ranks), (engine, method)


COLUMN_WISE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROW_WISE = ("self_attn.o_proj", "mlp.down_proj")
# So few tokens that theirs are fewer values than the matrices of some adapters, and more than those of others.
LENGTHS = (5, 40)


def layers(model, names):
    return [block.get_submodule(name) for block in blocks(model) for name in names]


def split(rank, methods, beside_fsdp2):
    """{method, length of a row: (bytes counted, bytes expected)}"""
    ranks = dist.get_world_size()
    shape = (ranks // 2, 2) if beside_fsdp2 else (1, ranks)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
    plan = {f"model.layers.*.{name}": ColwiseParallel() for name in COLUMN_WISE}
    plan |= {f"model.layers.*.{name}": RowwiseParallel() for name in ROW_WISE}
    found = {}
    for method in methods:
        whole = engines.build(method)
        model = peft.get_peft_model(parallelize_module(llama(), mesh["tp"], plan), config(method)).train()
        parts = [traffic.fsdp2(model, blocks(model), ranks // 2)] if beside_fsdp2 else []
        if beside_fsdp2:
            for unit in (*blocks(model), model):
                fully_shard(unit, mesh=mesh["dp"])
        for length in LENGTHS:
            rows = tokens(batch=2, length=length)
            prepared = engines.one(model)
            sizes = {"columns": layers(whole, COLUMN_WISE), "rows": layers(whole, ROW_WISE), "tokens": rows.numel()}
            expected = traffic.tensor_parallel(**sizes, first=sizes["columns"][:3])
            found[method, length] = counted(prepared, model, rows), total(expected, *parts)
    return found


@pytest.mark.parametrize("ranks, beside_fsdp2", [(2, False), (4, True)])
def test_the_bytes_of_split_layers_are_those_that_are_counted(ranks, beside_fsdp2):
    for case, (found, expected) in run(split, ranks, ("lora", "nlora", "inttune", "lora2"), beside_fsdp2).items():
        assert found == expected, case


@pytest.mark.parametrize(
    "collective, expected", [("all_gather", 75.0), ("reduce_scatter", 75.0), ("all_reduce", 150.0)]
)
def test_what_a_rank_sends_of_a_collective(collective, expected):
    assert traffic.sent(collective, 100, 4) == expected
