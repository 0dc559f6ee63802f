"""The same kernels under nvcc: no spill, no stack, no serialised wgmma, and the instructions they are meant to be."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from python_tests.cuda.emulator import TILES, cubin, cuobjdump, nvcc

needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="nvcc not found")


def resources(log):
    """mangled name -> ptxas's lines about it"""
    parts = re.split(r"Function properties for (\S+)", log)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def disassembly(runner, arch, **options):
    """mangled name -> SASS of that kernel"""
    if cuobjdump() is None:
        pytest.skip("cuobjdump not found: comes with the CUDA toolkit and with Triton")
    path, _ = cubin(runner, arch, **options)
    tools = Path(cuobjdump()).parent
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    sass = subprocess.run([cuobjdump(), "-sass", path], capture_output=True, text=True, check=True, env=environment)
    parts = re.split(r"Function : (\S+)", sass.stdout)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def main_loop(code, *instructions):
    """The shortest loop with these instructions in it, as lines of SASS."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)]
    loops = []
    for at, text in lines:
        back = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        if back and int(back[1], 16) < at:
            loops.append([line for place, line in lines if int(back[1], 16) <= place <= at])
    return min((loop for loop in loops if all(any(i in line for line in loop) for i in instructions)), key=len)


@needs_nvcc
@pytest.mark.parametrize(
    "runner, arch",
    [
        ("gemm_runner", "90a"),
        ("probe_runner", "90a"),
        *((runner, arch) for runner in ("adapter_runner", "nystrom_runner") for arch in ("80", "90a")),
        *(("ampere_runner", arch) for arch in ("80", "86", "89")),
        ("gradient_runner", "90a"),
    ],
)
def test_ptxas_is_content(runner, arch):
    _, log = cubin(runner, arch)
    assert "warning" not in log.lower(), log
    # C7510 says that wgmma is serialised, C7508 that setmaxnreg is ignored, C7519 that ptxas had to add a fence.
    assert not re.search(r"\(C7\d\d\d\)|serializ", log), log
    kernels = resources(log)
    assert kernels
    for name, text in kernels.items():
        if runner != "probe_runner" or "wgmma" in name:
            assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in text, name


@needs_nvcc
@pytest.mark.parametrize("runner", ["gemm_runner", "gradient_runner"])
def test_bounded_waits_trap_and_cost_no_more_than_a_few_registers(runner):
    _, log = cubin(runner, bounded=True)
    assert not re.search(r"\(C7\d\d\d\)|serializ", log), log
    # By that name the host finds where waits are to note what they gave up.
    assert b"\0nlora_spin_records\0" in cubin(runner, bounded=True)[0].read_bytes()
    for bounded in (False, True):
        for name, code in disassembly(runner, "90a", bounded=bounded).items():
            waits = code.count("SYNCS.PHASECHK") > 0
            assert waits and ("GLOBALTIMER" in code) == ("BPT.TRAP" in code) == bounded, name


# Every tile for bf16 and fp16, for right operands stored either way, and for a product alone and several in one launch.
GEMM_KERNELS = 8 * len(TILES)


@needs_nvcc
@pytest.mark.parametrize("arch", ["80", "86", "89"])
def test_ampere_has_two_blocks_a_processor(arch):
    kernels = {n: text for n, text in resources(cubin("ampere_runner", arch)[1]).items() if "ampere_kernel" in n}
    assert len(kernels) == 12
    for name, text in kernels.items():
        # Two blocks of 128 threads share 64 Ki registers; the source asserts the same for shared memory.
        assert int(re.search(r"Used (\d+) registers", text)[1]) * 128 * 2 <= 65536, name


@needs_nvcc
def test_ampere_sass():
    for name, code in disassembly("ampere_runner", "80").items():
        if "ampere_kernel" not in name:
            continue
        majors = re.search(r"MajorE(\d)ELS\d+_(\d)E", name).groups()
        expected = ["HMMA.16816.F32", "LDGSTS.E.BYPASS.128", "STG.E.64" if majors == ("1", "1") else "STG.E.128"]
        expected += ["LDSM.16.M88.4"] * ("0" in majors) + ["LDSM.16.MT88.4"] * ("1" in majors)
        for instruction in expected:
            assert instruction in code, f"{name}: {instruction}"
        # mma takes its registers as ldmatrix leaves them: moves between the two would double the issued instructions.
        loop = main_loop(code, "HMMA", "LDGSTS")
        assert sum("MOV" in line for line in loop) < sum("HMMA" in line for line in loop), name


# Loads of 16 bytes that are under way at the same time, at least: a chunk of both factors in fp32, and more of slices.
LOADS = {"fold_kernel": 6, "finish_kernel": 16, "split_kernel": 6}


@needs_nvcc
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_small_products_load_before_they_store(arch):
    found = set()
    for name, code in (disassembly("adapter_runner", arch) | disassembly("nystrom_runner", arch)).items():
        for kernel, least in LOADS.items():
            if kernel not in name:
                continue
            found.add(kernel)
            runs, run = [], 0
            for instruction in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", code):
                if "LDG.E.128" in instruction:
                    run += 1
                elif re.search(r"\b(STS|STG|BAR)\b", instruction):
                    runs, run = [*runs, run], 0
            assert max(runs) >= least, f"{kernel}: {max(runs)}"
            # One such place for each pair of dtypes, at the beginning and in the loop.
            assert kernel == "finish_kernel" or sum(r >= least for r in runs) >= 2, f"{kernel}: {runs}"
    assert found == LOADS.keys()


@needs_nvcc
def test_gradient_sass():
    kernels = disassembly("gradient_runner", "90a")
    assert len(kernels) == 6
    for name, code in kernels.items():
        width = re.search(r"GradientTileILi(\d+)E", name)[1]
        for instruction in (f"HGMMA.64x{width}x16.F32", "UTMALDG.2D", "STG.E.64", "SYNCS"):
            assert instruction in code, f"{name}: {instruction}"


@needs_nvcc
def test_gemm_registers():
    kernels = resources(cubin("gemm_runner")[1])
    assert len(kernels) == GEMM_KERNELS
    for name, text in kernels.items():
        # 384 threads must start with 168 registers each for 128·40 + 256·232 to add up.
        assert int(re.search(r"Used (\d+) registers", text)[1]) == 168, name


@needs_nvcc
def test_gemm_sass():
    kernels = disassembly("gemm_runner", "90a")
    assert len(kernels) == GEMM_KERNELS
    for name, code in kernels.items():
        columns = int(re.search(r"GemmTileILi\d+ELi(\d+)E", name)[1])
        # A tile of C, and the narrower ones of P and of slices.
        widths = {int(width) for width in re.findall(r"HGMMA\.64x(\d+)x16\.F32", code)}
        assert widths == {w for w in (64, 128, 256) if w <= columns}, name
        for transposed in (".tnspA", ".tnspB"):
            assert (transposed in code) == ("MajorE1" in name), name
        for instruction in ("UTMALDG.2D", "UTMASTG.2D", "STSM.16.M88.4", "USETMAXREG", "SYNCS"):
            assert instruction in code, f"{name}: {instruction}"
        clustered = re.search(r"GemmTileILi\d+ELi\d+ELi\d+ELi2E", name)
        assert ("UTMALDG.2D.MULTICAST" in code) == bool(clustered), name
        # A fence of the whole device may stand between tiles, but not between the stages of one.
        assert not any("MEMBAR" in line for line in main_loop(code, "HGMMA", "WARPGROUP.DEPBAR")), name
        for spill in ("LDL", "STL"):
            assert not re.search(rf"\b{spill}\b", code), f"{name}: {spill}"
