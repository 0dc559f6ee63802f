"""One layer: every implementation of every cell, checked against fp64 and then timed in turn with floor and PEFT.

    python -m pytest bench -k smoke --benchmark-json=smoke.json
    python -m nlora_kernels plot bench smoke.json

To measure as on a CPU without AVX-512, limit both sides: --cap avx2, and in the environment ATEN_CPU_CAPABILITY=avx2
ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2.
"""

import math

import pytest

from bench import cells, implementations, rows
from bench.timing import peak_bytes, saved_bytes

CASES = [(cell, name) for cell in cells.CELLS for name in implementations.names(cell)]
ROWS = [
    rows.long(cell, name, when=name == "peft_compiled" or math.prod(cell.size[:3]) > rows.LARGE, id=f"{cell}-{name}")
    for cell, name in CASES
]


@pytest.mark.parametrize("cell, impl", ROWS)
def test_linear(benchmark, request, cell, impl):
    tensors, dy, _ = implementations.tensors_of(cell)
    layer = implementations.layer(impl, cell)
    target = implementations.step(layer, dy, cell.op)
    error = layer.budget.check(target())
    others = {}
    for name in ("floor", "peft"):
        other = implementations.layer(name, cell)
        others[name] = implementations.step(other, dy, cell.op)
        other.budget.check(others[name]())
    if cell.dtype != "float32":
        # Where the CPU multiplies 16-bit numbers slowly, the floor itself is far below what fp32 reaches.
        wide = cell._replace(dtype="float32")
        others["floor_fp32"] = implementations.step(implementations.layer("floor", wide), dy.float(), cell.op)
    info = {"model": cell.model, "layer": cell.layer, "M": cell.M, "K": cell.size[1], "N": cell.size[2]}
    info |= {"shape": f"{cell.model} {cell.layer} M={cell.M}", "r": cell.r, "dtype": cell.dtype}
    info |= {"impl": impl, "op": cell.op, "method": cell.method, "error": error}
    info |= {"flop_bound": implementations.flop_bound(cell), "peak_bytes": peak_bytes(target)}
    fixed = [t for n, t in layer.tensors.items() if n != "x"]
    fixed += getattr(layer.function, "parameters", {}).values()
    forward = implementations.step(layer, dy, "forward")
    info |= {"saved_bytes": saved_bytes(forward, fixed)}
    flops = implementations.flops(cell, adapter=impl != "floor")
    info |= {"flop_per_byte": flops / implementations.bytes_moved(cell)}
    rows.record(benchmark, target, others, info, request, flops=flops)
