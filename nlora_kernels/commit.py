"""Changes of state that an interrupt cannot cut in two."""

import operator
from collections import deque
from collections.abc import Callable
from functools import partial

import torch
from torch import nn


def commit(*steps: Callable[[], object], given: Callable[[], object] | None = None) -> bool:
    """Calls the steps with no moment in between; with `given`, a first step, only if that one returns something true.

    Python runs signal handlers, and so raises KeyboardInterrupt, between two bytecodes. Steps that are C throughout (a
    `functools.partial` of a method of a tensor, a list or a dictionary) have none, and neither has what calls them
    here: an interrupt comes before all of them or after the last. Whatever can fail is to be done before.

    Returns whether the steps were called.
    """
    all_steps = partial(deque, map(operator.call, steps), 0)
    first = (given,) if given else (partial(bool, 1),)
    # A mode like that of torch.set_default_device would run Python after the operation.
    with torch._C.DisableTorchFunction():
        # zip asks for its second part only if the first has one.
        return bool(list(zip(filter(None, map(operator.call, first)), map(operator.call, (all_steps,)), strict=False)))


def attributes(module: nn.Module, **values) -> Callable[[], None]:
    """A step that sets plain attributes of a module."""
    return partial(module.__dict__.update, values)
