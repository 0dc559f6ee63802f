"""What the stages need built: used as it is where it was built before from these sources and loads, else built here.

    python -m bench.gpu.build extension|bounded|device|triton ... [--rehearse]

The first two are for the Python that runs this, which needs neither torch nor a GPU for them: built by one of the
version that a machine with a GPU has, they can be taken there with the tree (PREBUILT).
"""

import argparse
import contextlib
import ctypes
import functools
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

BOUNDED = ROOT / "build" / "bounded"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
# What is taken along, with the extension in nlora_kernels.
PREBUILT = "build/bounded", "build/extension.sources", "build/emulator/libdevice.so", "build/emulator/libdevice.sources"


def extension(rehearse: bool, bounded: bool = False) -> None:
    """nlora_kernels._C with its CUDA part, built by setup.py's own rules; bounded: with an end to every wait."""
    if bounded and rehearse:
        # No rehearsal loads it.
        return
    import setup

    target = bounded_extension() if bounded else ROOT / "nlora_kernels" / f"_C{SUFFIX}"
    built_from = BOUNDED / "sources" if bounded else ROOT / "build" / "extension.sources"
    digest = setup.sources_digest()
    known = rehearse or (built_from.is_file() and built_from.read_text() == digest)
    if known and target.is_file() and loads(target, "cpu_forward" if rehearse else "cuda_forward"):
        print(f"{target.relative_to(ROOT)} is there and loads")
        return
    os.environ["NLORA_BUILD"] = "cpu" if rehearse else "cuda"
    # NOTE: setup() is not called, so that pyproject.toml is not read: an older setuptools refuses its licence.
    from setuptools import Distribution

    os.chdir(ROOT)
    command = setup.NinjaBuild(Distribution({"ext_modules": setup.extensions(), "packages": ["nlora_kernels"]}))
    command.inplace, command.bound_spins = not bounded, bounded
    command.build_lib = str(BOUNDED)
    command.ensure_finalized()
    command.run()
    if not rehearse:
        built_from.parent.mkdir(parents=True, exist_ok=True)
        built_from.write_text(digest)


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
    from python_tests.cuda import emulator

    library = (emulator.emulator if rehearse else emulator.device)()
    for entry in (
        "run_probe",
        "run_gemm",
        "run_adapter",
        "run_hopper_gradient",
        "run_ampere",
        "run_gather",
        "run_residual",
    ):
        getattr(library, entry)


def triton(rehearse: bool) -> None:
    """The kernels of the Triton stages into Triton's cache, in as many processes as there are processors but two."""
    calls = list(dict.fromkeys(triton_calls(rehearse)))
    workers = max(1, len(os.sched_getaffinity(0)) - 2)
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin) as pool:
        for call, kernels in zip(calls, pool.map(compile_call, calls), strict=True):
            print(*call, f"{kernels} kernels", flush=True)


class Call(NamedTuple):
    """A call of the Triton backend as far as its kernels depend on it."""

    dtype: str
    adapter_dtype: str
    shape: tuple[int, int, int, int]
    core: bool = True
    bias: bool = False
    strided: bool = False
    dropout: bool = False
    # What trains: all, or the core alone.
    inttune: bool = False
    # With a weight of codes: "plain" or "nested".
    coded: str = ""
    # Columns of the layers that share x, the first of which has a bias.
    outs: tuple[int, ...] = ()
    # In place of a layer: "nystrom" for its weight, "core" of LoRA² with r and k as M and K, or "penalty" with that and
    # the rank allocator of a layer of rank R.
    part: str = ""
    # The extended product alone, in one launch or in two.
    launches: int = 0
    # Every tile in both numbers of launches in this orientation: those that `tune` measures.
    tiles: str = ""


def triton_calls(rehearse: bool) -> list[Call]:
    """The calls of the stages in their order."""
    bf16, fp16, fp32 = "bfloat16", "float16", "float32"
    if rehearse:
        return [Call(fp16, fp16, (37, 72, 136, 16)), Call(fp16, fp16, (7, 64, 32, 8), coded="nested")]
    from bench.cells import WITH_BIAS
    from bench.gpu import bench, layers, stress, tune

    found = [Call(*dtypes, shape, bias=True) for shape in layers.TRITON for dtypes in ((bf16, fp32), (fp16, fp16))]
    odd = [(shape, strided) for shape in layers.TRITON_ODD for strided in (False, True)]
    found += [Call(fp32, fp32, shape, bias=True, strided=strided) for shape, strided in odd]
    found += [Call(bf16, fp32, layers.METHODS_SHAPE, core=core) for core in (False, True)]
    found += [Call(bf16, fp32, layers.METHODS_SHAPE, inttune=True), Call(bf16, bf16, layers.METHODS_SHAPE, bias=True)]
    found += [Call(d, fp32, s, bias=True, dropout=True) for d in (bf16, fp32) for s in layers.DROPPED[1:]]
    found += [
        Call(d, d, shape, bias=True, coded="nested" if nested else "plain")
        for d in (bf16, fp32)
        for shape, nested in layers.quantised_cases(d == fp32, layers.QUANTISED)
    ]
    found += [Call(d, d, (1, K, N, r), part="nystrom") for d in (bf16, fp32) for (N, K), r in layers.INITIALISED]
    found += [Call(d, d, (r, k, 1, 1), part="core") for d in (bf16, fp32) for r, k in layers.CORES]
    found.append(Call(fp32, fp32, (0, 64, 96, 8), part="penalty"))
    found.append(grouped(layers.GROUPS[0]))
    found += [Call(bf16, bf16, layers.METHODS_SHAPE, bias=True, launches=count) for count in (2, 1)]
    found += [Call(bf16, bf16, shape, bias=True) for shape in layers.GRAPHS]
    found.append(Call(bf16, bf16, layers.DROPPED_GRAPH, core=False, dropout=True))
    found += [
        Call(d, d, shape, bias=True, launches=1) for d, shape in zip((bf16, bf16, fp16), stress.SHAPES, strict=True)
    ]
    for cell in bench.cells():
        biased, inttune = cell.model in WITH_BIAS, cell.method == "inttune"
        found.append(Call(cell.dtype, fp32, cell.size, bias=biased, inttune=inttune))
    found += [grouped(cell.group, cell.method == "inttune") for cell in bench.GROUPS]
    for *shape, transposed in tune.SHAPES:
        found.append(Call(bf16, bf16, tuple(shape), tiles="y" if transposed else "dx"))
    return found


def grouped(of, inttune: bool = False) -> Call:
    """The call of a `groups.Group` whose layers have one rank."""
    return Call("bfloat16", "float32", (of.M, of.K, 0, of.ranks[0]), bias=True, inttune=inttune, outs=of.outs)


def _begin() -> None:
    from nlora_kernels.process import end_with_parent

    end_with_parent()


def compile_call(call: Call) -> int:
    """Compiles the kernels of a call for sm_90 without a device; returns how many."""
    from python_tests.triton import aot

    aot.LAYERS, aot.EDGES, aot.call, aot.inspect = [(1, 1)], [], lambda *_: make_call(call), launcher
    return len(aot.compile_case(90, "bf16", [1], [1]))


def launcher(device, kernel: str, warps: int, stages: int, arguments: dict, binary) -> str:
    """Has Triton make the launcher of a kernel, which 3.6 compiles for every signature; the kernel's name.

    It is linked to the driver: without one there is nothing to launch either.
    """
    from triton.backends.nvidia import driver

    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
        driver.CudaLauncher(binary.src, binary.metadata)
    return kernel


def make_call(call: Call) -> None:
    import torch

    from nlora_kernels import backends
    from nlora_kernels.backends import Dropout, Needs
    from nlora_kernels.backends.triton import core as lora2
    from nlora_kernels.backends.triton import device, extended, linear, nystrom, quantised
    from nlora_kernels.backends.triton.tuning import rule
    from python_tests.triton import aot

    M, K, N, R = call.shape
    dtype, adapter_dtype = getattr(torch, call.dtype), getattr(torch, call.adapter_dtype)

    def meta(rows, cols, to, strides=""):
        size = {"": (rows, cols), "sliced": (2 * rows, 2 * cols), "transposed": (cols, rows)}[strides * call.strided]
        t = torch.empty(size, dtype=to, device="meta")
        return {"": t, "sliced": t[::2, ::2], "transposed": t.T}[strides * call.strided]

    x, weight, dy = meta(M, K, dtype, "sliced"), meta(N, K, dtype, "sliced"), meta(M, N, dtype, "transposed")
    A, B = meta(R, K, adapter_dtype), meta(N, R, adapter_dtype)
    core = meta(R, R, adapter_dtype) if call.core else None
    bias = meta(1, N, dtype)[0] if call.bias else None
    needs = Needs(True, False, not call.inttune, not call.inttune, call.core, False)
    if call.part == "core":
        u, E, U, mask = meta(M, K, dtype), meta(1, M, dtype)[0], meta(K, M, dtype), meta(1, M, torch.bool)[0]
        lora2.backward(lora2.forward(u, E, U, mask), u, E, U, mask)
        return
    if call.part == "penalty":
        aot.train_lora2(K, N, R, lambda *size, dtype=adapter_dtype: torch.empty(size, dtype=dtype, device="meta"))
        return
    if call.launches:
        extended.product(x, weight, A, core, B, bias, 0.5, transposed=True, single=call.launches == 1)
        return
    if call.part == "nystrom":
        index, fp32 = meta(1, R, torch.int64)[0], torch.float32
        parts = nystrom.gather(weight, index, index)
        nystrom.squared_norms(weight)
        nystrom.subtract_products([weight], *([part] for part in parts), 0.5)
        nystrom.solve_triangular(meta(R, R, fp32), meta(R, 300, fp32))
        return
    if call.outs:
        triton = backends.TABLE["triton"]
        biases = [meta(1, out, dtype)[0] if i == 0 else None for i, out in enumerate(call.outs)]
        calls = [
            backends.Call(x, meta(out, K, dtype), A, meta(out, R, adapter_dtype), core, bias)
            for out, bias in zip(call.outs, biases, strict=True)
        ]
        ys, Ts = zip(*triton.forward_group(calls), strict=True)
        triton.backward_group(calls, ys, Ts, [needs] * len(calls))
        return
    if call.tiles:
        transposed = call.tiles == "y"
        operands = (x, *(t if transposed or t is core else t.T.contiguous() for t in (weight, A, core, B)))
        for tile in rule.candidates(M, dtype, False, True, device.target(x.get_device())):
            for single in (False, True) if tile.m >= 64 and R <= 256 else (False,):
                extended.product(*operands, None, 1.0, transposed=transposed, tile=tile, single=single)
        return
    dropout = Dropout(0.3, torch.empty((), dtype=torch.int64, device="meta")) if call.dropout else None
    if call.coded:
        plain, nested = aot.four_bits(K, N, dtype, functools.partial(torch.empty, device="meta"))
        codes = nested if call.coded == "nested" else plain
        quantised.decode(codes, weight)
        weight = codes if quantised.decodes_within(codes, M) else weight
    layer = backends.Call(x, weight, A, B, core, bias, dropout=dropout)
    y, T = linear.forward(layer)
    linear.backward(layer, dy, T, needs)


BUILDS = {
    "extension": extension,
    "bounded": functools.partial(extension, bounded=True),
    "device": device_library,
    "triton": triton,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=BUILDS, nargs="+")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    for what in options.what:
        BUILDS[what](options.rehearse)
