"""What a call of the Triton backend costs the host, without a GPU: µs from the public function to the driver.

    python bench/gpu/host.py                       this tree
    python bench/gpu/host.py --against ../other    this tree and another by turns

Kernels are compiled for sm_90, and Triton's own launcher hands them to a driver that returns at once. Tensors lie on
the meta device, where PyTorch's own operations (allocations, casts, sums) cost their dispatch alone: on a GPU each that
launches something costs a few µs more, so they are counted. Nothing here says how fast a kernel is.
"""

import argparse
import ctypes
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# M, K, N, R and how the layer is used.
CASES = {
    "decode, bf16": (16, 4096, 4096, 64, "bf16", "bf16"),
    "decode, fp32 adapters": (16, 4096, 4096, 64, "bf16", "fp32"),
    "512 rows, bf16": (512, 768, 768, 16, "bf16", "bf16"),
    "512 rows, fp32 adapters": (512, 768, 768, 16, "bf16", "fp32"),
    "2048 rows, bf16": (2048, 768, 768, 16, "bf16", "bf16"),
    "2048 rows, fp32 adapters": (2048, 768, 768, 16, "bf16", "fp32"),
}

# Operations of PyTorch that a call may make and that launch a kernel or a copy on a GPU.
LAUNCHING = {"_to_copy", "clone", "zeros", "fill_", "sum", "mm", "addmm"}

# What the entry points of libcuda have to write for Triton to go on; all others only return 0.
WRITING = """
#include <stdint.h>
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 232448; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = 1024; return 0; }
int cuCtxGetCurrent(void **context) { *context = context; return 0; }
int cuPointerGetAttribute(uint64_t *value, int attribute, uint64_t pointer) { *value = pointer; return 0; }
int cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int launches;
int cuLaunchKernelEx(const void *config, void *function, void **arguments, void **extra) { ++launches; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "error"; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = module; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = function; return 0; }
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--against", type=Path, help="root of another tree of the project")
    parser.add_argument("--rounds", type=int, default=5, help="how often the trees take turns")
    parser.add_argument("--calls", type=int, default=200, help="calls in a round")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(options.only, options.calls)))
        return 0
    trees = {"here": ROOT} | ({"there": options.against.resolve()} if options.against else {})
    found = {}
    for _ in range(options.rounds):
        for tree, root in trees.items():
            for case, figures in once(root, options).items():
                for figure, value in figures.items():
                    found.setdefault((case, figure), {}).setdefault(tree, []).append(value)
    for (case, figure), values in found.items():
        medians = "  ".join(f"{tree} {statistics.median(values[tree]):7.1f}" for tree in trees)
        print(f"{case:26} {figure:40} {medians}")
    return 0


def once(root: Path, options) -> dict:
    """{case: {figure: value}} of a tree, in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(root)}
    command = [sys.executable, __file__, "--measure", "--only", options.only, "--calls", str(options.calls)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ran.returncode:
        raise RuntimeError(f"{root}: {ran.stderr}")
    return json.loads(ran.stdout.splitlines()[-1])


def measured(only: str, calls: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        install(Path(folder))
        import torch

        import nlora_kernels as nk

        dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
        return {
            case: costs(nk, *CASES[case][:4], *(dtypes[d] for d in CASES[case][4:]), calls)
            for case in CASES
            if only in case
        }


def costs(nk, M, K, N, R, dtype, adapter_dtype, calls) -> dict:
    import torch

    def meta(*shape, dtype, trains=False):
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=trains)

    x, weight, dy = meta(M, K, dtype=dtype, trains=True), meta(N, K, dtype=dtype), meta(M, N, dtype=dtype)
    A, core, B = (meta(*s, dtype=adapter_dtype, trains=True) for s in ((R, K), (R, R), (N, R)))

    def forward():
        return nk.lora_linear(x, weight, A, B, core, scaling=0.5, backend="triton")

    def inference():
        with torch.no_grad():
            forward()

    def training():
        torch.autograd.grad(forward(), (x, A, B, core), dy)

    def backend(needs):
        """The same below the public function, which a profiler would send to the operator of the meta device."""
        triton, call = nk.backends.TABLE["triton"], nk.backends.Call(x, weight, A, B, core, scaling=0.5)
        y, T = triton.forward(call)
        if needs:
            triton.backward(call, dy, T, nk.backends.Needs(True, False, True, True, True, False))

    launches = ctypes.c_int.in_dll(Stub, "launches")
    figures = {}
    for name, step in {"forward": inference, "forward and backward": training}.items():
        for _ in range(3):
            step()
        times = []
        before = launches.value
        for _ in range(calls):
            begun = time.perf_counter_ns()
            step()
            times.append(time.perf_counter_ns() - begun)
        figures[f"{name}, µs"] = statistics.median(times) / 1000
        figures[f"{name}, launches"] = (launches.value - before) / calls
        figures[f"{name}, other operations"] = others(backend, step is training)
    return figures


def others(step, *arguments) -> int:
    """How many operations of PyTorch launch something on a GPU."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as profiled:
        step(*arguments)
    return sum(event.name.removeprefix("aten::") in LAUNCHING for event in profiled.events())


def install(folder: Path) -> None:
    """Puts the stub in the place of libcuda, and the CPU in that of a GPU."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver

    source = (Path(driver.__file__).parent / "driver.c").read_text() + Path(driver.__file__).read_text()
    names = set(re.findall(r"\bcu[A-Z]\w+(?=\()", source)) | set(re.findall(r"\b(cu[A-Z]\w+)_t\b", source))
    defined = set(re.findall(r"int (cu\w+)\(", WRITING))
    code = WRITING + "".join(f"int {n}{v}(void) {{ return 0; }}\n" for n in names - defined for v in ("", "_v2"))
    (folder / "stub.c").write_text(code)
    library = folder / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, folder / "stub.c"], check=True)
    global Stub
    Stub = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    triton.knobs.nvidia.libcuda_path = str(folder)

    class Driver(driver.CudaDriver):
        def __init__(self):
            self.utils, self.launcher_cls = driver.CudaUtils(), driver.CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device: (9, 0)

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    triton.runtime.driver.set_active(Driver())

    from nlora_kernels.backends import triton as backend
    from nlora_kernels.backends.triton import device

    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    stub = device.Device("stub", 90, 132, 232_448)
    backend.misplaced = lambda name, t: None
    device.target = lambda index: stub


if __name__ == "__main__":
    sys.exit(main())
