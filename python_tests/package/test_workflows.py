"""The workflows of the forge run what .ci/run checks, by commands that exist."""

import os
import re
import shlex
import subprocess
import tomllib

import pytest

from nlora_kernels.versions import __version__
from python_tests import ROOT

yaml = pytest.importorskip("yaml")

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def commands(path):
    """Of every step of a workflow, a line for each entry of its job's matrix."""
    for job in yaml.safe_load(path.read_text())["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {})
        for step in job["steps"]:
            for line in step.get("run", "").splitlines():
                key = re.search(r"\$\{\{ matrix\.(\w+) }}", line)
                yield from (line.replace(key[0], value) for value in matrix[key[1]]) if key else [line]


def targets(lines):
    """What make is called for, with the flags that go with it."""
    for line in lines:
        # Without where its output goes.
        words = shlex.split(re.split(r" [>&]", line)[0], comments=True)
        if words[:1] == ["make"]:
            flags = [word for word in words if "=" in word and not word.startswith("FLAGS=$")]
            yield from ((word, *flags) for word in words[1:] if "=" not in word)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_command_exists(path):
    lines = list(commands(path))
    for target in targets(lines):
        done = subprocess.run(["make", "-n", "PYTHON=python3", *target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"make {target}: {done.stderr}"
    for line in lines:
        words = shlex.split(line)
        program = "pytest" if words[:3] == ["python", "-m", "pytest"] else words[0]
        assert program in ("make", "pip", "pytest", "sudo"), f"no test knows {line}"
        if program == "sudo":
            assert words[1:3] == ["apt-get", "update"] or words[1:4] == ["apt-get", "install", "-y"], line
        if program == "pytest":
            assert all((ROOT / folder).is_dir() for folder in words[3:]), line


def test_the_forge_checks_what_a_change_must_pass():
    local = (ROOT / ".ci" / "run").read_text().splitlines()
    (workflow,) = (path for path in WORKFLOWS if path.stem == "test")
    assert set(targets(local)) == set(targets(commands(workflow)))


def test_the_forge_has_what_tests_are_skipped_without():
    """nvcc where the kernels are compiled by it; for Arm the compiler and QEMU, which a test names."""
    (workflow,) = (path for path in WORKFLOWS if path.stem == "test")
    steps = yaml.safe_load(workflow.read_text())["jobs"]["whole"]["steps"]
    only = {step["if"]: step for step in steps if "if" in step}
    assert only["matrix.target == 'gates'"]["uses"].startswith("Jimver/cuda-toolkit@")
    lines = only["matrix.target == 'test'"]["run"].splitlines()
    packages = {word for line in lines if "install" in line for word in shlex.split(line)[4:]}
    (named,) = re.findall(r"Debian: ([^)]*)\)", (ROOT / "python_tests" / "backends" / "test_cpu.py").read_text())
    assert packages == set(named.split(", "))
    toolkits = {
        line for path in WORKFLOWS for line in path.read_text().splitlines() if "Jimver" in line or "cuda:" in line
    }
    assert len({line.replace("- ", "").strip() for line in toolkits}) == 2, "wheels and tests take one toolkit"


@pytest.mark.parametrize("tag", [None, "v9.9", f"v{__version__}.1", "", "v0x1.0"])
def test_a_tag_is_that_of_the_version(tag):
    """None: the right one."""
    said = subprocess.run(
        ["make", "tag"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"TAG": f"v{__version__}" if tag is None else tag},
    )
    assert (said.returncode == 0) == (tag is None)
    assert tag is None or f"TAG must be v{__version__}, got '{tag}'" in said.stdout


def test_the_forge_installs_the_ranges_that_the_package_asks_for():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = [line for path in WORKFLOWS for line in commands(path) if line.startswith("pip install") and "peft" in line]
    assert lines
    for line in lines:
        assert set(extras["peft"][:2]) <= set(shlex.split(line)), line
