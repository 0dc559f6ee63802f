"""The ahead-of-time gate itself: that it passes what is sound and names what is not."""

import os
import subprocess
import sys

import pytest

from python_tests import ROOT
from python_tests.triton import aot

pytest.importorskip("triton")

# A process of its own: Triton keeps one target, and the interpreter may be on in this one.
COMPILE = """
import torch
from nlora_kernels.backends.triton import tuning
from python_tests.triton import aot

tile = tuning.Tile(*{tile})
tuning.wide_tile = lambda *_: tile

def forward(M, K, N, R, dtype, adapter_dtype, dropout):
    from nlora_kernels.backends import Call
    from nlora_kernels.backends.triton import linear

    shapes = (M, K), (N, K), (R, K), (N, R)
    linear.forward(Call(*(torch.empty(s, dtype=dtype, device="meta") for s in shapes)))

aot.LAYERS, aot.EDGES, aot.call = [(4096, 4096)], [], forward
for entry in aot.compile_case({capability}, "bf16", [64], [4096]):
    if entry.kernel in ("single_launch", "extended_product"):
        print(entry.kernel, *entry.instructions, *entry.faults)
"""


def compiled(tile, capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = COMPILE.format(tile=tile, capability=capability)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def test_a_sound_tile_has_no_faults_and_uses_what_the_device_has():
    lines = compiled((128, 128, 64, 8, 4), 90)
    assert lines and all("single_launch wgmma tma" in line and "must" not in line for line in lines)
    assert all("acquire release" in line for line in lines)


def test_too_much_shared_memory_and_a_stack_are_faults():
    lines = compiled((256, 256, 64, 4, 4), 90)
    assert any("shared memory must be at most 232448 B, got" in line for line in lines)
    assert any("stack must be empty, got" in line for line in lines)


def test_a_flag_raised_without_release_or_before_its_stores_is_a_fault():
    sound = "st.global a; bar.sync 0; atom.global.gpu.release.exch f; ld.global.gpu.acquire.b32 f;"
    sound += "atom.global.gpu.acq_rel.add e; st.global f;"
    assert aot.protocol_faults(sound) == []
    assert aot.protocol_faults(sound.replace("release", "relaxed"))
    assert aot.protocol_faults(sound.replace("acquire", "relaxed"))
    assert aot.protocol_faults(sound.replace("bar.sync 0; ", ""))
    assert aot.protocol_faults(sound.replace("acq_rel", "relaxed"))


def test_ampere_reads_by_pointers_in_two_launches():
    lines = compiled((128, 128, 64, 8, 4), 80)
    assert lines and all(line.startswith("extended_product mma cp.async") for line in lines)
