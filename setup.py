"""Builds nlora_kernels._C: csrc/ through ninja, one object per source file, each instruction set in files of its own.

NLORA_BUILD=none|cpu|cuda says what to build, and a build that fails then is an error. Without it: what this machine
can build, and a message on stderr for what it cannot; the package then installs without its native part.

    python setup.py build_ext --inplace     the extension, beside the sources; with --bound-spins, for tests on
                                            a device, CUDA kernels trap and say where when a wait lasts 2 s
    python setup.py sanitize [--long]       the C++ tests under AddressSanitizer and UBSan
    python setup.py arm                     the tests of the CPU kernels, built for Arm, under QEMU
"""

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent

AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
# By family and the end of the file name: only these files may hold code that not every CPU of the family can run, and
# other families leave them out.
TIER_FLAGS = {
    "x86": {
        "_avx2": ["-mavx2", "-mfma", "-mf16c"],
        "_avx512": AVX512_FLAGS,
        "_amx": AVX512_FLAGS,
        "_avx512bf16": [*AVX512_FLAGS, "-mavx512bf16"],
    },
    # NOTE: GCC would load more of a register tile's operands ahead than there are registers left.
    "arm": {"_neon": ["-fno-schedule-insns"], "_neonbf16": ["-fno-schedule-insns", "-march=armv8.2-a+bf16"]},
}
FAMILIES = {**dict.fromkeys(("x86_64", "amd64", "i386", "i686"), "x86"), **dict.fromkeys(("aarch64", "arm64"), "arm")}
FAMILY = FAMILIES.get(platform.machine().lower())
CUDA_SOURCES = sorted(ROOT.glob("csrc/cuda/*/*.cu"))
CPU_TESTS = [ROOT / "csrc/tests" / name for name in ("cpu_test.cpp", "lora2_training_test.cpp")]

CXX_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", f"-I{ROOT / 'csrc'}"]
RELEASE_FLAGS = ["-O3", "-DNDEBUG", "-fno-math-errno", "-fno-trapping-math"]
SANITIZE_FLAGS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden"]
# By the folder: code for sm_80 runs on 8.6 and 8.9 too, and as PTX on everything newer; that for sm_90a on 9.0 alone.
# What both use is compiled for both.
ARCHITECTURES = {"sm90": ["sm_90a"], "sm80": ["sm_80", "compute_80"], "common": ["sm_80", "sm_90", "compute_80"]}

OLDEST_NVCC = 13


class NinjaBuild(build_ext):
    """Builds each extension by one build.ninja in its temporary folder."""

    user_options = [*build_ext.user_options, ("bound-spins", None, "trap when a wait of a CUDA kernel lasts 2 s")]
    boolean_options = [*build_ext.boolean_options, "bound-spins"]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.bound_spins = False

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        includes = [f"-I{path}" for path in (sysconfig.get_paths()["include"], *ext.include_dirs)]
        flags = [*CXX_FLAGS, *RELEASE_FLAGS, *(f"-D{name}" for name, _ in ext.define_macros), *includes]
        sources = [Path(source) for source in ext.sources]
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        libraries = ["-lcudart_static", "-ldl", "-lrt", "-lpthread"] if "NLORA_CUDA" in dict(ext.define_macros) else []
        links = [*(f"-L{path}" for path in ext.library_dirs), *libraries]
        try:
            links = ["-shared", *undefined, *links]
            # A folder of its own, so that neither kind of build undoes the other's objects.
            folder = Path(self.build_temp) / (f"{ext.name}-bound-spins" if self.bound_spins else ext.name)
            bounds = ["-DNLORA_BOUND_SPINS"] if self.bound_spins else []
            # As to Python's own builds, LDSHARED is a command of its own.
            linker = shlex.split(os.environ.get("LDSHARED", ""))
            build(folder, sources, output, flags, links, bounds, linker=linker)
        except CompileError:
            if not (ext.optional and libraries):
                raise
            # A toolkit that fails costs the CUDA kernels, not those for the CPU.
            print("nlora_kernels: building with nvcc failed; installing without CUDA kernels", file=sys.stderr)
            ext.sources, ext.define_macros = [str(source) for source in sources if source.suffix != ".cu"], []
            self.build_extension(ext)


class Sanitize(Command):
    """Builds and runs the C++ tests under AddressSanitizer and UBSan."""

    description = "build and run csrc/tests under AddressSanitizer and UBSan"
    user_options = [("long", None, "every shape instead of the short set")]
    boolean_options = ["long"]

    def initialize_options(self) -> None:
        self.long = False

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        folder = ROOT / "build" / "sanitize"
        for test in sorted(ROOT.glob("csrc/tests/*.cpp")):
            flags = [*CXX_FLAGS, *SANITIZE_FLAGS]
            # NOTE: no OpenMP runtime comes with PyTorch there. Nothing calls it by name, so it must not be left out.
            links = ["-Wl,--no-as-needed", "-fopenmp", "-fsanitize=address,undefined"]
            build(folder, [test, *cpu_sources()], folder / test.stem, flags, links)
            # NOTE: libgomp keeps its thread pool until exit, which is not a leak of ours.
            environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
            command = [str(folder / test.stem), *(["--long"] if self.long else [])]
            if subprocess.run(command, env=environment).returncode:
                raise CompileError(f"{test.name} failed under the sanitizers")


class Arm(Command):
    """Builds the C++ tests of the CPU kernels for Arm and runs them under QEMU, on CPUs with and without bf16."""

    description = "build csrc/tests for Arm and run them under QEMU"
    user_options = []
    CXX, QEMU = "aarch64-linux-gnu-g++", ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        for test in CPU_TESTS:
            folder = ROOT / "build" / "arm"
            program = folder / test.stem
            links = ["-Wl,--no-as-needed", "-fopenmp"]
            flags = [*CXX_FLAGS, *RELEASE_FLAGS]
            build(folder, [test, *cpu_sources("arm")], program, flags, links, cxx=self.CXX, family="arm")
            for cpu in ("max", "cortex-a57"):
                if subprocess.run([*self.QEMU, "-cpu", cpu, program]).returncode:
                    raise CompileError(f"{test.name} failed on {cpu}")


class Step(NamedTuple):
    """What makes one file: `before`, the inputs, -o output, `after`. depends: the compiler's option that lists headers.
    log: what the command says goes to <output>.log."""

    output: str
    inputs: Sequence[Path | str]
    before: Sequence[str]
    after: Sequence[str] = ()
    depends: str = ""
    log: bool = False


def ninja(folder: Path, steps: Sequence[Step], output: Path | str) -> None:
    """Takes the steps that lead to `output` where something changed since the last time; one process at a time."""
    from fcntl import LOCK_EX, flock

    folder.mkdir(parents=True, exist_ok=True)
    lines = ["rule step", "  command = $before $in -o $out $after"]
    for step in steps:
        before, after = list(step.before), " ".join(map(shell, step.after))
        lines.append(f"build {path(step.output)}: step {' '.join(map(path, step.inputs))}")
        if step.depends:
            before[1:1] = [step.depends, "-MF", f"{step.output}.d"]
            lines += [f"  depfile = {path(step.output)}.d", "  deps = gcc"]
        if step.log:
            log = shell(f"{step.output}.log")
            after += f" > {log} 2>&1 || (cat {log}; false)"
        lines += [f"  before = {' '.join(map(shell, before))}", f"  after = {after}"]
    text, file = "\n".join(lines) + "\n", folder / f"{Path(output).name}.ninja"
    with open(folder / "lock", "w") as lock:
        flock(lock, LOCK_EX)
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        if subprocess.run([ninja_path(), "-f", file.name, str(output)], cwd=folder).returncode:
            raise CompileError(f"building {Path(output).name} failed")


def build(
    folder: Path,
    sources: list[Path],
    output: Path,
    flags: list[str],
    links: list[str],
    nvcc_flags: Sequence[str] = (),
    *,
    cxx: str | None = None,
    linker: Sequence[str] = (),
    family: str | None = FAMILY,
) -> None:
    """Compiles `sources` to one object each and links them to `output`, by the compiler or the `linker` named."""
    cxx = cxx or compiler()
    output.parent.mkdir(parents=True, exist_ok=True)
    steps = []
    for source in sources:
        stem = source.resolve().relative_to(ROOT).with_suffix("")
        if source.suffix == ".cu":
            nvcc = [shutil.which("nvcc") or "nvcc", *NVCC_FLAGS, *nvcc_flags, *architecture_flags(stem.parent.name)]
            steps.append(Step(f"{stem}.o", [source.resolve()], [*nvcc, "-c"], depends="-MD"))
        else:
            own = [cxx, *flags, *tier_flags(stem.name, family), "-c"]
            steps.append(Step(f"{stem}.o", [source.resolve()], own, depends="-MMD"))
    output = output.resolve()
    ninja(folder, [*steps, Step(str(output), [step.output for step in steps], linker or [cxx], links)], output)


def cpu_sources(family: str | None = FAMILY) -> list[Path]:
    """The sources of the CPU kernels without those of other families."""
    others = tuple(suffix for name, tiers in TIER_FLAGS.items() if name != family for suffix in tiers)
    return sorted(path for path in ROOT.glob("csrc/cpu/*.cpp") if not path.stem.endswith(others))


def sources_digest() -> str:
    """Of all that native code is made from: a copy of the folder has other times."""
    files = (file for file in sorted((ROOT / "csrc").rglob("*")) if file.is_file())
    return hashlib.sha256(b"".join(file.read_bytes() for file in (*files, Path(__file__)))).hexdigest()


def tier_flags(stem: str, family: str | None) -> list[str]:
    return next((flags for suffix, flags in TIER_FLAGS.get(family, {}).items() if stem.endswith(suffix)), [])


def architecture_flags(folder: str) -> list[str]:
    return [f"-gencode=arch={code.replace('sm_', 'compute_')},code={code}" for code in ARCHITECTURES[folder]]


def path(file: Path | str) -> str:
    """A file name as ninja reads it; ninja itself quotes it for the shell."""
    return str(file).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def shell(word: str) -> str:
    """A word of a command line as ninja hands it to the shell."""
    return shlex.quote(word).replace("$", "$$")


def compiler() -> str | None:
    return os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "clang++"))), None)


def cuda_toolkit() -> tuple[Path | None, str]:
    """The CUDA toolkit to build with, or None and why there is none."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None, "no nvcc"
    # NOTE: nvcc may be a script or a link elsewhere, so it is asked itself.
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)", said)
    if release is None or int(release[1]) < OLDEST_NVCC:
        return None, f"nvcc {OLDEST_NVCC} or newer is needed, got {release[0] if release else 'none that runs'}"
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    return Path(re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE)[1]).resolve(), ""


def ninja_path() -> str:
    try:
        from ninja import BIN_DIR
    except ImportError:
        return "ninja"
    return str(Path(BIN_DIR) / "ninja")


def extensions() -> list[Extension]:
    wanted = os.environ.get("NLORA_BUILD")
    if wanted not in (None, "none", "cpu", "cuda"):
        sys.exit(f"NLORA_BUILD must be none, cpu or cuda, got {wanted!r}")
    if wanted == "none":
        return []
    missing = [] if compiler() else ["no C++ compiler (g++ or clang++)"]
    try:
        from pybind11 import get_include
    except ImportError:
        missing.append("no pybind11")
    home, reason = cuda_toolkit() if wanted != "cpu" else (None, "")
    missing += [reason] if wanted == "cuda" and reason else []
    if missing:
        message = f"nlora_kernels: cannot build the native kernels: {', '.join(missing)}"
        if wanted:
            sys.exit(message)
        print(f"{message}; installing without them", file=sys.stderr)
        return []
    if reason:
        print(f"nlora_kernels: building without CUDA kernels: {reason}", file=sys.stderr)
    # fmt: off
    return [Extension(
        "nlora_kernels._C",
        sources=[str(path.relative_to(ROOT))
                 for path in (ROOT / "csrc/bindings.cpp", *cpu_sources(), *(CUDA_SOURCES if home else []))],
        include_dirs=[get_include(), *([str(home / "include")] if home else [])],
        library_dirs=[str(home / "lib64"), str(home / "lib")] if home else [],
        define_macros=[("NLORA_CUDA", None)] if home else [],
        # Without NLORA_BUILD a failing compiler costs the native kernels, not the installation.
        optional=wanted is None,
    )]
    # fmt: on


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild, "sanitize": Sanitize, "arm": Arm})
