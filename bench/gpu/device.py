"""What the stages need of a device, and the same of a CPU for a rehearsal of them."""

import contextlib
import time
from pathlib import Path

import torch

ROUNDS = 30


class Gpu:
    """The current CUDA device."""

    rehearsal = False
    name = "cuda"

    def __init__(self, out: Path | None):
        # The folder of the results.
        self.out = out

    def begin(self) -> None:
        torch.cuda.init()

    def pick(self, real, rehearsed):
        """What a stage runs on a GPU, or in a rehearsal."""
        return real

    def multiply(self) -> None:
        a = torch.ones(64, 64, device=self.name)
        assert (a @ a).sum().item() == 64**3

    def answers(self) -> bool:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def forget(self) -> None:
        torch.cuda.empty_cache()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def stream(self):
        return torch.cuda.Stream()

    def on(self, stream):
        """Launches go to a stream."""
        return torch.cuda.stream(stream)

    def l2(self) -> int:
        return torch.cuda.get_device_properties(0).L2_cache_size

    def capture(self, step, prepare=None):
        """(a function that replays step() as a CUDA graph, what it writes to); what `prepare` returns goes to step."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            arguments = () if prepare is None else (prepare(),)
            for _ in range(2):
                step(*arguments)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outputs = step(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        return graph.replay, outputs

    def by_turns(self, functions: dict, rounds: int = ROUNDS, warm_ms: float = 300) -> dict[str, list[float]]:
        """Milliseconds of each function in each round, one after the other, after `warm_ms` of them all."""
        times, warm = {name: [] for name in functions}, 0.0
        while warm < warm_ms:
            warm += sum(self.milliseconds(function) for function in functions.values())
        for _ in range(rounds):
            for name, function in functions.items():
                times[name].append(self.milliseconds(function))
        return times

    def milliseconds(self, function) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def peak(self, step) -> int:
        """Bytes that a step allocates at most beyond what is there."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


class Rehearsal(Gpu):
    """A CPU that stands in for it: what is captured is run again, and times mean nothing."""

    rehearsal = True
    name = "cpu"

    def begin(self) -> None:
        torch.set_num_threads(1)

    def pick(self, real, rehearsed):
        return rehearsed

    def answers(self) -> bool:
        return True

    def forget(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def stream(self):
        return None

    def on(self, stream):
        return contextlib.nullcontext()

    def l2(self) -> int:
        return 1 << 10

    def capture(self, step, prepare=None):
        arguments = () if prepare is None else (prepare(),)
        outputs = step(*arguments)

        def replay():
            results = step(*arguments)
            with torch.no_grad():
                for output, result in zip(outputs, results, strict=True):
                    output.copy_(result)

        return replay, outputs

    def by_turns(self, functions: dict, rounds: int = 2, warm_ms: float = 0) -> dict[str, list[float]]:
        return super().by_turns(functions, 2, 0)

    def milliseconds(self, function) -> float:
        begun = time.perf_counter()
        function()
        return 1000 * (time.perf_counter() - begun)

    def peak(self, step) -> int:
        step()
        return 0
