"""Every primitive of the kernel layer, one probe kernel each: the emulator against values computed independently,
CuTe's layouts, and what devices wrote."""

import importlib.metadata
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from python_tests.cuda.emulator import BUILD, EMULATOR, GOLDEN, nvcc
from python_tests.cuda.probes import catalogue, operand_layout, tma_wgmma_probe

PROBES = catalogue()


@pytest.mark.parametrize("lanes", [False, True], ids=["warps", "lanes"])
@pytest.mark.parametrize("name", PROBES)
def test_probe(name, lanes):
    probe = PROBES[name]
    for seed in range(4):
        for resident in (0, 1):
            output, result = probe.run(seed=seed, lanes=lanes, resident=resident)
            assert not result.rule, result.text
            np.testing.assert_array_equal(output, probe.expected_bytes(), f"seed {seed}")


@pytest.mark.parametrize(
    "wrong",
    [
        {"map_mode": "none"},
        {"descriptor_mode": "none"},
        {"map_mode": "none", "descriptor_mode": "32B"},
        {"stride": 512},
    ],
    ids=["map-not-swizzled", "descriptor-not-swizzled", "other-swizzle", "stride"],
)
@pytest.mark.parametrize("major", ["K", "MN"])
def test_wrong_swizzle_or_descriptor_fails(wrong, major):
    probe = tma_wgmma_probe(major, major, **wrong)
    for seed in range(4):
        output, result = probe.run(seed=seed)
        # Where the operand stays inside its tile nothing is broken but the values.
        assert result.rule in ("", "uninitialised read"), result.text
        assert result.rule or not np.array_equal(output, probe.expected_bytes())


GOLDEN_FILES = sorted(GOLDEN.glob("*.npz"))


@pytest.mark.skipif(not GOLDEN_FILES, reason=f"no device has written dumps to {GOLDEN.name}/ yet")
@pytest.mark.parametrize("path", GOLDEN_FILES, ids=lambda path: path.stem)
def test_emulator_matches_device(path):
    golden = np.load(path)
    assert set(golden.files) == set(PROBES)
    for name, probe in PROBES.items():
        np.testing.assert_array_equal(probe.run()[0], golden[name], name)


def cute_headers():
    try:
        package = importlib.metadata.distribution("nvidia-cutlass")
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Path(package.locate_file(f)) for f in package.files if f.match("include/cute/tensor.hpp")]
    return found[0].parents[1] if found else None


def test_formulas_agree_with_cute():
    """Accumulator, swizzle and descriptor formulas of layout.cuh, element by element."""
    headers = cute_headers()
    if headers is None:
        pytest.skip("needs CuTe's headers: pip install --no-deps nvidia-cutlass")
    if nvcc() is None:
        pytest.skip("CuTe's headers need those of the CUDA toolkit: nvcc not found")
    listing = subprocess.run([nvcc(), "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    top = Path(next(line for line in listing.splitlines() if "TOP=" in line).split("TOP=")[1])
    includes = [f"-I{path}" for path in (headers, top / "include", top / "include" / "cccl")]
    BUILD.mkdir(parents=True, exist_ok=True)
    program = BUILD / "compare_with_cute"
    source = EMULATOR / "tests" / "cute" / "compare.cpp"
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, "-std=c++17", "-O0", "-w", *includes, source, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_operand_layouts_of_the_probes_agree_with_cute():
    """The layouts by which the probes place operands, against the canonical ones written in CuTe's notation."""
    cute = pytest.importorskip("pycute", reason="needs CuTe's layouts: pip install --no-deps nvidia-cutlass")
    rows, k_size = 128, 32
    for mode, bits in (("none", 0), ("32B", 1), ("64B", 2), ("128B", 3)):
        for major in ("K", "MN"):
            offset, leading, stride, _, step = operand_layout(rows, k_size, major, mode)
            wide = 8 << bits
            # Shapes and strides in elements; the last mode of K is the step from one 16 to the next.
            lead, by, hop = leading // 2, stride // 2, step // 2
            if major == "K" and mode == "none":
                layout = cute.Layout(((8, rows // 8), (8, 2, 2)), ((8, by), (1, lead, hop)))
            elif major == "K":
                layout = cute.Layout(((8, rows // 8), (8, 2, 2)), ((wide, by), (1, 8, hop)))
            elif mode == "none":
                layout = cute.Layout(((8, rows // 8), (8, 2, 2)), ((1, by), (8, lead, hop)))
            else:
                layout = cute.Layout(((wide, rows // wide), (8, 2, 2)), ((1, lead), (wide, by, hop)))
            swizzle = cute.Swizzle(bits, 4, 3)
            for row in range(rows):
                for k in range(k_size):
                    assert offset(row, k) == swizzle(2 * layout(row, k)), (mode, major, row, k)
