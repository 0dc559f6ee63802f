"""The package as a user installs it: a wheel, its types, and errors that name the extra to install."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from nlora_kernels import __version__, cli
from nlora_kernels.cli import doctor
from python_tests import ROOT


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT)
    (wheel,) = folder.glob("nlora_kernels-*.whl")
    return wheel


def test_the_wheel_installs_and_runs_away_from_the_sources(wheel, tmp_path):
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site", wheel)
    code = """
import nlora_kernels as nk, torch
print(nk.__file__)
x, weight, lora_A, lora_B = (torch.randn(s) for s in ((3, 8), (6, 8), (2, 8), (6, 2)))
torch.testing.assert_close(nk.lora_linear(x, weight, lora_A, lora_B), x @ weight.T + x @ lora_A.T @ lora_B.T)
print(nk.backends.available())
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    location, available = run(sys.executable, "-c", code, cwd=tmp_path, env=environment).splitlines()
    assert Path(location).is_relative_to(tmp_path / "site")
    assert eval(available)["lean"] is None


def test_an_nvcc_that_cannot_build_is_passed_over_or_named(tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 12.4, V12.4.1\n")
    nvcc.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "setup.py", "-q", "--name"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "nvcc 13 or newer is needed, got release 12" in done.stderr
    done = subprocess.run(command, cwd=ROOT, env={**environment, "NLORA_BUILD": "cuda"}, capture_output=True, text=True)
    assert done.returncode == 1 and "cannot build the native kernels: nvcc 13 or newer is needed" in done.stderr


@pytest.mark.parametrize("option", ["", "--bound-spins"])
def test_waits_are_bounded_where_the_build_asks_for_it(tmp_path, option):
    compiler = tmp_path / "nvcc"
    compiler.write_text(f"""#!/bin/sh
echo "$@" >> {tmp_path}/calls
case "$1" in --version) echo release 13.0;; --dryrun) echo '#$ TOP={tmp_path}' >&2;; esac
while [ $# -gt 1 ]; do [ "$1" = -o ] && touch "$2"; shift; done
""")
    compiler.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "CXX": str(compiler)}
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        *option.split(),
        "-t",
        tmp_path / "t",
        "-b",
        tmp_path / "b",
    ]
    run(*command, cwd=ROOT, env=environment | {"NLORA_BUILD": "cuda"})
    compiled = [call for call in (tmp_path / "calls").read_text().splitlines() if re.search(r"-c \S+\.cu ", call)]
    assert compiled and all(("-DNLORA_BOUND_SPINS" in call) == bool(option) for call in compiled)


def test_the_source_distribution_has_everything_that_the_extension_is_built_from(tmp_path):
    run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=ROOT)
    (archive,) = tmp_path.glob("nlora_kernels-*.tar.gz")
    with tarfile.open(archive) as files:
        packed = {name.partition("/")[2] for name in files.getnames()}
    sources = {str(file.relative_to(ROOT)) for file in ROOT.glob("csrc/**/*") if file.is_file()}
    assert sources | {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= packed


def test_the_wheel_is_typed_and_requires_torch(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert "nlora_kernels/py.typed" in names
    assert not any(name.startswith(("python_tests", "bench", "csrc")) for name in names)
    # Without an upper bound: pip keeps the build that is installed.
    assert re.findall(r"^Requires-Dist: ([^;\n]*)$", metadata, re.MULTILINE) == [f"torch>={doctor.OLDEST['torch']}"]


def test_without_kernels_the_wheel_is_for_every_machine_and_says_so_once(tmp_path):
    environment = {**os.environ, "NLORA_BUILD": "none"}
    pip = [sys.executable, "-m", "pip"]
    run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    run(*pip, "install", "-q", "--no-deps", "--target", tmp_path / "site", wheel)
    # Where the package is installed as editable, its extension would be found in the checkout.
    code = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
import nlora_kernels as nk, torch, warnings
x, weight, lora_A, lora_B = (torch.randn(s) for s in ((3, 8), (6, 8), (2, 8), (6, 2)))
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    for _ in range(3):
        nk.lora_linear(x, weight, lora_A, lora_B)
[warning] = [w for w in found if "nlora_kernels" in str(w.message)]
print(warning.message)
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    said = run(sys.executable, "-c", code, cwd=tmp_path, env=environment)
    assert said.startswith("library calls compute on this CPU, for the package was built without C++ kernels")
    assert "Install a wheel" in said and "doctor" in said


def test_the_version_is_stated_once(wheel, capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"nlora_kernels {__version__}\n"
    assert f"-{__version__}-" in wheel.name
    stated = re.compile(rf"(?<![\d.]){re.escape(__version__)}(?![\d.])")
    files = [ROOT / "pyproject.toml", ROOT / "setup.py", *ROOT.glob("*.cff"), *ROOT.glob("nlora_kernels/**/*.py")]
    assert [file.name for file in files if stated.search(file.read_text())] == ["versions.py"]
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_extra_that_an_error_may_name_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"peft", "triton", "bench", "plot", "examples", "dev"} <= extras.keys()
    for file in [*ROOT.glob("nlora_kernels/**/*.py"), *ROOT.glob("examples/**/*.py")]:
        for named in file.read_text().split("nlora_kernels[")[1:]:
            extra = named.partition("]")[0]
            assert extra in extras or extra.startswith("{"), f"{file} names an extra that does not exist: {extra}"


@pytest.mark.parametrize("module, missing, extra", [("peft", "peft", "peft")])
def test_without_an_optional_package_the_error_names_the_extra(module, missing, extra):
    code = f"""
import sys
sys.modules[{missing!r}] = None
try:
    import nlora_kernels.{module}
except ImportError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert f"nlora_kernels[{extra}]" in run(sys.executable, "-c", code, env=environment)
