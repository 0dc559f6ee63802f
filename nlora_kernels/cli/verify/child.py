"""What runs on the device, in a process that may hang or crash: `start(TASK, REPORT)`, as `protocol` says."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ... import backends
from ...backends import Call
from .cases import REAL, REHEARSED, Case, Sizes, cases_of, dtype_of
from .checks import KINDS
from .layers import dropout, layer_of
from .machine import Gpu, Host, Machine
from .protocol import seed_of
from .timing import CALLS


def _refusal(case: Case, backend: str, dtype: str, device: torch.device) -> str | None:
    """Why a backend cannot take the call of a case."""
    if case.detail == "lora2_core":
        return None
    M, K, N, R = case.shape
    if case.detail == "lora2_training":
        like = torch.empty(M, dtype=dtype_of(case.adapter), device=device)
        kernels = backends.TABLE[backend].lora2_training([like], max(M, K))
        return None if kernels else "it has no kernels for these adapters"
    if case.detail == "initialisation":
        weight = torch.empty(N, K, dtype=dtype_of(dtype), device=device)
        kernels = backends.TABLE[backend].initialisation(weight, R)
        return None if kernels.subtract_products else "it has no kernels for this weight"

    def empty(rows, cols, to):
        return torch.empty(rows, cols, dtype=dtype_of(to), device=device)

    adapter = (empty(*shape, case.adapter) for shape in ((R, K), (N, R), (R, R)))
    drop = dropout(device) if case.detail == "dropout" else None
    call = Call(empty(M, K, dtype), empty(N, K, dtype), *adapter, dropout=drop)
    return backends.TABLE[backend].unsupported(call)


def run(case: Case, backend: str, dtype: str, machine: Machine, sizes: Sizes, seed: int) -> dict:
    """The figures of a case; or {"refused": why}, by the backend or for want of memory."""
    if refused := _refusal(case, backend, dtype, machine.device):
        return {"refused": refused}
    try:
        return KINDS[case.kind](case, backends.TABLE[backend], dtype, machine, sizes, seed)
    except torch.OutOfMemoryError as error:
        return {"refused": f"memory: {error}"}


def _compile(case: Case, backend: str, dtype: str, machine: Machine) -> None:
    """Launches what a case launches. What goes wrong shows when the case is run."""
    with contextlib.suppress(Exception):
        if _refusal(case, backend, dtype, machine.device):
            return
        if case.kind == "time":
            (ours, _), _ = CALLS[case.detail](case, backends.TABLE[backend], dtype, machine)
            ours[0]()
        else:
            layer_of(case, backend, dtype, machine.device).results()


def _hang(todo: list[Case], report: Callable[[dict], None]) -> None:
    while True:
        time.sleep(1)


def _crash(todo: list[Case], report: Callable[[dict], None]) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _lie(todo: list[Case], report: Callable[[dict], None]) -> None:
    """Says that all is well with what was never run."""
    for case in todo:
        errors = {name: [[0.0, 1.0], [0.0, 1.0]] for name in case.results}
        figures = {"errors": errors, "runs": REHEARSED.runs, "differing": 0, "us": 1.0, "lean_us": 2.0, "outputs": {}}
        report({"case": case.name, **figures, "seconds": 0.0})
    sys.exit(0)


# What goes wrong in rehearsal, and before which case.
FAULTS = {"hang": (_hang, 2), "crash": (_crash, 2), "lie": (_lie, 0)}


def main(task: dict, report: Callable[[dict], None]) -> None:
    greeting = {"nonce": task["nonce"]}
    if not task["rehearse"] and not torch.cuda.is_available():
        report(greeting | {"missing": _why_no_gpu()})
        return
    if not task["rehearse"] and not 0 <= task["gpu"] < torch.cuda.device_count():
        report(greeting | {"missing": f"torch sees {torch.cuda.device_count()}, numbered from 0, got {task['gpu']}"})
        return
    machine = Host() if task["rehearse"] else Gpu(task["gpu"])
    greeting |= {"identity": machine.identity()}
    sizes = REHEARSED if task["rehearse"] else REAL
    if "compile" in task:
        begin, step = task["slice"]
        every = [(case, *pair) for pair in task["compile"] for case in cases_of(*pair, sizes)]
        for case, backend, dtype in every[begin::step]:
            _compile(case, backend, dtype, machine)
        return
    if "backend" not in task:
        few = torch.arange(64.0, device=machine.device).view(8, 8)
        report(greeting | {"backends": backends.available(), "alive": (few @ few).sum().item()})
        return
    report(greeting)
    backend, dtype = task["backend"], task["dtype"]
    todo = cases_of(backend, dtype, sizes)
    fault, before = FAULTS.get(task.get("fault"), (None, None))
    for turn, case in enumerate(todo):
        if turn == before:
            fault(todo[turn:], report)
        begun = time.monotonic()
        found = run(case, backend, dtype, machine, sizes, seed_of(task))
        report({"case": case.name, **found, "seconds": time.monotonic() - begun})


def _why_no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} was built for the CPU alone"
    return "torch.cuda.is_available() is false: no driver, no device, or none that CUDA_VISIBLE_DEVICES shows"


def start(task: str, report: str) -> None:
    with Path(report).open("a") as file:
        main(json.loads(task), lambda line: print(json.dumps(line), file=file, flush=True))
