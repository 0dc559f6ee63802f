"""Checkpoints of torch.distributed.checkpoint: a run goes on at another number of processes as if nothing had been."""

import peft
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from nlora_kernels import checkpoint
from nlora_kernels.lora2 import RankAllocator
from python_tests import training
from python_tests.distributed import engines
from python_tests.peft.adapters import close, logits
from python_tests.ranks import needs_gloo, run
from python_tests.tiny import llama, tokens

pytestmark = needs_gloo

STEPS, SAVED_AT = 6, 3
METHODS = ("nlora_residual", "lora2_pruned")


def state(model, optimizer, allocator) -> dict:
    """The adapters, kept products and masks among them, what trains them, and what was decided so far."""
    tensors, moments = get_state_dict(model, optimizer)
    found = {"adapters": {name: t for name, t in tensors.items() if ".lora_" in name}, "optimizer": moments}
    return found | ({"allocator": allocator} if allocator else {})


def load(model, optimizer, allocator, folder) -> None:
    found = state(model, optimizer, allocator)
    dcp.load(found, checkpoint_id=folder)
    names = {"model_state_dict": found["adapters"], "optim_state_dict": found["optimizer"]}
    set_state_dict(model, optimizer, **names, options=StateDictOptions(strict=False))


def go(method, rows, first, last, engine=None, start=None, saved=None):
    """Steps `first` to `last` (and its losses) from one checkpoint to another."""
    model = engines.build(method)
    if engine is not None:
        engine(model)
    optimizer = engines.optimizer_of(model)
    allocator = RankAllocator(model, **engines.schedule(STEPS)) if method.endswith("_pruned") else None
    if start is not None:
        load(model, optimizer, allocator, start)
    losses = training.losses(model, rows, last - first, optimizer, allocator)
    if saved is not None:
        dcp.save(state(model, optimizer, allocator), checkpoint_id=saved)
    return model, losses, allocator


def in_shards(rank, folder, saving):
    ranks = dist.get_world_size()
    rows = tokens(batch=engines.ROWS).chunk(ranks)[rank]
    for method in METHODS:
        place = folder / method
        if saving:
            go(method, rows, 0, SAVED_AT, engines.fsdp2, saved=place / f"at-{ranks}")
            continue
        for start in sorted(place.glob("at-?")):
            model, losses, allocator = go(method, rows, SAVED_AT, STEPS, engines.fsdp2, start=start)
            dist.all_reduce(losses)
            whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            target = place / f"{start.name}-on-{ranks}"
            model.save_pretrained(target, state_dict=whole, is_main_process=rank == 0)
            if rank == 0:
                torch.save((losses / ranks, allocator and allocator.ranks()), target / "run.pt")


def several(request) -> tuple[int, ...]:
    """How many processes shards are tried on."""
    return (2, 4) if request.config.getoption("--engines") else (2,)


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    """Checkpoints of one process and of several, and runs that go on from all of them."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for method in METHODS:
        (folder / method).mkdir()
        go(method, tokens(batch=engines.ROWS), 0, SAVED_AT, saved=folder / method / "at-1")
    for saving in (True, False):
        for ranks in several(request):
            run(in_shards, ranks, folder, saving)
    return folder


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("saved", [1, 2, 4])
@pytest.mark.parametrize("resumed", [1, 2, 4])
@pytest.mark.filterwarnings("ignore")
def test_a_run_goes_on_at_another_number_of_processes(method, saved, resumed, folder, request, tmp_path):
    if 4 in (saved, resumed) and 4 not in several(request):
        pytest.skip("needs --engines")
    rows = tokens(batch=engines.ROWS)
    undisturbed, expected, allocator = go(method, rows, 0, STEPS)
    if resumed == 1:
        model, losses, own = go(method, rows, SAVED_AT, STEPS, start=folder / method / f"at-{saved}")
        ranks, place = own and own.ranks(), tmp_path / "adapter"
        model.save_pretrained(place)
    else:
        place = folder / method / f"at-{saved}-on-{resumed}"
        losses, ranks = torch.load(place / "run.pt")
    torch.testing.assert_close(losses, expected[SAVED_AT:], rtol=2e-5, atol=2e-5)
    assert ranks == (allocator and allocator.ranks())
    # What rank 0 has written is loaded without any process group, and exported.
    checkpoint.to_lora(place, tmp_path / "plain")
    wanted = logits(undisturbed.eval())
    for source in (place, tmp_path / "plain"):
        close(logits(peft.PeftModel.from_pretrained(llama(), source).eval()), wanted, atol=1e-4)
