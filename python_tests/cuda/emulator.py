"""Builds the emulator (g++) and the device library (nvcc) and calls their C entry points."""

import ctypes
import dataclasses
import functools
import importlib.util
import os
import re
import shutil
from pathlib import Path

import torch

from python_tests import ROOT
from setup import Step, ninja, sources_digest

BUILD = ROOT / "build" / "emulator"
CUDA = ROOT / "csrc" / "cuda"
EMULATOR = ROOT / "csrc" / "emulator"

CXX_FLAGS = ["-std=c++17", "-O3", "-g1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi"]
NVCC_FLAGS = ["-DNDEBUG", "-std=c++17", "-O3"]
RUNNERS = tuple(sorted(path.stem for path in (EMULATOR / "tests").glob("*_runner.cpp")))
GOLDEN = Path(__file__).resolve().parent / "golden"  # what each device wrote, one file a device

# GemmTile instantiations of gemm_runner.cpp, in its order: rows, columns, cluster. The fourth stages by halves.
TILES = ((128, 128, 1), (128, 256, 1), (128, 128, 2), (128, 256, 2), (128, 64, 2))


@functools.cache
def emulator():
    """The emulator with GEMM, probes and seeded bugs as a shared library."""
    compiler = os.environ.get("CXX", "g++")
    # The launches that ship with it, compiled for the emulator as they are.
    sources = sorted([*EMULATOR.glob("*.cpp"), *(EMULATOR / "tests").glob("*.cpp"), *CUDA.glob("*/*.cu")])
    steps = [
        Step(
            str(source.relative_to(ROOT / "csrc").with_suffix(".o")),
            [source],
            [compiler, *CXX_FLAGS, "-c", "-x", "c++"],
            depends="-MMD",
        )
        for source in sources
    ]
    link = Step("libemulator.so", [step.output for step in steps], [compiler, "-shared"])
    ninja(BUILD, [*steps, link], link.output)
    return ctypes.CDLL(str(BUILD / link.output))


def nvcc():
    return os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cuobjdump():
    """The disassembler of the CUDA toolkit, else the one bundled with Triton; None where there is neither."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if not found and spec:
        found = shutil.which("cuobjdump", path=Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    return found


def target(arch):
    return ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]


def cubin(runner, arch="90a", bounded=False):
    """(cubin, what ptxas said) of one runner's kernels; with `bounded`, as in a build with --bound-spins."""
    options = [*target(arch), *NVCC_FLAGS, *(["-DNLORA_BOUND_SPINS"] if bounded else []), "-Xptxas", "-v", "-cubin"]
    output = f"{runner}_{arch}{'_bounded' if bounded else ''}.cubin"
    source = EMULATOR / "tests" / f"{runner}.cpp"
    ninja(BUILD, [Step(output, [source], [nvcc(), "-x", "cu", *options], depends="-MD", log=True)], output)
    return BUILD / output, (BUILD / f"{output}.log").read_text()


@functools.cache
def device():
    """The same entry points for a CUDA device: as they were built before from these sources, or built now."""
    library, built_from, digest = BUILD / "libdevice.so", BUILD / "libdevice.sources", sources_digest()
    if not (library.is_file() and built_from.is_file() and built_from.read_text() == digest):
        # A hang becomes an error.
        compile = [nvcc(), "-x", "cu", *target("90a"), *NVCC_FLAGS, "-DNLORA_BOUND_SPINS", "-Xcompiler", "-fPIC", "-c"]
        # Whole layers a device has from the extension, which takes longest to compile.
        steps = [
            Step(f"device_{runner}.o", [EMULATOR / "tests" / f"{runner}.cpp"], compile, depends="-MD")
            for runner in RUNNERS
            if runner != "linear_runner"
        ]
        link = [nvcc(), *target("90a"), "-cudart", "static", "-shared"]
        ninja(BUILD, [*steps, Step(library.name, [step.output for step in steps], link)], library.name)
        built_from.write_text(digest)
    return ctypes.CDLL(str(library))


class Options(ctypes.Structure):
    _fields_ = [
        ("seed", ctypes.c_uint64),
        ("lanes", ctypes.c_int32),
        ("resident", ctypes.c_int32),
        ("skipped_line", ctypes.c_int32),
        ("bounded", ctypes.c_int32),
        ("source", ctypes.c_char_p),
    ]


class Outcome(ctypes.Structure):
    _fields_ = [
        ("rule", ctypes.c_char * 64),
        ("text", ctypes.c_char * 16384),
        ("line_count", ctypes.c_int32),
        ("lines", ctypes.c_int32 * 256),
    ]


class Matrix(ctypes.Structure):
    """nlora::Matrix of csrc/ops.h"""

    DTYPES = (torch.float32, torch.bfloat16, torch.float16)
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "row_stride", "col_stride")),
    ]

    @classmethod
    def of(cls, tensor):
        if tensor is None:
            return cls()
        tensor = tensor if tensor.ndim == 2 else tensor[None]
        return cls(tensor.data_ptr(), cls.DTYPES.index(tensor.dtype), *tensor.shape, *tensor.stride())


class NystromCase(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("dtype", "a_dtype", "core_dtype", "b_dtype")),
        *((name, ctypes.c_uint32) for name in ("layers", "out", "inner", "r")),
        *((name, ctypes.c_int64) for name in ("row_stride", "col_stride", "layer_stride", "elements")),
        *((name, ctypes.c_void_p) for name in ("weight", "rows", "cols", "A", "core", "B")),
        ("scaling", ctypes.c_float),
    ]


def nystrom_case(weight, A, core, B, scaling=0.0, **indices):
    """`weight` (layers, out, in) starts at its storage's first element; the others are contiguous."""
    layers, out, inner = weight.shape
    storage = weight.untyped_storage()
    assert weight.storage_offset() == 0
    return NystromCase(
        dtype=Matrix.DTYPES.index(weight.dtype),
        a_dtype=Matrix.DTYPES.index(A.dtype),
        core_dtype=Matrix.DTYPES.index(core.dtype) if core is not None else 0,
        b_dtype=Matrix.DTYPES.index(B.dtype),
        layers=layers,
        out=out,
        inner=inner,
        r=A.shape[1],
        row_stride=weight.stride(1),
        col_stride=weight.stride(2),
        layer_stride=weight.stride(0),
        elements=storage.nbytes() // weight.element_size(),
        weight=storage.data_ptr(),
        A=A.data_ptr(),
        core=None if core is None else core.data_ptr(),
        B=B.data_ptr(),
        scaling=scaling,
        **{name: t.data_ptr() for name, t in indices.items()},
    )


class Case(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("kernel", "number", "flag")),
        ("scaling", ctypes.c_float),
        ("matrices", Matrix * 9),
    ]


OPERANDS = ("a", "b", "c", "bias", "p", "wide", "shrink", "t", "slices")


class GemmCase(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("tile", "major", "launch")),
        *((name, ctypes.c_uint32) for name in ("blocks", "tall")),
        *((name, Matrix) for name in OPERANDS),
    ]


@dataclasses.dataclass
class Result:
    rule: str  # of the emulator's report; empty: none
    text: str
    lines: list  # of the synchronisation calls that ran


def call(function, *arguments, seed=0, lanes=False, resident=0, skipped_line=0, bounded=False, source=None):
    """`source` is the name of the file that `skipped_line` and the lines of the result belong to."""
    outcome = Outcome()
    options = Options(seed, lanes, resident, skipped_line, bounded, source and source.encode())
    status = function(*arguments, ctypes.byref(options), ctypes.byref(outcome))
    text = outcome.text.decode()
    if status == 2:
        raise RuntimeError(text)
    return Result(outcome.rule.decode(), text, list(outcome.lines[: outcome.line_count]))


# Few or all blocks resident, a clock for each warp or each lane.
SCHEDULES = [{"seed": seed, "resident": seed % 2, "lanes": lanes} for seed in range(3) for lanes in (False, True)]
SYNCHRONISATION = re.compile(
    r"\b(mbarrier_\w+|fence_\w+|bar_sync|sync_threads|sync_warp|cluster_sync|wgmma_(?:fence|commit|wait)|"
    r"bulk_(?:commit|wait\w*)|cp_async_(?:commit|wait)|setmaxnreg_\w+|flag_(?:wait|release_\w+))\s*(?:<[^;]*>)?\("
)


GRID_WAIT = re.compile(r"\b(grid_wait)\(")


def synchronisation_calls(source, pattern=SYNCHRONISATION):
    """line -> name of every call that orders the threads of a grid in a file of csrc/cuda, known by its name alone.

    With GRID_WAIT, of those that order one grid after another.
    """
    calls = {}
    (path,) = CUDA.glob(f"*/{source}")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        for name in pattern.findall(line.split("//")[0]):
            assert number not in calls, f"{source}:{number}: one synchronisation call a line"
            calls[number] = name
    return calls


def with_gaps(matrix, gap):
    """The same matrix with `gap` elements between its rows."""
    return torch.nn.functional.pad(matrix, (0, gap))[:, : matrix.shape[1]]


def check_sum(result, out, exact, magnitude, terms):
    """No report, and fp32 sums of `terms` products, which add up to `magnitude` without signs, once rounded."""
    assert not result.rule, result.text
    roundings = (terms + 2) * torch.finfo(torch.float32).eps / 2
    error = roundings / (1 - roundings) * magnitude
    info = torch.finfo(out.dtype)
    budget = error + info.eps / 2 * (exact.abs() + error) + info.smallest_normal * info.eps
    excess = (out.double() - exact).abs() - budget
    assert excess.max() <= 0, f"error beyond the budget by {excess.max():.3g}"


def run_case(entry, kernel, *matrices, number=0, flag=0, scaling=1.0, library=None, **options):
    """Runs `kernel` of the entry point on tensors (None: not there); results are written in place."""
    case = Case(kernel, number, flag, scaling, (Matrix * 9)(*map(Matrix.of, matrices)))
    return call(getattr(library or emulator(), entry), ctypes.byref(case), **options)


def poisoned(rows, columns, dtype):
    """A matrix of NaN whose rows lie 8 elements apart, NaN as well."""
    return torch.full((rows, columns + 8), -1, dtype=torch.int16).view(dtype)[:, :columns]


def run_gemm(*products, tile=0, blocks=4, tall=1, epoch=0, flags=0, library=None, **options):
    """Launches products one after the other on the same control words, which hold that epoch and those flags before.

    A product is a dict of the tensors of product.h: a, b and, where there is an adapter, wide and shrink or p; right
    operands come as (n, k), and with mn=True go to the kernel as (k, n). c, p where it is made, and slices of float32
    NaN where there is t, as many as splits says, are added to the dict. A list of products goes in one launch; with
    mn=True each gets their c. Returns (ticket, epoch, Result).
    """
    launches = [(i, p) for i, group in enumerate(products) for p in (group if isinstance(group, list) else [group])]
    cases, alive = (GemmCase * len(launches))(), []
    for case, (launch, product) in zip(cases, launches, strict=True):
        mn = product.get("mn", False)
        m, dtype = len(product["a"]), product["a"].dtype
        product["c"] = poisoned(m, len(product["b"]), dtype)
        if "shrink" in product:
            product["p"] = poisoned(m, len(product["shrink"]), dtype)
        if "t" in product:
            g = product["p"].shape[1] - (product["wide"].shape[1] if "wide" in product else 0)
            product["slices"] = torch.full((product["splits"] * g, product["t"].shape[1]), torch.nan)
        case.tile, case.major, case.launch, case.blocks, case.tall = tile, int(mn), launch, blocks, tall
        for name in OPERANDS:
            tensor = product.get(name)
            if tensor is not None and name not in ("c", "slices") and not (name == "p" and "shrink" in product):
                tensor = tensor.t() if mn and name in ("b", "wide", "shrink") else torch.atleast_2d(tensor)
                tensor = poisoned(*tensor.shape, tensor.dtype).copy_(tensor)
            alive.append(tensor)
            setattr(case, name, Matrix.of(tensor))
    control = (ctypes.c_uint32 * 3)(0, epoch, flags)
    result = call((library or emulator()).run_gemm, cases, len(cases), control, **options)
    return *control[:2], result
