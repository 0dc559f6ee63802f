"""Single launches under load: 10⁵ steps beside competing streams, each with the same bits as the first.

For Triton a step is a forward, for CUDA forward and backward.
"""

import os
import sys
import threading

import record
import torch

from nlora_kernels import testing

LAUNCHES = 100_000
# Seconds without progress after which a wait is taken for a hang.
PATIENCE = 120


def triton_step(p):
    from nlora_kernels.backends.triton import extended

    operands = (p.x, p.weight, p.lora_A, p.lora_N, p.lora_B, p.bias)
    return lambda: extended.widen(*operands, p.scaling, transposed=True, single=True)


def cuda_step(p):
    from nlora_kernels.backends import Needs, cuda

    adapter = p.weight, p.lora_A, p.lora_B, p.lora_N
    everything = Needs(x=True, weight=False, lora_A=True, lora_B=True, lora_N=True, bias=False)

    def step():
        y, T = cuda.forward(p.x, *adapter, p.bias, p.scaling)
        grads = cuda.backward(p.dy, p.x, T, *adapter, p.scaling, everything)
        return y, T, *(grad for grad in grads if grad is not None)

    return step


STEPS = {"triton": triton_step, "cuda": cuda_step}


def launches(backend, M, K, N, R, dtype, streams, graph=False) -> dict:
    """`streams` streams launch at once while another keeps the processors busy with products of varying size."""
    step = STEPS[backend](testing.problem(M, K, N, R, dtype=dtype, device="cuda"))
    progress = threading.Event()
    ended = threading.Event()

    def watch():
        while not ended.is_set():
            if not progress.wait(PATIENCE):
                print(f"no progress for {PATIENCE} seconds: the single launch hangs", flush=True)
                os._exit(1)
            progress.clear()

    threading.Thread(target=watch, daemon=True).start()
    try:
        expected = [t.clone() for t in step()]
        busy, sides = torch.cuda.Stream(), [torch.cuda.Stream() for _ in range(streams)]
        noise = [torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for n in (512, 2048, 3072)]
        run = step
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                outputs = step()

            def run():
                captured.replay()
                return outputs

        torch.cuda.synchronize()
        per_round = 200
        for round_ in range(LAUNCHES // (per_round * streams)):
            with torch.cuda.stream(busy):
                for _ in range(4):
                    noise[round_ % 3] @ noise[round_ % 3]
            differing = []
            # One launch of each stream in turn, so that they overlap.
            for _ in range(per_round):
                for side in sides:
                    with torch.cuda.stream(side):
                        results = run()
                        differing += [(a != b).sum() for a, b in zip(results, expected, strict=True)]
            torch.cuda.synchronize()
            wrong = torch.stack(differing).sum().item()
            assert wrong == 0, f"{wrong} elements differ in round {round_}"
            progress.set()
        return {"launches": LAUNCHES}
    finally:
        ended.set()
        progress.set()


def cells():
    bf16, fp16 = torch.bfloat16, torch.float16
    found = {}
    for backend in STEPS:
        found |= {
            f"{backend} bf16 2048x768x768 r16, one stream": lambda b=backend: launches(b, 2048, 768, 768, 16, bf16, 1),
            f"{backend} bf16 2048x768x768 r64, three streams": lambda b=backend: launches(
                b, 2048, 768, 768, 64, bf16, 3
            ),
            f"{backend} fp16 1000x520x392 r24, one stream": lambda b=backend: launches(b, 1000, 520, 392, 24, fp16, 1),
            f"{backend} bf16 2048x768x768 r16, graph": lambda b=backend: launches(b, 2048, 768, 768, 16, bf16, 1, True),
        }
    return found


if __name__ == "__main__":
    sys.exit(record.run("stress", cells, seconds_per_cell=100))
