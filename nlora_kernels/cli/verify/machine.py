"""The machine that a child runs on: a GPU, or the CPU in its place, for rehearsal."""

import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from ...backends import verified

# Cycles in which the host launches a graph: about 100 us.
QUEUEING = 200_000


class Gpu:
    """A device, and what only it does: work beside other work, graphs, and time."""

    def __init__(self, index: int):
        torch.cuda.set_device(index)
        self.device = torch.device("cuda", index)
        self.cache_bytes = torch.cuda.get_device_properties(index).L2_cache_size
        self.busy = torch.cuda.Stream()
        self.noise = [torch.randn(n, n, device=self.device, dtype=torch.bfloat16) for n in (512, 2048, 3072)]

    def identity(self) -> dict:
        return verified.identity(self.device.index)

    def load(self, turn: int) -> None:
        """Keeps another stream busy for a while, with products of varying size."""
        with torch.cuda.stream(self.busy):
            self.noise[turn % 3] @ self.noise[turn % 3]

    def capture(self, step: Callable, prepare: Callable = tuple) -> tuple[Callable, Sequence[Tensor]]:
        """A replay of `step`, which gets what `prepare` returns, and the tensors that it writes."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # NOTE: a backward runs on the stream of its forward, which has to be that of the capture.
            arguments = prepare()
            for _ in range(3):
                step(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outputs = step(*arguments)

        # NOTE: a graph holds the addresses alone of what it reads.
        def replay(kept=(step, arguments)):
            graph.replay()

        return replay, outputs

    def milliseconds(self, calls: Sequence[Callable], queued: bool = False) -> float:
        """What the calls take. `queued`: all are launched while the device is still busy, so that it is the device's
        own time; else the host's is in it where the device waits for it, as it does for users."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if queued:
            torch.cuda._sleep(QUEUEING)
        begin.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


class Host:
    """The CPU in the place of a GPU, for rehearsal."""

    def __init__(self):
        self.device = torch.device("cpu")
        self.cache_bytes = 0

    def identity(self) -> dict:
        return verified.identity_of(SimpleNamespace(name="rehearsal", major=0, minor=0, multi_processor_count=0))

    def load(self, turn: int) -> None:
        pass

    def capture(self, step: Callable, prepare: Callable = tuple) -> tuple[Callable, Sequence[Tensor]]:
        arguments = prepare()
        outputs = [t.detach().clone() for t in step(*arguments)]

        def replay():
            for old, new in zip(outputs, step(*arguments), strict=True):
                old.copy_(new.detach())

        return replay, outputs

    def milliseconds(self, calls: Sequence[Callable], queued: bool = False) -> float:
        begun = time.perf_counter()
        for call in calls:
            call()
        return 1000 * (time.perf_counter() - begun)


Machine = Gpu | Host
