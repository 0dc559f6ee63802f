"""The kernels as they are written: parameters that a reader can follow."""

import importlib
import pkgutil

import pytest

pytest.importorskip("triton")

from nlora_kernels.backends import triton as package  # noqa: E402

MODULES = [module.name for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
MOST_PARAMETERS = 24


def kernels():
    """(name, kernel) of every kernel and device function."""
    from triton.runtime.jit import KernelInterface

    for name in MODULES:
        for attribute, value in vars(importlib.import_module(name)).items():
            if isinstance(value, KernelInterface) and value.fn.__module__ == name:
                yield f"{name.removeprefix(package.__name__)}.{attribute}", value


def test_no_kernel_has_more_parameters_than_a_reader_can_follow():
    counts = {name: len(kernel.arg_names) for name, kernel in kernels()}
    assert len(counts) >= 25
    assert {name: count for name, count in counts.items() if count > MOST_PARAMETERS} == {}
