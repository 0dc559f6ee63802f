"""Changes of state that an interrupt cannot cut in two."""

import operator
from collections import deque
from collections.abc import Callable
from functools import partial

from torch import nn

from .internals import DisableTorchFunction


def commit(*steps: Callable[[], object], given: Callable[[], object] | None = None) -> bool:
    """Calls the steps with no moment in between; with `given`, a first step, only if that one returns something true.

    Python runs signal handlers, and so raises KeyboardInterrupt, between two bytecodes. Steps that are C throughout (a
    `functools.partial` of a method of a tensor, a list or a dictionary) have none, and neither has what calls them
    here: an interrupt comes before all of them or after the last. Whatever can fail is to be done before.

    Returns whether the steps were called.
    """
    # A mode like that of torch.set_default_device would run Python after the operation. NOTE: no `with`, which an
    # interrupt can leave between its body and the call that ends it: the modes come back by a step.
    without_modes = DisableTorchFunction()
    modes_return = partial(without_modes.__exit__, None, None, None)
    all_steps = partial(deque, map(operator.call, steps), 0)
    first = (given,) if given else (partial(bool, 1),)
    # zip asks for its second part only if the first has one.
    called = zip(filter(None, map(operator.call, first)), map(operator.call, (all_steps,)), strict=False)
    results: list = []
    away: list = []
    leave = (without_modes.__enter__, partial(away.append, True))
    come_back = (modes_return, away.clear)
    try:
        deque(map(operator.call, (*leave, partial(results.extend, called), *come_back)), 0)
    finally:
        # After a step that failed.
        if away:
            modes_return()
    return bool(results)


def attributes(module: nn.Module, **values) -> Callable[[], None]:
    """A step that sets plain attributes of a module."""
    return partial(module.__dict__.update, values)
