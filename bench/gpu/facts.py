"""What the machine is, and its ceilings: against these every figure is read."""

import ctypes
import functools
import statistics
import subprocess
from pathlib import Path

import torch

from python_tests.cuda import emulator as harness

SOURCE = Path(__file__).with_name("facts.cu")
# M, K, N of the headline products.
PRODUCTS = [(2048, 4096, 4096), (8192, 4096, 4096), (8192, 4096, 11008), (8192, 11008, 4096), (16, 4096, 4096)]


def cells(machine) -> dict:
    found = {"machine": functools.partial(environment, machine), "copy": functools.partial(copy, machine)}
    for shape in machine.pick(PRODUCTS, [(16, 32, 24)]):
        found[f"library product {'x'.join(map(str, shape))}"] = functools.partial(product, machine, *shape)
    found["bytes per cycle and processor"] = functools.partial(bytes_per_cycle, machine)
    return found


def environment(machine) -> dict:
    import importlib.metadata
    import platform

    versions = {}
    for package in ("torch", "triton", "numpy", "peft", "transformers", "setuptools"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "none"
    found = {"python": platform.python_version(), **versions}
    if machine.rehearsal:
        return found
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem", "--format=csv,noheader"]
    said = subprocess.run([*query, "-i", "0"], capture_output=True, text=True).stdout.strip()
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "l2_mib": properties.L2_cache_size >> 20,
        "memory_gib": properties.total_memory >> 30,
        "driver, clock, greatest clock, memory clock": said,
        **found,
    }


def copy(machine) -> dict:
    """Bytes read and written in a second by a copy far larger than L2."""
    count = machine.pick(1 << 30, 1 << 12)
    source, target = (torch.empty(count, dtype=torch.uint8, device=machine.name).fill_(i) for i in range(2))
    times = machine.by_turns({"copy": lambda: target.copy_(source)})["copy"]
    assert torch.equal(source, target)
    return {"tb_per_s": round(2 * count / statistics.median(times) / 1e9, 3)}


def product(machine, M, K, N) -> dict:
    """The library's product in graphs over rotated operands, larger than three times L2 together."""
    count = 1 + 3 * machine.cache_bytes // (2 * (M * K + N * K + M * N))
    x, weight = ([torch.randn(s, device=machine.name).bfloat16() for _ in range(count)] for s in ((M, K), (N, K)))
    y = [torch.empty(M, N, dtype=torch.bfloat16, device=machine.name) for _ in range(count)]
    replay, _ = machine.capture(lambda: [torch.mm(a, b.T, out=c) for a, b, c in zip(x, weight, y, strict=True)])
    times = machine.by_turns({"product": replay}, queued=True)["product"]
    microseconds = 1000 * statistics.median(times) / count
    return {"us": round(microseconds, 2), "tflops": round(2e-6 * M * N * K / microseconds, 1), **machine.clock()}


def launch_gap(machine) -> dict:
    """From launch to launch of an empty kernel: in a graph, and from Python one after the other."""
    count, t = machine.pick(1000, 4), torch.zeros(1, device=machine.name)
    replay, _ = machine.capture(lambda: [t.add_(1) for _ in range(count)])

    def eager():
        for _ in range(count):
            t.add_(1)

    times = machine.by_turns({"graph": replay, "eager": eager}, rounds=10)
    return {f"{name}_us": round(1000 * statistics.median(values) / count, 3) for name, values in times.items()}


def bytes_per_cycle(machine) -> dict:
    """What one processor reads of L2 while all read: the schedule of the CUDA engine rests on it."""
    if machine.rehearsal:
        return {"compiles": bool(harness.nvcc() and build())}
    read = ctypes.CDLL(str(build())).read_l2
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    # A third of L2 is held by both of its halves.
    size, passes = machine.cache_bytes // 3 >> 16 << 16, 4
    data = torch.randint(0, 2**31 - 1, (size // 4,), dtype=torch.int32, device="cuda")
    cycles, sink = torch.zeros(processors, dtype=torch.int64, device="cuda"), data.new_zeros(1)
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    found = {}
    for blocks in (1, processors):
        for _ in range(5):
            status = read(
                *(ctypes.c_void_p(data.data_ptr()), ctypes.c_uint64(size), blocks, passes),
                *(ctypes.c_void_p(cycles.data_ptr()), ctypes.c_void_p(sink.data_ptr()), stream),
            )
            assert status == 0, f"the launch failed with status {status}"
            torch.cuda.synchronize()
        found["alone" if blocks == 1 else "all"] = round(size * passes / cycles[:blocks].double().mean().item(), 1)
    return found


def build() -> Path:
    library = SOURCE.parents[2] / "build" / "facts.so"
    library.parent.mkdir(exist_ok=True)
    command = [harness.nvcc(), "-O3", "-std=c++17", "-gencode", "arch=compute_90,code=sm_90", "-gencode"]
    command += ["arch=compute_90,code=compute_90", "-cudart", "static", "-Xcompiler", "-fPIC", "-shared"]
    subprocess.run([*command, "-o", str(library), str(SOURCE)], check=True)
    return library
