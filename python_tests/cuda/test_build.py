"""What nvcc made of every kernel in the extension: no spill, no stack, registers that fit, the instructions meant."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nlora_kernels.backends.native import _C
from python_tests import ROOT
from python_tests.cuda.emulator import cuobjdump

if not hasattr(_C, "cuda_forward"):
    pytest.skip("the extension was built without nvcc", allow_module_level=True)
if cuobjdump() is None:
    pytest.skip("cuobjdump not found: comes with the CUDA toolkit and with Triton", allow_module_level=True)

# Of each kernel: architectures, greatest number of registers, and instructions that must be there.
HOPPER, AMPERE, BOTH = {"sm_90a"}, {"sm_80"}, {"sm_80", "sm_90"}
KERNELS = {
    # 384 threads must start with 168 registers each for 128·40 + 256·232 to add up.
    "gemm_kernel": (HOPPER, 168, ("HGMMA", "UTMALDG.2D", "UTMASTG.2D", "STSM.16.M88.4", "USETMAXREG", "SYNCS")),
    # 288 threads alone on a processor.
    "gradient_kernel": (HOPPER, 224, ("HGMMA", "UTMALDG.2D", "SYNCS")),
    # 128 threads, two blocks on a processor.
    "ampere_kernel": (AMPERE, 255, ("HMMA.16816.F32", "LDGSTS.E.BYPASS.128", "LDSM.16.M")),
    # 256 threads, likewise.
    "residual_kernel": (BOTH, 128, ("HMMA.16816.F32.BF16", "LDGSTS.E.BYPASS.128", "LDSM.16.MT88.4")),
    "split_kernel": (BOTH, 128, ()),
    "gather_kernel": (BOTH, 128, ()),
    "fold_kernel": (BOTH, 128, ()),
    "finish_kernel": (BOTH, 128, ()),
    "core_kernel": (BOTH, 128, ()),
    "core_backward_kernel": (BOTH, 128, ()),
}


def dump(option):
    """What cuobjdump says of the extension."""
    # It calls tools that lie beside it.
    environment = os.environ | {"PATH": f"{Path(cuobjdump()).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [cuobjdump(), option, _C.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def dump_kernels(option):
    """The same as (architecture, mangled name, text) for each kernel."""
    found = []
    for arch, part in re.findall(r"Fatbin elf code:\n=+\narch = (\w+)(.*?)(?=Fatbin|\Z)", dump(option), re.DOTALL):
        pieces = re.split(r"Function :? ?(\w+):?", part)
        found += [(arch, name, body) for name, body in zip(pieces[1::2], pieces[2::2], strict=True)]
    return found


def kernel_of(mangled):
    (name,) = {name for name in KERNELS if re.search(rf"\d{name}I", mangled)} or {mangled}
    return name


@pytest.fixture(scope="module")
def kernels():
    """(architecture, mangled name) -> (figures of its resources, its code)"""
    code = {(arch, name): body for arch, name, body in dump_kernels("-sass")}
    figures = {}
    for arch, name, body in dump_kernels("-res-usage"):
        figures[arch, name] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", body)}
    assert figures.keys() == code.keys()
    return {key: (figures[key], code[key]) for key in figures}


def test_every_kernel_is_there_for_its_architectures(kernels):
    found = {}
    for arch, name in kernels:
        found.setdefault(kernel_of(name), set()).add(arch)
    assert found == {name: architectures for name, (architectures, _, _) in KERNELS.items()}
    # Every tile for bf16 and fp16, for right operands stored either way, and for a product alone and several together.
    assert sum(kernel_of(name) == "gemm_kernel" for _, name in kernels) == 32


def test_newer_devices_have_ptx_of_what_is_not_hoppers_alone():
    ptx = dump("-ptx")
    assert set(re.findall(r"\.target (\w+)", ptx)) == {"sm_80"}
    found = {kernel_of(name) for name in re.findall(r"\.entry (\w+)", ptx)}
    assert found == {name for name, (architectures, _, _) in KERNELS.items() if "sm_80" in architectures}


def test_nothing_spills_and_every_register_fits(kernels):
    print(f"\n{'architecture':<13}{'registers':>10}{'stack':>6}{'local':>6}{'wgmma':>6}  kernel")
    for (arch, name), (figures, code) in sorted(kernels.items()):
        readable = re.sub(r"^_ZN5nlora4cuda(4sm\d\d)?\d+|EvNS_.*$", "", name)
        wgmma = code.count("HGMMA")
        print(f"{arch:<13}{figures['REG']:>10}{figures['STACK']:>6}{figures['LOCAL']:>6}{wgmma:>6}  {readable}")
        _, registers, _ = KERNELS[kernel_of(name)]
        assert figures["STACK"] == figures["LOCAL"] == 0, name
        assert figures["REG"] <= registers, name
        assert not re.search(r"\b(LDL|STL)\b", code), name


def test_kernels_are_made_of_the_instructions_they_are_meant_to_be(kernels):
    for (_, name), (_, code) in kernels.items():
        for instruction in KERNELS[kernel_of(name)][2]:
            assert instruction in code, f"{name}: {instruction}"


def test_wgmma_is_not_serialised(kernels):
    for (_, name), (_, code) in kernels.items():
        products = re.findall(r"HGMMA.*", code)
        # Where ptxas serialises, every one of them waits (gsb0); else the last of a commit group alone.
        assert 2 * sum("gsb0" in product for product in products) <= len(products), name


def test_a_call_that_fails_is_named_with_its_shapes():
    # No machine has so many devices; without a driver there is none at all.
    queue = _C.CudaQueue(4095, 0)
    x, weight, A, B = (torch.zeros(s, dtype=torch.bfloat16) for s in ((4, 16), (24, 16), (8, 16), (24, 8)))
    y, T, workspace = (torch.zeros(s, dtype=torch.bfloat16) for s in ((4, 24), (4, 8), (40, 8)))
    shapes = r"\(4, 16\), weight \(24, 16\), lora_A \(8, 16\)"
    with pytest.raises(RuntimeError, match=rf"forward of x {shapes} on cuda:4095: cu\w+ failed: \w+"):
        _C.cuda_forward(queue, x, weight, A, B, None, None, y, T, workspace, 1.0)
    with pytest.raises(RuntimeError, match=r"LoRA² core of u \(8, 16\) on cuda:4095: cu\w+ failed"):
        _C.cuda_lora2_core(queue, A, T, B, None, y)


# Forward, and with backward: F and y; [F | B], dx, slices, their sums. Three layers have dA's slices of all, and dB's,
# and nine sums of which a launch makes six.
LAUNCHES = {"bf16 adapter": (2, 6), "fp32 adapter": (2, 6), "three layers": (2, 8)}


def test_launches_of_a_call_without_a_driver():
    if not list(ROOT.glob("build/temp.*/nlora_kernels._C/csrc/cuda/common/launch.o")):
        pytest.skip("the extension was not built in this folder")
    command = [sys.executable, ROOT / "bench" / "gpu" / "host_cuda.py", "--rounds", "1", "--calls", "3"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = dict(re.findall(r"^(.*, (?:launches|other operations)) +here +([\d.]+)$", said, re.MULTILINE))
    for case, launches in LAUNCHES.items():
        for calls, count in zip(("forward", "forward and backward"), launches, strict=True):
            assert float(counts[f"{case}: {calls}, launches"]) == count
            assert float(counts[f"{case}: {calls}, other operations"]) == 0
