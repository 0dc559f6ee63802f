"""Compiles every kernel of the Triton backend ahead of time, without a GPU, and checks what comes out.

    python -m python_tests.triton.aot                 what the rule chooses for the benchmark shapes
    python -m python_tests.triton.aot --all           every dtype, rank and device, and the tables of measured tiles
    python -m python_tests.triton.aot --all sm_90     of those the jobs whose names begin so, as in "sm_90 bf16 r64"

What is compiled stays in Triton's cache: run again, it goes on where it stopped.

The calls themselves run on the meta device with a driver that only names its target, so what is compiled is what a GPU
would run. Fails on shared memory beyond the device's limit, on a stack (spilled registers), on 16-bit products of 64
rows and more without wgmma on sm_90, on a single launch without release, acquire and the barrier before release, and on
nested scales to which their offset is added unrounded.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch

from nlora_kernels.backends.triton.device import SHARED, Device
from nlora_kernels.backends.triton.tuning import tables

PROCESSORS = {80: 108, 90: 132, 100: 148}
# K, N: attention, gate and up, down of LLaMA-2-7B; attention and first feed-forward layer of BERT.
LAYERS = [(4096, 4096), (4096, 11008), (11008, 4096), (768, 768), (768, 3072)]
ROWS = [1, 16, 512, 2048, 8192]
RANKS = [8, 16, 64, 128, 256]
# M, K, N, R: sizes of 1 are compiled as constants, and ragged ones with masks and without descriptors.
EDGES = [(1, 1, 1, 1), (3, 1, 7, 2), (100, 65, 1, 300), (2500, 777, 333, 13)]
# Of a mixture.
EXPERTS = 8
# dtype of the base, dtype of the adapter, TF32 allowed.
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16, False),
    "bf16+fp32": (torch.bfloat16, torch.float32, False),
    "fp16": (torch.float16, torch.float16, False),
    "fp32": (torch.float32, torch.float32, False),
    "tf32": (torch.float32, torch.float32, True),
}
# With dropout, what it changes is compiled; without, all the rest.
CASES = [dtype + dropout for dropout in ("", " dropout") for dtype in DTYPES]


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled: what was asked for, and what it uses."""

    capability: int
    kernel: str
    dtype: str
    configuration: str
    registers: int
    stack: int
    shared: int
    instructions: tuple[str, ...]
    faults: tuple[str, ...]

    def row(self) -> str:
        columns = f"sm_{self.capability:<4} {self.kernel:18} {self.dtype:5} {self.configuration:44}"
        uses = f"{self.registers:4} regs {self.stack:5} B stack {self.shared:7} B shared"
        return f"{columns} {uses}  {' '.join(self.instructions)}  {'; '.join(self.faults)}".rstrip()


class Target:
    """A driver for a GPU that is not there."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        return self.target


def compile_case(capability: int, case: str, ranks: list[int], rows: list[int], name: str = "") -> list[Compiled]:
    """Every distinct kernel that forward, backward and initialisation launch for one device and one case of dtypes.

    With the name of a device its table of measured tiles is used, else the rule alone.
    """
    os.environ.pop("TRITON_INTERPRET", None)
    import triton

    from nlora_kernels.backends.triton import device, launch

    triton.runtime.driver.set_active(Target(capability))
    gpu = Device(name, capability, PROCESSORS[capability], SHARED[capability])
    compiled = {}

    def run(kernel, grid, on, *, warps, stages=1, meta=None, **arguments):
        binary = kernel.warmup(**arguments, grid=grid, **launch.options(warps, stages, meta))
        if id(binary) not in compiled:
            every = fields(meta) | arguments
            compiled[id(binary)] = binary, inspect(gpu, kernel.__name__, warps, stages, every, binary)

    launch.run, device.target = run, lambda index: gpu
    launch.forget_plans()
    dtypes, _, dropout = case.partition(" ")
    dtype, adapter_dtype, tf32 = DTYPES[dtypes]
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    for (K, N), M, R in product(LAYERS, rows, ranks):
        call(M, K, N, R, dtype, adapter_dtype, bool(dropout))
    for M, K, N, R in EDGES:
        call(M, K, N, R, dtype, adapter_dtype, bool(dropout))
    return [entry for _, entry in compiled.values()]


def call(M: int, K: int, N: int, R: int, dtype: torch.dtype, adapter_dtype: torch.dtype, dropout: bool) -> None:
    from nlora_kernels.backends import Call, Dropout, Needs
    from nlora_kernels.backends.triton import core as lora2
    from nlora_kernels.backends.triton import linear, nystrom, penalty

    def meta(*shape, dtype=adapter_dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, weight, bias = meta(M, K, dtype=dtype), meta(N, K, dtype=dtype), meta(N, dtype=dtype)
    A, core, B = meta(R, K), meta(R, R), meta(N, R)
    if dropout:
        drop = Dropout(0.1, meta(1, dtype=torch.int64))
        dropped = Call(x, weight, A, B, core, bias, dropout=drop)
        y, T = linear.forward(dropped)
        linear.backward(dropped, y, T, Needs(True, False, True, False, False, False))
        call_few_rows(dropped, meta)
        return
    for lora_N in (core, None):
        plain = Call(x, weight, A, B, lora_N, bias)
        y, T = linear.forward(plain)
        linear.backward(plain, y, T, Needs(True, False, True, True, lora_N is not None, False))
        call_experts(plain, meta)
        call_group(plain)
        call_few_rows(plain, meta)
    u, E, U = meta(R, R), meta(R), meta(R, R)
    lora2.forward(u, E, U, E)
    lora2.backward(core, u, E, U, E)
    train_lora2(K, N, min(R, penalty.LARGEST), meta)
    if R > min(K, N, 256):
        return
    rows = meta(R, dtype=torch.int64)
    decode(K, N, dtype, meta)
    nystrom.gather(weight, rows, rows)
    nystrom.squared_norms(weight)
    nystrom.subtract_products([weight], [A], [core], [B], 1.0)
    nystrom.solve_triangular(meta(R, R, dtype=torch.float32), meta(R, R, dtype=torch.float32))


def call_experts(one, meta) -> None:
    """Mixtures whose experts have the layer of a call, the rows of it all in all."""
    from nlora_kernels.backends import ExpertsCall, Needs
    from nlora_kernels.backends.triton import experts

    # One expert, too, where sizes of 1 are compiled.
    for count in {EXPERTS, min(EXPERTS, one.x.shape[1])}:
        _, weight, *adapter, bias = (None if t is None else meta(count, *t.shape, dtype=t.dtype) for t in one[:6])
        # Weights are kept either way round.
        turned = () if one.lora_N is not None else (weight.mT.contiguous().mT,)
        for stored in (weight, *turned):
            call = ExpertsCall(one.x, meta(count, dtype=torch.int32), stored, *adapter, bias)
            y, T = experts.forward(call)
            experts.backward(call, y, T, Needs(True, False, True, True, call.lora_N is not None, True))


def call_group(one) -> None:
    """Two layers of one call beside one without an adapter."""
    from nlora_kernels.backends import Needs
    from nlora_kernels.backends.triton import group

    bare = one._replace(lora_A=None, lora_B=None, lora_N=None, bias=None)
    calls = [one, one, bare]
    if group.takes(calls):
        ys, Ts = zip(*group.forward(calls), strict=True)
        adapted = Needs(True, False, True, True, one.lora_N is not None, False)
        group.backward(calls, ys, Ts, [adapted, adapted, Needs(True, *[False] * 5)])


def call_few_rows(one, meta) -> None:
    """The layer of a call with a weight in four bits, where a product decodes it; beside 16 rows as many as may be."""
    from nlora_kernels.backends import Needs
    from nlora_kernels.backends.triton import linear, quantised, tuning

    M, K = one.x.shape
    for rows in (M, tuning.FEW_ROWS) if M == 16 else (M,):
        for weight in four_bits(K, one.lora_B.shape[0], one.x.dtype, meta):
            if quantised.decodes_within(weight, rows):
                few = one._replace(x=meta(rows, K, dtype=one.x.dtype), weight=weight)
                y, T = linear.forward(few)
                linear.backward(few, y, T, Needs(True, False, False, False, False, False))


def four_bits(K: int, N: int, dtype: torch.dtype, meta) -> list:
    """A weight with plain scales, and with nested ones."""
    from nlora_kernels.backends.quantised import Coded
    from nlora_kernels.backends.quantised.base import Nested

    def fp32(*size):
        return meta(*size, dtype=torch.float32)

    blocks = -(-N * K // 64)
    codes, scales = meta(-(-N * K // 2), dtype=torch.uint8), meta(blocks, dtype=torch.uint8)
    nested = Nested(fp32(256), fp32(-(-blocks // 256)), fp32(()), 256)
    plain = Coded("nibbles", (N, K), dtype, codes, fp32(16), fp32(blocks), 64)
    return [plain, Coded("nibbles", (N, K), dtype, codes, fp32(16), scales, 64, None, nested)]


def decode(K: int, N: int, dtype: torch.dtype, meta) -> None:
    from nlora_kernels.backends.quantised import Coded
    from nlora_kernels.backends.triton import quantised

    values, rows = meta(256, dtype=torch.float32), meta(N, dtype=torch.float32)
    float8 = Coded("bytes", (N, K), dtype, meta(N, K, dtype=torch.uint8), values, rows, K, (1, 1))
    int8 = Coded("int8", (N, K), dtype, meta(N, K, dtype=torch.int8), None, rows, K, (1, 1))
    for weight in (*four_bits(K, N, dtype, meta), float8, int8):
        quantised.decode(weight, meta(N, K, dtype=dtype))


def train_lora2(K: int, N: int, r: int, meta) -> None:
    from nlora_kernels.backends.triton import allocator, penalty

    v, u, V, E = meta(r, K), meta(r, r), meta(N, r), meta(r)
    averages, flags = meta(2, r + 2 * r * r, dtype=torch.float32), meta(2, dtype=torch.int64)
    options = {"nonfinite": flags[0], "progress": flags[1], "hold": True}
    allocator.smooth([r, r], [E, u, u], [E, u, u], *averages, 0.85, 0.85, **options)
    where, kept = meta(r, 1 + 2 * r, dtype=torch.int64), meta(r, dtype=torch.bool)
    for masks, scores in (([], None), ([E], None), ([E], averages[0, :r])):
        allocator.prune([E], masks, *averages, where, where.to(torch.float32), scores, kept, 1)
    for squared in (True, False):
        value, saved = penalty.penalty([v, u, V, u], squared, 1.0)
        penalty.penalty_backward([v, u, V, u], saved, value)


def fields(meta) -> dict:
    """What a kernel is compiled for by name, of equal names the first."""
    found = {}
    for name, value in meta._asdict().items() if meta else ():
        found = (fields(value) if isinstance(value, tuple) else {name: value}) | found
    if getattr(meta, "shrink", None):
        found["PADDED_R"] = meta.shrink.BLOCK_N
    return found


def inspect(device, kernel: str, warps: int, stages: int, arguments: dict, binary) -> Compiled:
    ptx = binary.asm["ptx"]
    registers, stack = resources(binary.asm["cubin"])
    found = {
        "wgmma": "wgmma.mma_async" in ptx,
        "tcgen05": "tcgen05.mma" in ptx,
        "mma": "mma.sync" in ptx,
        "tma": "cp.async.bulk.tensor" in ptx,
        "cp.async": re.search(r"cp\.async\.c[ag]", ptx) is not None,
        "acquire": ".acquire." in ptx,
        "release": ".release." in ptx,
    }
    shared, dtype = binary.metadata.shared, str(arguments.get("DTYPE", "fp32"))
    dtype = {"triton.language.bfloat16": "bf16", "triton.language.float16": "fp16"}.get(dtype, dtype.split(".")[-1])
    dtype = "fp32" if dtype == "float32" else dtype
    faults = []
    if shared > device.shared:
        faults.append(f"shared memory must be at most {device.shared} B, got {shared}")
    if stack:
        faults.append(f"stack must be empty, got {stack} B")
    # Slices are added up; where they are not multiplied with a core there is no product.
    rows = 0 if kernel == "sum_slices" else arguments.get("BLOCK_M", 0)
    if device.capability == 90 and rows >= 64 and dtype in ("bf16", "fp16") and not found["wgmma"]:
        faults.append(f"products of {rows} rows must use wgmma")
    if kernel == "single_launch":
        faults += protocol_faults(ptx)
    if kernel == "dequantise" and arguments["nested_values"] is not None and not re.search(r"add\.(rn\.)?f32", ptx):
        faults.append("a nested scale must be rounded before its offset is added")
    tile = "×".join(str(arguments[n]) for n in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "PADDED_R", "BLOCK") if n in arguments)
    flags = {
        "core": "core",
        "A_TRANSPOSED": "aT",
        "B_TRANSPOSED": "bT",
        "raw": "raw",
        "slices": "split",
        "seed": "drop",
    }
    # Of what is so, or is there.
    notes = [
        note
        for name, note in flags.items()
        if arguments.get(name) is True or isinstance(arguments.get(name), (torch.Tensor, tuple))
    ]
    configuration = f"{tile} w{warps} s{stages} {' '.join(notes)}".rstrip()
    instructions = tuple(name for name, present in found.items() if present)
    return Compiled(
        device.capability, kernel, dtype, configuration, registers, stack, shared, instructions, tuple(faults)
    )


def protocol_faults(ptx: str) -> list[str]:
    """What is wrong with the raising and the awaiting of the flags of a single launch."""
    raised, awaited = re.search(r"atom\.\S*release", ptx), re.search(r"\.acquire\.", ptx)
    if not (raised and awaited):
        return ["the flag must be raised with release and awaited with acquire"]
    if not re.search(r"atom\.\S*acq_rel", ptx):
        return ["the programs that have ended must be counted with acquire and release"]
    before = ptx[: raised.start()]
    if before.rfind("bar.sync") < before.rfind("st.global"):
        return ["a barrier must stand between the last store and the raising of the flag"]
    return []


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes of its stack)"""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", report)[1]), int(re.search(r"STACK:(\d+)", report)[1])


def matrix(everything: bool) -> list[tuple]:
    """The arguments of `compile_case` for each job: all of them, or those of the benchmarks."""
    if everything:
        found = [json.loads(file.read_text()) for file in sorted(tables.TUNED.glob("*.json"))]
        jobs = [(capability, case, [rank], ROWS) for capability, case, rank in product(PROCESSORS, CASES, RANKS)]
        return jobs + [(table["capability"], "bf16", RANKS, ROWS, table["name"]) for table in found]
    return [
        (90, "bf16 dropout", [64], [16, 8192]),
        (80, "bf16+fp32 dropout", [64], [8192]),
        (100, "bf16 dropout", [64], [8192]),
        (90, "bf16", [16, 64, 128, 256], [16, 8192]),
        (90, "bf16+fp32", [64], [16, 512, 8192]),
        (80, "bf16+fp32", [256], [512]),
        (90, "fp32", [64], [8192]),
        (80, "bf16", [64, 256], [16, 8192]),
        (100, "bf16", [64, 128, 256], [16, 8192]),
    ]


def name_of(capability: int, case: str, ranks: list[int], rows: list[int], device: str = "") -> str:
    return f"sm_{capability} {case} r{','.join(map(str, ranks))} {device}".rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="every dtype, rank and device")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("part", nargs="?", default="", help="only jobs whose names begin so: sm_90, 'sm_90 bf16 r64'")
    options = parser.parse_args()
    table = set()
    # A process compiles for one device: Triton keeps its target.
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        jobs = [job for job in matrix(options.all) if name_of(*job).startswith(options.part)]
        for job in [pool.submit(compile_case, *arguments) for arguments in jobs]:
            new = set(job.result()) - table
            table |= new
            for entry in sorted(new, key=Compiled.row):
                print(entry.row(), flush=True)
    faulty = [entry for entry in table if entry.faults]
    print(f"{len(table)} configurations, {len(faulty)} faulty")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
