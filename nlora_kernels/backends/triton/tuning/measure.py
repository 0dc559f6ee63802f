"""Measures which tiles of the Triton kernels are fastest on the GPU at hand, for the table of its kind."""

from pathlib import Path

import torch

from .... import cache, testing
from ... import triton
from ...base import short
from .. import device
from . import rule, tables

# M, K, N, R that are measured: the linear layers of LLaMA-2-7B and BERT, and for the gradient of x their transposes.
LAYERS = ((4096, 4096), (4096, 11008), (11008, 4096), (768, 768), (768, 3072), (3072, 768))
SHAPES = tuple((M, K, N, R) for K, N in LAYERS for M in (16, 2048, 8192) for R in (16, 64, 128, 256))


def measure(M: int, K: int, N: int, R: int, dtype: torch.dtype, transposed: bool = True) -> dict:
    """Times every tile and both numbers of launches for one shape on the current GPU; returns the entry of the best,
    with "times", what each took: [*tile, single, us].

    `transposed`: the orientation of forward, else that of the gradient of x. A tile that does not compile or run here
    is reported and passed over.
    """
    from triton.testing import do_bench

    from .. import extended, launch

    p = testing.problem(M, K, N, R, dtype=dtype, device="cuda")
    tf32, on = launch.tf32(dtype), device.target(p.x.get_device())
    operands = (p.x, p.weight, p.lora_A, p.lora_N, p.lora_B)
    if not transposed:
        operands = (p.x, p.weight.T.contiguous(), p.lora_A.T.contiguous(), p.lora_N, p.lora_B.T.contiguous())
    times = {}
    for tile in rule.candidates(M, dtype, tf32, True, on):
        for single in (False, True) if tile.m >= 64 and R <= 256 else (False,):

            def step(tile=tile, single=single):
                return extended.product(*operands, None, 1.0, transposed=transposed, tile=tile, single=single)

            try:
                times[tile, single] = do_bench(step, warmup=25, rep=100, return_mode="median")
            except Exception as error:
                print(f"{tile} in {1 if single else 2} launches: {type(error).__name__}: {error}")
    by_rule = rule.wide_tile(M, N, dtype, tf32, True, on)
    by_rule = by_rule, rule.single_launch(M, R, dtype, True, by_rule, on)
    (tile, single), best = min(times.items(), key=lambda item: item[1])
    return {
        "dtype": short(dtype),
        "tf32": tf32,
        "shape": [M, N, K, R],
        "transposed": transposed,
        "tile": list(tile),
        "single": single,
        "us": round(1000 * best, 2),
        "rule_us": round(1000 * times.get(by_rule, best), 2),
        "times": [[*tile, single, round(1000 * ms, 2)] for (tile, single), ms in times.items()],
    }


def tune(folder: Path | str | None = None, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Measures SHAPES in both orientations on the current GPU and writes its table; returns the file.

    It goes to the user's cache folder where none is given. Raises ValueError where Triton cannot run on a GPU.
    """
    reason = triton.unavailable() or (device.interpreted() and "TRITON_INTERPRET is set")
    if reason:
        raise ValueError(f"tuning needs a GPU on which Triton runs: {reason}")
    from .. import launch

    # Where it cannot be written is found out before minutes are spent.
    folder = cache.folder() / "tuned" if folder is None else folder
    entries = [measure(*shape, dtype, transposed) for shape in SHAPES for transposed in (True, False)]
    file = tables.save(entries, folder, device.of(torch.cuda.current_device()))
    tables.forget()
    launch.forget_plans()
    return file
