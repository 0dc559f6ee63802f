"""The versions that the package works with: stated once, held to at import, and pinned for all that runs here."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from nlora_kernels import versions
from python_tests import ROOT

STATED = ["peft<0.22,>=0.21; extra == 'peft'", "transformers<5.24,>=5; extra == 'peft'", "ninja; extra == 'dev'"]


@pytest.fixture
def installed(monkeypatch):
    """Makes it look as if these versions were installed."""

    def install(**found):
        monkeypatch.setattr(importlib.metadata, "requires", lambda name: STATED)
        monkeypatch.setattr(importlib.metadata, "version", found.__getitem__)

    return install


@pytest.mark.parametrize("peft", ["0.18.1", "0.20.0"])
def test_an_older_version_is_refused_by_name(installed, peft):
    installed(peft=peft, transformers="5.23.0")
    with pytest.raises(ImportError, match=rf"needs peft <0\.22,>=0\.21, found {peft}: pip install .*\[peft\]"):
        versions.check("peft", "peft", "transformers")


def test_a_newer_version_is_said_and_used(installed):
    installed(peft="0.21.2", transformers="5.24.0")
    with pytest.warns(UserWarning, match=r"transformers <5\.24,>=5, found 5\.24\.0"):
        versions.check("peft", "peft", "transformers")


def test_versions_within_the_ranges_say_nothing(installed, recwarn):
    installed(peft="0.21.2", transformers="5.0.0")
    versions.check("peft", "peft", "transformers")
    installed(peft="0.21.3.dev0", transformers="5.23.0rc1")
    versions.check("peft", "peft", "transformers")
    assert not recwarn.list


def test_the_check_comes_before_peft_is_imported():
    code = """
import importlib.metadata, sys
version = importlib.metadata.version
importlib.metadata.version = lambda name: "0.18.0" if name == "peft" else version(name)
try:
    import nlora_kernels.peft
except ImportError as error:
    print(error, "peft" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    if importlib.metadata.requires("nlora_kernels") is None:
        pytest.skip("the package is not installed")
    assert "found 0.18.0" in done.stdout and done.stdout.endswith("False\n"), done.stdout + done.stderr


def test_what_transformers_lacks_is_not_called_missing_transformers():
    code = """
import sys
sys.modules["transformers.trainer_callback"] = None
try:
    import nlora_kernels.trainer
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "Trainer" in done.stdout and "needs transformers" not in done.stdout


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in (line.split("==") for line in lines)}


def test_every_version_that_is_used_is_pinned_within_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    requirements = [r for extra in project["project"]["optional-dependencies"].values() for r in extra]
    makefile = (ROOT / "Makefile").read_text()
    requirements += [*project["build-system"]["requires"], "torch>=2.11"]
    for line in ("BUILD_PACKAGES", "DATA_PACKAGES"):
        requirements += re.search(rf"^{line} = (.*)$", makefile, re.MULTILINE)[1].split()
    pins = pinned()
    for requirement in map(Requirement, requirements):
        if requirement.name != "nlora_kernels":
            assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement


def test_the_readme_states_the_ranges():
    readme = (ROOT / "README.md").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for requirement in extras["peft"][:2] + extras["triton"]:
        assert requirement in readme, requirement
