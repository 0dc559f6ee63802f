"""What the kernels run on: a GPU, or Triton's interpreter on the CPU."""

import functools
from typing import NamedTuple

import torch


class Device(NamedTuple):
    """What a plan knows of a GPU. `capability` is 80 for sm_80; `shared` is the bytes one program may use."""

    name: str
    capability: int
    processors: int
    shared: int


# Bytes of shared memory that one program may use, by compute capability.
SHARED = {80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376}
# What the interpreter takes the CPU for.
INTERPRETED = Device("interpreter", 80, 4, 232_448)


def target(index: int) -> Device:
    """The device of an index; -1 stands for the CPU."""
    return INTERPRETED if interpreted() else of(index)


@functools.cache
def of(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        # Other vendors' devices get what Ampere gets: pointers and two launches.
        return Device(properties.name, 80, properties.multi_processor_count, properties.shared_memory_per_block)
    capability = properties.major * 10 + properties.minor
    shared = getattr(properties, "shared_memory_per_block_optin", SHARED.get(capability, 101_376))
    return Device(properties.name, capability, properties.multi_processor_count, shared)


@functools.cache
def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, which takes CPU tensors."""
    from triton import knobs

    return knobs.runtime.interpret
