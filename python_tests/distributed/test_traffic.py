"""The bytes that examples/recipes/traffic.py has of a step are those that the collectives of a step are given."""

import collections
import sys

import pytest
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from python_tests import ROOT
from python_tests.distributed import engines
from python_tests.ranks import needs_gloo, run
from python_tests.tiny import tokens

sys.path.insert(0, str(ROOT / "examples"))
from recipes import traffic  # noqa: E402

pytestmark = needs_gloo

# {operator: (collective, which of its arguments is the whole tensor)}
KINDS = {
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "allreduce_": ("all_reduce", 0),
    "broadcast_": ("broadcast", 0),
}


class Counted(TorchDispatchMode):
    """Bytes of the whole tensors that collectives are given."""

    def __init__(self):
        super().__init__()
        self.bytes: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            # A collective that is not known here must not pass for none.
            kind, place = KINDS[func._schema.name.partition("::")[2]]
            whole = args[place] if isinstance(args[place], list) else [args[place]]
            self.bytes[kind] += sum(t.numel() * t.element_size() for t in whole)
        return func(*args, **(kwargs or {}))


def modelled(engine: str, model, ranks: int) -> dict[str, int]:
    blocks = model.base_model.model.model.layers
    if engine == "ddp":
        return traffic.ddp(model)
    replicas = 2 if engine == "hsdp" else 1
    options = {"replicas": replicas, "reshard": engine != "fsdp2_kept"}
    return traffic.fsdp2(model, blocks, ranks // replicas, **options)


def count(rank, cells):
    ranks = dist.get_world_size()
    rows = tokens(batch=engines.ROWS).chunk(ranks)[rank]
    found = {}
    for engine, method in cells:
        prepared = engines.ENGINES[engine](engines.build(method))
        for _ in range(3):
            # DDP finds its buckets in the first step and tells the ranks of them in the second.
            with Counted() as counted:
                prepared.backward(prepared.model(input_ids=rows, labels=rows).loss)
                prepared.step().zero_grad()
        found[engine, method] = dict(counted.bytes)
    return found


CELLS = [(engine, method) for engine in ("ddp", "fsdp2", "fsdp2_kept") for method in ("nlora_residual", "lora2")]


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_bytes_of_a_step_are_those_that_are_counted(ranks, request):
    if ranks == 4 and not request.config.getoption("--engines"):
        pytest.skip("needs --engines")
    cells = CELLS + ([("hsdp", "lora2")] if ranks == 4 else [])
    for (engine, method), found in run(count, ranks, cells).items():
        assert found == modelled(engine, engines.build(method), ranks), (engine, method)


@pytest.mark.parametrize(
    "collective, expected", [("all_gather", 75.0), ("reduce_scatter", 75.0), ("all_reduce", 150.0)]
)
def test_what_a_rank_sends_of_a_collective(collective, expected):
    assert traffic.sent(collective, 100, 4) == expected
