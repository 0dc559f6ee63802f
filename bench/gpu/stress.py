"""Launches beside competing streams: 10⁴ steps, each with the same bits as the first.

For Triton a step is a forward in one launch, for CUDA forward and backward.
"""

import functools

import torch

from nlora_kernels import testing

ROUND = 200
# M, K, N, R: launches of one stream, of three, and ragged ones.
SHAPES = [(2048, 768, 768, 16), (2048, 768, 768, 64), (1000, 520, 392, 24)]


def triton_step(p):
    from nlora_kernels.backends.triton import extended

    operands = (p.x, p.weight, p.lora_A, p.lora_N, p.lora_B, p.bias)
    return lambda: extended.product(*operands, p.scaling, transposed=True, single=True)


def cuda_step(p):
    from nlora_kernels.backends import TABLE, Call, Needs

    call = Call(p.x, p.weight, p.lora_A, p.lora_B, p.lora_N, p.bias, p.scaling)
    everything = Needs(x=True, weight=False, lora_A=True, lora_B=True, lora_N=True, bias=False)

    def step():
        y, T = TABLE["cuda"].forward(call)
        grads = TABLE["cuda"].backward(call, p.dy, T, everything)
        return y, T, *(grad for grad in grads if grad is not None)

    return step


STEPS = {"cuda": cuda_step, "triton": triton_step}


def launches(machine, backend, shape, dtype, streams, graph=False) -> dict:
    """`streams` streams launch at once while another keeps the processors busy."""
    step = STEPS[backend](testing.problem(*shape, dtype=dtype, device=machine.name))
    count, per_round = machine.pick((10_000, ROUND), (2 * streams, 1))
    expected = [t.clone() for t in step()]
    sides = [machine.stream() for _ in range(streams)]
    run = step
    if graph:
        replay, outputs = machine.capture(step)

        def run():
            replay()
            return outputs

    machine.synchronize()
    for round_ in range(count // (per_round * streams)):
        for turn in range(4):
            machine.load(round_ + turn)
        differing = []
        # One launch of each stream in turn, so that they overlap.
        for _ in range(per_round):
            for side in sides:
                with machine.on(side):
                    differing += [(a != b).sum() for a, b in zip(run(), expected, strict=True)]
        machine.synchronize()
        wrong = torch.stack(differing).sum().item()
        assert wrong == 0, f"{wrong} elements differ in round {round_}"
    return {"launches": count}


def cells(machine) -> dict:
    from bench.gpu.layers import emulate

    emulate(machine)
    bf16, fp16 = torch.bfloat16, torch.float16
    one_stream, three_streams, ragged = machine.pick(SHAPES, [(37, 72, 136, 16), (37, 72, 136, 16), (70, 64, 40, 8)])
    found = {}
    for backend in STEPS:
        # Triton's interpreter knows no bf16.
        dtype = machine.pick(bf16, fp16)
        one = functools.partial(launches, machine, backend)
        found[f"{backend} one stream"] = functools.partial(one, one_stream, dtype, 1)
        found[f"{backend} three streams"] = functools.partial(one, three_streams, dtype, 3)
        found[f"{backend} ragged"] = functools.partial(one, ragged, fp16, 1)
        found[f"{backend} graph"] = functools.partial(one, one_stream, dtype, 1, True)
    return found
