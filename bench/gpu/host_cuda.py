"""What a call of the backend "cuda" costs the host, without a GPU: µs from the public function to the driver.

    python bench/gpu/host_cuda.py                       this tree, whose extension was built with nvcc
    python bench/gpu/host_cuda.py --against ../other    this tree and another by turns

The extension's own objects are linked with a stub in place of CUDA's runtime, which returns at once: host code, plans
and launches are those that ship. Tensors are small and lie on the CPU: sizes do not matter to the host. What PyTorch
itself launches costs a few µs more on a GPU, so it is counted; the current stream is not asked for. Nothing here says
how fast a kernel is.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# M, K, N, R, the dtype of the adapter and how many layers share x.
CASES = {
    "bf16 adapter": (64, 256, 256, 16, "bfloat16", 1),
    "fp32 adapter": (64, 256, 256, 16, "float32", 1),
    "three layers": (64, 256, 256, 16, "float32", 3),
}

# Operations of PyTorch that a call may make and that launch a kernel or a copy on a GPU.
LAUNCHING = {"_to_copy", "clone", "copy_", "zeros", "fill_", "sum", "mm", "addmm"}

STUB = r"""
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
typedef int status;
int launches;
static int context;
static status nothing(void) { return 0; }
static status write_context(void** to) { *to = &context; return 0; }
status cudaDeviceGetAttribute(int* value, int name, int device) {
    *value = name == 75 ? 9 : name == 16 ? 132 : 0;
    return 0;
}
status cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version, uint64_t flags,
                                        int* found) {
    const int writes = !strcmp(name, "cuCtxGetCurrent") || !strcmp(name, "cuDevicePrimaryCtxRetain");
    *function = writes ? (void*)write_context : (void*)nothing;
    *found = 0;
    return 0;
}
status cudaMalloc(void** to, size_t bytes) { *to = calloc(1, bytes); return 0; }
status cudaLaunchKernelExC(const void* config, const void* kernel, void** arguments) { ++launches; return 0; }
status cudaStreamGetCaptureInfo(void* stream, int* active, void* id) { *active = 0; return 0; }
status cudaStreamGetCaptureInfo_v3(void* stream, int* active, void* id) { *active = 0; return 0; }
const char* cudaGetErrorString(status error) { return "error"; }
void** __cudaRegisterFatBinary(void* binary) { static void* handle; return &handle; }
"""
ZEROS = """cudaFuncSetAttribute cudaMemsetAsync cudaStreamCreateWithFlags cudaStreamDestroy cudaStreamSynchronize
cudaThreadExchangeStreamCaptureMode __cudaGetKernel __cudaLaunchKernel __cudaPopCallConfiguration
__cudaRegisterFatBinaryEnd __cudaRegisterFunction __cudaUnregisterFatBinary cudaGetDevice cudaSetDevice""".split()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--against", type=Path, help="root of another tree of the project, with its extension built")
    parser.add_argument("--rounds", type=int, default=5, help="how often the trees take turns")
    parser.add_argument("--calls", type=int, default=300, help="calls in a round")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(options.calls)))
        return 0
    trees = {"here": ROOT} | ({"there": options.against.resolve()} if options.against else {})
    found = {}
    for _ in range(options.rounds):
        for tree, root in trees.items():
            for figure, value in once(root, options.calls).items():
                found.setdefault(figure, {}).setdefault(tree, []).append(value)
    for figure, values in found.items():
        medians = "  ".join(f"{tree} {statistics.median(values[tree]):7.1f}" for tree in trees)
        print(f"{figure:58} {medians}")
    return 0


def once(root: Path, calls: int) -> dict:
    """{figure: value} of a tree, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, __file__, "--measure", "--calls", str(calls)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ran.returncode:
        raise RuntimeError(f"{root}: {ran.stderr}")
    return json.loads(ran.stdout.splitlines()[-1])


def measured(calls: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        extension = install(Path(folder))
        import torch

        import nlora_kernels as nk
        from nlora_kernels.backends import TABLE, cuda
        from nlora_kernels.backends.cuda import launch

        TABLE["cuda"].unavailable = lambda: None
        cuda.misplaced = lambda name, t: None
        queue = extension.CudaQueue(0, 0)
        launch.queue = lambda t: queue
        found = {}
        for case, (M, K, N, R, adapter, layers) in CASES.items():
            for figure, value in costs(torch, nk, M, K, N, R, getattr(torch, adapter), layers, calls).items():
                found[f"{case}: {figure}"] = value
        return found


def costs(torch, nk, M, K, N, R, adapter, layers, calls) -> dict:
    def new(*shape, dtype=torch.bfloat16, trains=False):
        return torch.zeros(shape, dtype=dtype, requires_grad=trains)

    x, weights, dys = new(M, K, trains=True), [new(N, K) for _ in range(layers)], [new(M, N) for _ in range(layers)]
    sizes = (R, K), (N, R), (R, R)
    adapters = [tuple(new(*size, dtype=adapter, trains=True) for size in sizes) for _ in range(layers)]
    trained = x, *(t for of in adapters for t in of)

    def forward():
        if layers == 1:
            return (nk.lora_linear(x, weights[0], *adapters[0], scaling=0.5, backend="cuda"),)
        return nk.lora_group_linear(x, weights, adapters, scaling=0.5, backend="cuda")

    def inference():
        with torch.no_grad():
            forward()

    def training():
        torch.autograd.grad(forward(), trained, dys)

    figures = {}
    for name, step in {"forward": inference, "forward and backward": training}.items():
        for _ in range(5):
            step()
        times = []
        for _ in range(calls):
            begun = time.perf_counter_ns()
            step()
            times.append(time.perf_counter_ns() - begun)
        figures[f"{name}, µs"] = statistics.median(times) / 1000
        figures |= {f"{name}, {what}": count for what, count in counted(torch, step).items()}
    return figures


def counted(torch, step) -> dict:
    """Launches by the extension, and operations of PyTorch that launch something on a GPU."""
    from torch.profiler import ProfilerActivity, profile

    launches = ctypes.c_int.in_dll(ctypes.CDLL(importlib.import_module("nlora_kernels._C").__file__), "launches")
    before = launches.value
    step()
    launched = launches.value - before
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    names = [event.name.removeprefix("aten::") for event in profiled.events() if event.name.startswith("aten::")]
    return {"launches": launched, "other operations": sum(name in LAUNCHING for name in names)}


def install(folder: Path):
    """nlora_kernels._C, linked with the stub."""
    root = Path(os.environ["PYTHONPATH"])
    objects = [path for build in root.glob("build/temp.*/nlora_kernels._C") for path in build.glob("csrc/**/*.o")]
    if not any(path.stem == "launch" for path in objects):
        raise RuntimeError(f"{root} has no extension built with nvcc: python setup.py build_ext --inplace")
    (folder / "stub.c").write_text(STUB + "".join(f"status {name}(void) {{ return 0; }}\n" for name in ZEROS))
    stub, library = folder / "stub.o", folder / "_C.so"
    subprocess.run(["cc", "-w", "-O1", "-fPIC", "-c", folder / "stub.c", "-o", stub], check=True)
    subprocess.run(["c++", "-shared", "-o", library, *objects, stub], check=True)
    spec = importlib.util.spec_from_file_location("nlora_kernels._C", library)
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    sys.modules[spec.name] = extension
    return extension


if __name__ == "__main__":
    sys.exit(main())
