"""What the stages need of a device beyond what `verify` does, and the same of a CPU for a rehearsal of them."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import torch

from bench import timing
from nlora_kernels.backends import native
from nlora_kernels.cli.verify import machine

ROUNDS, WARM_MS = 30, 300


class Stage:
    """What either of them does for a stage. `out` is the folder of the results."""

    out: Path | None

    def sound(self, backend: str) -> bool:
        """Whether no cell that checks the layers of a backend hung or crashed: it would take the others with it."""
        cells = self.checked(f"{backend} layers").values()
        return not any(cell["status"] in ("timeout", "crashed") for cell in cells)

    def checked(self, stage: str) -> dict[str, dict]:
        """The cells of a stage that has ended, by name."""
        try:
            return json.loads((self.out / "proof.json").read_text())["stages"][stage]["cells"]
        except (OSError, ValueError, KeyError):
            return {}

    def schedule(self) -> dict[str, float | str]:
        """Has the CUDA engine plan by the bytes a cycle that "facts" measured; what it plans by, for the figures."""
        measured = self.checked("facts").get("bytes per cycle and processor", {}).get("all")
        if not measured:
            return {"bytes_per_cycle": "default"}
        native._C.cuda_set_bytes_per_cycle(measured)
        return {"bytes_per_cycle": measured}

    def by_turns(
        self, functions: dict[str, Callable], rounds: int = ROUNDS, warm_ms: float = WARM_MS, queued: bool = False
    ) -> dict:
        """{name: milliseconds of each round}, one function after the other, after `warm_ms` of them all. `queued`: of
        the device alone, as for graphs."""
        return timing.by_turns(functions, lambda function: self.milliseconds([function], queued), rounds, warm_ms)


class Gpu(Stage, machine.Gpu):
    """The first CUDA device."""

    rehearsal = False
    name = "cuda"

    def __init__(self, out: Path | None):
        super().__init__(0)
        self.out = out

    def pick(self, real, rehearsed):
        """What a stage runs on a GPU, or in a rehearsal."""
        return real

    def answers(self) -> bool:
        """Whether the device still serves this process: an error that sticks ends that."""
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def forget(self) -> None:
        torch.cuda.empty_cache()

    def clock(self) -> dict[str, int]:
        """{"mhz": of the processors, as the work before left it}; nothing where the driver does not say."""
        try:
            return {"mhz": torch.cuda.clock_rate()}
        except Exception:
            # NOTE: by a package that may be missing, and a call that a virtual machine may refuse.
            return {}

    def stream(self):
        return torch.cuda.Stream()

    def on(self, stream):
        """Launches go to a stream."""
        return torch.cuda.stream(stream)

    def peak(self, step) -> int:
        """Bytes that a step allocates at most beyond what is there."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


class Rehearsal(Stage, machine.Host):
    """A CPU in its place: what is captured is run again, and times mean nothing."""

    rehearsal = True
    name = "cpu"

    def __init__(self, out: Path | None):
        super().__init__()
        torch.set_num_threads(1)
        self.out = out

    def by_turns(self, functions, rounds=2, warm_ms=0, queued=False) -> dict:
        return super().by_turns(functions, 2, 0)

    def pick(self, real, rehearsed):
        return rehearsed

    def answers(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def forget(self) -> None:
        pass

    def clock(self) -> dict[str, int]:
        return {}

    def stream(self):
        return None

    def on(self, stream):
        return contextlib.nullcontext()

    def peak(self, step) -> int:
        step()
        return 0
