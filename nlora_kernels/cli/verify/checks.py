"""What a child finds of a case, by its kind. What the figures mean is the parent's to decide."""

import torch

from ...backends import Backend
from . import protocol, timing
from .cases import REPLAYS, Case, Sizes
from .layers import layer_of
from .machine import Machine


def witness(case: Case, backend: Backend, dtype: str, machine: Machine, sizes: Sizes, seed: int) -> dict:
    """The results of a small layer as they are, for the parent to compare: data of a seed that nobody knew before."""
    layer = layer_of(case, backend.name, dtype, torch.device("cpu"), seed)
    moved = {name: t.to(machine.device) for name, t in layer.tensors.items()}
    layer = layer._replace(tensors=moved, dy=layer.dy.to(machine.device))
    return {"outputs": {name: protocol.encoded(t) for name, t in layer.results().items()}}


def budget(case: Case, backend: Backend, dtype: str, machine: Machine, sizes: Sizes, seed: int) -> dict:
    layer = layer_of(case, backend.name, dtype, machine.device)
    return {"errors": _by_name(layer.budget().errors(layer.results()))}


def repeats(case: Case, backend: Backend, dtype: str, machine: Machine, sizes: Sizes, seed: int) -> dict:
    """Forward and backward again and again beside a busy stream: how many elements are not those of the first time."""
    layer = layer_of(case, backend.name, dtype, machine.device)
    expected = list(layer.results().values())
    differing = torch.zeros((), dtype=torch.int64, device=machine.device)
    for turn in range(sizes.runs):
        machine.load(turn)
        for result, first in zip(layer.results().values(), expected, strict=True):
            differing += (result != first).sum()
    return {"runs": sizes.runs, "differing": differing.item()}


def replay(case: Case, backend: Backend, dtype: str, machine: Machine, sizes: Sizes, seed: int) -> dict:
    """A captured step replayed on new inputs against the same step run directly."""
    layer = layer_of(case, backend.name, dtype, machine.device)
    again, outputs = machine.capture(lambda: list(layer.results().values()))
    differing = torch.zeros((), dtype=torch.int64, device=machine.device)
    for _ in range(REPLAYS):
        layer.tensors["x"].copy_(torch.randn_like(layer.tensors["x"], dtype=torch.float32))
        again()
        for replayed, direct in zip(outputs, layer.results().values(), strict=True):
            differing += (replayed != direct).sum()
    return {"runs": REPLAYS, "differing": differing.item()}


def time(case: Case, backend: Backend, dtype: str, machine: Machine, sizes: Sizes, seed: int) -> dict:
    """The time of a call and that of "lean", by turns; and the errors of what was timed."""
    (ours, lean), errors = timing.CALLS[case.detail](case, backend, dtype, machine)
    return timing.alternate(machine, ours, lean, sizes.rounds) | {"errors": _by_name(errors)}


KINDS = {"witness": witness, "budget": budget, "repeats": repeats, "replay": replay, "time": time}


def _by_name(errors: dict) -> dict[str, list]:
    """{result: [[error, bound], ...]}, one pair for each norm."""
    found: dict[str, list] = {}
    for (name, _), pair in errors.items():
        found.setdefault(name, []).append(pair)
    return found
