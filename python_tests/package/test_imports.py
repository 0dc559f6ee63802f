"""Which module of the package imports which: imports inside functions count."""

import ast
import graphlib
import re

import pytest

from python_tests import ROOT

PACKAGE = ROOT / "nlora_kernels"


def imported(package=PACKAGE) -> dict[str, set[str]]:
    """{module: the modules of the package that it names in imports}"""
    files = {}
    for file in package.rglob("*.py"):
        parts = file.relative_to(package.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    found = {}
    for module, file in files.items():
        base = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
        named = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                parts = base[: len(base) + 1 - node.level] if node.level else []
                source = ".".join([*parts, *([node.module] if node.module else [])])
                # Of a package a name may be a module, or what the package itself holds.
                inside = (f"{source}.{alias.name}" for alias in node.names)
                named |= {name if name in files else source for name in inside}
        found[module] = (named & files.keys()) - {module}
    return found


def test_no_module_imports_itself_by_way_of_others():
    graph = imported()
    assert "nlora_kernels.backends.base" in graph["nlora_kernels.ops.api"] | graph["nlora_kernels.backends"]
    graphlib.TopologicalSorter(graph).prepare()


def test_a_circle_is_found_in_functions_too(tmp_path):
    for name, text in {"__init__": "", "a": "from . import b", "b": "def f():\n    from .a import g", "c": ""}.items():
        (tmp_path / f"{name}.py").write_text(text)
    graph = imported(tmp_path)
    assert sorted(map(len, graph.values())) == [0, 0, 1, 1]
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph).prepare()


# Part of its command, which alone imports it, wherever it lies.
MEASURE = "nlora_kernels.backends.triton.tuning.measure"


def part_of(module: str) -> str:
    return "cli" if module == MEASURE else module.removeprefix("nlora_kernels.").partition(".")[0]


def order() -> list[set[str]]:
    """The parts in every row of docs/architecture.md: backends do arithmetic; operations know of autograd; layers of
    both."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (`nlora_kernels/[^|]+) \|", text.partition("## ")[0], re.MULTILINE)
    return [{name.removesuffix(".py") for name in re.findall(r"`(?:nlora_kernels/)?([\w.]+)/?`", row)} for row in rows]


def test_every_part_is_in_one_row_of_the_page_on_architecture():
    # The package itself and what runs it know everything.
    parts = {part_of(module) for module in imported()} - {"nlora_kernels", "__main__"}
    assert sorted(part for row in order() for part in row) == sorted(parts)


def test_what_lies_below_knows_nothing_of_what_lies_above():
    rows = order()
    for module, others in imported().items():
        at = next((i for i, parts in enumerate(rows) if part_of(module) in parts), len(rows))
        above = set().union(*rows[at + 1 :])
        wrong = {o for o in others if part_of(o) in above}
        assert not wrong, f"{module} imports {', '.join(sorted(wrong))}"


def test_what_measures_tiles_is_imported_by_its_command_alone():
    assert [module for module, others in imported().items() if MEASURE in others] == ["nlora_kernels.cli.tune"]
