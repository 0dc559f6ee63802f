"""What the stages need built: used as it is where it was built before and loads, else built here.

python bench/gpu/build.py extension|"device library"|triton [--rehearse]
"""

import argparse
import functools
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "python_tests")]

BOUNDED = ROOT / "build" / "bounded"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

# K, N, ranks, rows and dtypes of what the Triton stages call, in their order.
TRITON = [
    ("bf16+fp32", (4096, 4096), [64], [16, 2100]),
    ("bf16+fp32", (4096, 4096), [256], [2100]),
    ("fp16", (4096, 4096), [64], [16, 2100]),
    ("fp16", (4096, 4096), [256], [2100]),
    ("bf16+fp32", (768, 3072), [8], [2500]),
    ("fp16", (768, 3072), [8], [2500]),
    ("bf16+fp32 dropout", (4096, 4096), [16], [2048]),
    ("bf16", (4096, 4096), [64], [16, 2048]),
    ("bf16", (768, 768), [16, 64], [2048]),
    ("bf16+fp32", (4096, 4096), [16], [8192, 2048]),
    ("bf16+fp32", (4096, 4096), [64], [8192, 2048]),
    ("bf16+fp32", (4096, 4096), [128], [8192, 2048]),
    ("bf16+fp32", (4096, 4096), [256], [8192, 2048]),
    ("bf16+fp32", (4096, 11008), [64], [8192]),
    ("bf16+fp32", (11008, 4096), [64], [8192]),
    ("bf16+fp32", (768, 768), [64], [4096]),
    ("bf16+fp32", (768, 3072), [64], [8192]),
    ("bf16+fp32", (4096, 4096), [16, 64], [16]),
]


def extension(rehearse: bool, bounded: bool = False) -> None:
    """nlora_kernels._C with its CUDA part, built by setup.py's own rules; bounded: with an end to every wait."""
    target = bounded_extension() if bounded else next((ROOT / "nlora_kernels").glob(f"_C*{SUFFIX}"), None)
    if target and target.is_file() and loads(target, "cpu_forward" if rehearse else "cuda_forward"):
        print(f"{target.relative_to(ROOT)} is there and loads")
        return
    os.environ["NLORA_BUILD"] = "cpu" if rehearse else "cuda"
    # NOTE: setup() is not called, so that pyproject.toml is not read: an older setuptools refuses its licence.
    from setuptools import Distribution

    import setup

    os.chdir(ROOT)
    command = setup.NinjaBuild(Distribution({"ext_modules": setup.extensions(), "packages": ["nlora_kernels"]}))
    command.inplace, command.bound_spins = not bounded, bounded
    command.build_lib = str(BOUNDED)
    command.ensure_finalized()
    command.run()


def bounded_extension() -> Path:
    """Where the build with --bound-spins lies: the stages that check load it in place of the package's own."""
    return BOUNDED / "nlora_kernels" / f"_C{SUFFIX}"


def loads(extension: Path, function: str) -> bool:
    """Whether this Python loads an extension that has a function; asked in a process of its own."""
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("nlora_kernels._C", {str(extension)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert hasattr(module, {function!r}), "built without it"
"""
    return subprocess.run([sys.executable, "-c", code]).returncode == 0


def device_library(rehearse: bool) -> None:
    """Every kernel and probe behind the C entry points of the emulator's tests; in a rehearsal the emulator itself."""
    import emulator_harness

    (emulator_harness.emulator if rehearse else emulator_harness.device)()


def triton(rehearse: bool) -> None:
    """The kernels of the Triton stages into Triton's cache, in as many processes as there are processors but two."""
    jobs = [("fp16", (72, 136), [16], [37])] if rehearse else TRITON
    with ProcessPoolExecutor(
        max(1, len(os.sched_getaffinity(0)) - 2), get_context("spawn"), _begin, max_tasks_per_child=1
    ) as pool:
        for job, count in zip(jobs, pool.map(compile_job, jobs), strict=True):
            print(*job, f"{count} kernels", flush=True)


def _begin() -> None:
    from nlora_kernels.process import end_with_parent

    end_with_parent()


def compile_job(job) -> int:
    import aot

    case, layer, ranks, rows = job
    aot.LAYERS, aot.EDGES = [layer], []
    return len(aot.compile_case(90, case, ranks, rows))


BUILDS = {
    "extension": extension,
    "bounded": functools.partial(extension, bounded=True),
    "device": device_library,
    "triton": triton,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=BUILDS)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    BUILDS[options.what](options.rehearse)
