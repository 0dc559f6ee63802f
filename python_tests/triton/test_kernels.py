"""The kernels as they are written: parameters that a reader can follow, and modules that do not import each other."""

import ast
import graphlib
import importlib
import importlib.util
import pkgutil
from pathlib import Path

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


def imported(name: str) -> set[str]:
    """The modules of the backend that one of them imports, inside of functions too."""
    spec = importlib.util.find_spec(name)
    found = set()
    for node in ast.walk(ast.parse(Path(spec.origin).read_text())):
        if isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), spec.parent)
            inner = {f"{base}.{alias.name}" for alias in node.names}
            found |= (inner & {*MODULES}) or {base}
    return found & {*MODULES, package.__name__}


def test_no_module_imports_what_imports_it():
    graph = {name: imported(name) for name in [package.__name__, *MODULES]}
    assert graph[f"{package.__name__}.extended"] >= {f"{package.__name__}.{name}" for name in ("narrow", "tuning")}
    # The measuring is called by the command alone.
    assert not any(f"{package.__name__}.tuning.measure" in names for names in graph.values())
    tuple(graphlib.TopologicalSorter(graph).static_order())
