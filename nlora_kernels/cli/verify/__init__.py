"""python -m nlora_kernels verify: proves fused kernels on the user's own GPU and has them chosen where they are faster.

Each backend is tried for each dtype in a process of its own (`child`), which may hang or crash and costs its own result
alone. It reports figures, and this process, which never touches the device, judges them: everything that was asked for
must be there (`cases`), every error within its budget, repeats and graphs equal to the bit; and some results are
computed again here, from data that the child did not know before. What passed, and how long it took beside "lean", is
the record by which `backends.select` chooses (`backends.verified`).
"""

import argparse
import datetime
import json
import math
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ... import backends, cache, process
from ...backends import verified
from ...backends.base import short
from . import child, protocol
from .cases import REAL, REHEARSED, REPLAYS, Case, Sizes, cases_of
from .layers import layer_of

HELP = "prove the fused kernels on this GPU and have them chosen where they are faster; exit status 1 if one fails"

# Seconds: of everything; of one backend and dtype; of asking what the machine is; and too few to begin anything with.
LIMIT, PATIENCE, GREETING, TOO_FEW = 115.0, 40.0, 30.0, 3.0
# The same where nothing waits for a GPU: interpreted kernels are slow on a busy machine.
LIMIT_OF_REHEARSAL, PATIENCE_IN_REHEARSAL, HANGS = 800.0, 400.0, 10.0
# Backends whose kernels are compiled when they are first launched, and how many processes do so beforehand.
COMPILED_AT_USE, COMPILERS = ("triton",), 8
# What stands in for GPU kernels in rehearsal, what goes wrong with it, and how it must end.
REHEARSAL = (
    ("cpu", "float32", None, "passed"),
    ("triton", "float16", None, "passed"),
    ("lean", "float32", "hang", "timeout"),
    ("lean", "float32", "crash", "crashed"),
    ("lean", "float32", "lie", "failed"),
)
NOT_TRIED = "not tried, for the time was over: run it again, for what has been compiled is kept"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", type=int, default=0, metavar="INDEX", help="as torch counts, default %(default)s")
    default = f"default {LIMIT:.0f}, with --rehearse {LIMIT_OF_REHEARSAL:.0f}"
    parser.add_argument("--limit", type=float, metavar="SECONDS", help=f"end after so long, {default}")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="go through all of it without a GPU, with processes that hang, crash and lie; no record is kept",
    )


def run(args: argparse.Namespace) -> int:
    file, results = verify(args.gpu, rehearse=args.rehearse, limit=args.limit)
    print("no record was written" if args.rehearse else f"wrote {file}")
    return 0 if all(result.well for result in results) else 1


class Result(NamedTuple):
    """How a backend did for a dtype: "passed", "failed", "timeout", "crashed" or "unavailable", and why.

    expected: the status that it had to have.
    """

    backend: str
    dtype: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    expected: str = "passed"

    @property
    def well(self) -> bool:
        return self.status in (self.expected, "unavailable")


class Trial(NamedTuple):
    """What a child was asked, how it ended, and what it reported."""

    task: dict[str, Any]
    ended: process.Ended
    lines: list[Any]

    def nonce_is_right(self) -> bool:
        first = self.lines[0] if self.lines else None
        return isinstance(first, dict) and first.get("nonce") == self.task["nonce"]


def verify(
    gpu: int = 0, *, rehearse: bool = False, limit: float | None = None, say: Callable[[str], None] = print
) -> tuple[Path, list[Result]]:
    """Verifies every backend on a GPU and writes the record; returns its file and the results.

    The record is in force in processes that start afterwards, and in this one. It is written after every result, so
    that what is cut short keeps what was done.

    Args:
        gpu: its index, as torch counts.
        rehearse: the whole procedure without a GPU: on the CPU, on small layers, with processes that hang, crash and
            lie; the record is read back, and not kept.
        limit: seconds after which nothing is begun and what runs is ended, by default 115, and 800 in rehearsal.
        say: is given lines of text on the way.

    Raises:
        ValueError: there is no such GPU or it does not answer, or there are no kernels for it; says what is needed.
        OSError: the record cannot be written.
    """
    if limit is not None and not limit > 0:
        raise ValueError(f"limit must be a positive number of seconds, got {limit}")
    deadline = time.monotonic() + (limit or (LIMIT_OF_REHEARSAL if rehearse else LIMIT))
    with tempfile.TemporaryDirectory() as scratch:
        run = _Run(gpu, rehearse, Path(scratch), deadline)
        machine = run.ask()
        identity, reasons = machine["identity"], machine["backends"]
        say("{gpu}, capability {capability}, driver {driver}, torch {torch}, triton {triton}".format(**identity))
        todo = REHEARSAL if rehearse else _on_gpu(reasons)
        file = Path(scratch, "record.json") if rehearse else verified.file_of(identity)
        results: list[Result] = []
        times: list[dict[str, Any]] = []
        # That it can be written is found out before the work.
        _store(file, identity, results, times)
        run.compile([(b, dtype) for b, dtype, *_ in todo if b in COMPILED_AT_USE and not reasons[b]])
        silent = ""
        for backend, dtype, fault, expected in todo:
            result, found = Result(backend, dtype, "unavailable", reasons[backend] or ""), []
            if silent and not reasons[backend]:
                result = Result(backend, dtype, "failed", f"not tried: {silent}")
            elif not reasons[backend]:
                result, found = run.prove(backend, dtype, fault, identity)
            results.append(result._replace(expected=expected))
            times += found
            _store(file, identity, results, times)
            say(_line(result))
            if result.status not in ("passed", "unavailable") and not silent and deadline - time.monotonic() > TOO_FEW:
                try:
                    run.ask()
                except ValueError as error:
                    silent = str(error)
        if record := verified.read(file):
            say(table(record))
    backends.forget()
    return file, results


class _Run:
    """One verification: what all its children share."""

    def __init__(self, gpu: int, rehearse: bool, scratch: Path, deadline: float):
        self.gpu, self.rehearse, self.scratch, self.deadline = gpu, rehearse, scratch, deadline
        self.sizes: Sizes = REHEARSED if rehearse else REAL

    def ask(self) -> dict[str, Any]:
        """What the machine is. ValueError if it does not answer as it should."""
        trial = self.start({}, PATIENCE_IN_REHEARSAL if self.rehearse else GREETING)
        if trial.ended.status != "ok":
            raise ValueError(f"the GPU does not answer: {_how(trial.ended)}")
        machine = trial.lines[0] if trial.nonce_is_right() else {}
        if missing := machine.get("missing"):
            raise ValueError(
                f"verify needs GPU {self.gpu}, from compute capability 8.0 on, that torch sees: {missing}. "
                "`--rehearse` runs without one"
            )
        # The sum of a known product.
        few = torch.arange(64.0).view(8, 8)
        if machine.get("alive") != (few @ few).sum().item():
            raise ValueError("the GPU does not answer: a small product came out wrong")
        return machine

    def compile(self, todo: list[tuple[str, str]]) -> None:
        """Has the kernels of all cases compiled into the cache of their compiler, by several processes at once."""
        if self.rehearse or not todo:
            return
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = min(COMPILERS, cores)
        tasks = [{"compile": todo, "slice": [i, count]} for i in range(count)]
        # Half the time that is left: what is not ready by then is compiled when it is needed.
        patience = (self.deadline - time.monotonic()) / 2
        with ThreadPoolExecutor(count) as pool:
            try:
                list(pool.map(lambda task: self.start(task, patience), tasks))
            except BaseException:
                # The pool waits for its threads, and they for their children.
                self.deadline = 0.0
                raise

    def prove(
        self, backend: str, dtype: str, fault: str | None, identity: dict[str, Any]
    ) -> tuple[Result, list[dict[str, Any]]]:
        """Has a child run all cases, and judges what it says; with the times if it passed."""
        if self.deadline - time.monotonic() < TOO_FEW:
            return Result(backend, dtype, "timeout", NOT_TRIED), []
        task = {"backend": backend, "dtype": dtype} | ({"fault": fault} if fault else {})
        patience = HANGS if fault == "hang" else PATIENCE_IN_REHEARSAL if self.rehearse else PATIENCE
        trial = self.start(task, patience)
        asked = cases_of(backend, dtype, self.sizes)
        status, reason, times = "passed", "", []
        if trial.ended.status != "ok":
            done = max(0, len(trial.lines) - 1)
            at = f" at {asked[done].name}" if done < len(asked) else ""
            status, reason = trial.ended.status, _how(trial.ended) + at
        else:
            try:
                times = judge(trial, asked, self.sizes, identity)
            except ValueError as error:
                status, reason = "failed", str(error)
        return Result(backend, dtype, status, reason, trial.ended.seconds), times

    def start(self, task: dict[str, Any], patience: float) -> Trial:
        """Gives a child its task and so many seconds, as far as they are left."""
        task = {"nonce": secrets.token_hex(16), "gpu": self.gpu, "rehearse": self.rehearse} | task
        report = self.scratch / task["nonce"]
        # What names no backend there is what the named one is compared with.
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"NLORA_BACKEND": "lean"}
        if self.rehearse:
            environment["TRITON_INTERPRET"] = "1"
        with tempfile.TemporaryFile() as output:
            started = process.start(command(task, report), output, env=environment)
            ended = process.wait(started, lambda: min(started.begun + patience, self.deadline))
        return Trial(task, ended, protocol.lines_of(report))


def command(task: dict[str, Any], report: Path) -> list[str]:
    """Runs a child, which imports what this process imports."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from {child.__name__} import start; start(*sys.argv[1:])"
    return [sys.executable, "-c", code, json.dumps(task), str(report)]


def judge(trial: Trial, asked: list[Case], sizes: Sizes, identity: dict[str, Any]) -> list[dict[str, Any]]:
    """The times that a child reports, if what it says proves its backend; ValueError says what does not."""
    if not trial.nonce_is_right():
        raise ValueError("its report is not of this run")
    if trial.lines[0].get("identity") != identity:
        raise ValueError("it ran on another machine, or with other kernels")
    found: dict[str, dict[str, Any]] = {}
    for line in trial.lines[1:]:
        name = line.get("case") if isinstance(line, dict) else None
        if not isinstance(name, str) or name in found:
            raise ValueError("its report cannot be understood")
        found[name] = line
    if missing := [case.name for case in asked if case.name not in found]:
        raise ValueError(f"it reports nothing of {missing[0]}" + f" and {len(missing) - 1} more" * (len(missing) > 1))
    if len(found) > len(asked):
        raise ValueError("it reports what was not asked")
    task, times, seconds = trial.task, [], 0.0
    for case in asked:
        figures = found[case.name]
        try:
            seconds += _number(figures["seconds"])
            if "refused" in figures:
                if not case.optional and case.kind != "time":
                    raise ValueError(f"it was refused: {figures['refused']}")
                continue
            _judge_case(case, figures, sizes, task)
            if case.kind == "time":
                us, lean_us = (_number(figures[key]) for key in ("us", "lean_us"))
                # Half of the rounds took at least the median.
                if not 0 < (us + lean_us) * sizes.rounds / 2e6 <= figures["seconds"] or not us or not lean_us:
                    raise ValueError(f"its times cannot be: {us} and {lean_us} us in {figures['seconds']} s")
                named = {"backend": task["backend"], "dtype": task["dtype"], "operation": case.detail}
                times.append(named | {"adapter": case.adapter, "shape": case.shape, "us": us, "lean_us": lean_us})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{case.name}: its report lacks {error}") from error
        except ValueError as error:
            raise ValueError(f"{case.name}: {error}") from error
    if seconds > trial.ended.seconds + 1:
        raise ValueError(f"it says that it took {seconds:.1f} s, and ran for {trial.ended.seconds:.1f}")
    return times


def _judge_case(case: Case, figures: dict[str, Any], sizes: Sizes, task: dict[str, Any]) -> None:
    """ValueError unless the figures of a case are as they must be."""
    if case.kind == "witness":
        layer = layer_of(case, task["backend"], task["dtype"], torch.device("cpu"), protocol.seed_of(task))
        outputs = figures["outputs"]
        if outputs.keys() != case.results:
            raise ValueError(f"it gives {sorted(outputs) or 'no results'}, not {sorted(case.results)}")
        try:
            layer.budget().check({name: protocol.decoded(stored) for name, stored in outputs.items()})
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"computed again, {error}") from error
    elif case.kind in ("budget", "time"):
        errors = figures["errors"]
        if errors.keys() != case.results:
            raise ValueError(f"it gives errors of {sorted(errors)}, not of {sorted(case.results)}")
        for name, pairs in errors.items():
            if len(pairs) != 2:
                raise ValueError(f"it gives {len(pairs)} errors of {name}, not 2")
            for error, bound in pairs:
                if not _number(error) <= _number(bound):
                    raise ValueError(f"{name} is off by {error:.3g}, the budget is {bound:.3g}")
    else:
        runs, differing = (_number(figures[key]) for key in ("runs", "differing"))
        expected = sizes.runs if case.kind == "repeats" else REPLAYS
        if runs != expected or differing:
            raise ValueError(f"{differing:.0f} elements differ in {runs:.0f} runs of {expected}")


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError(f"a figure must be a finite number of at least 0, got {value!r}")
    return value


def _how(ended: process.Ended) -> str:
    """How a child ended, and the last that it said."""
    last = next((line.strip() for line in reversed(ended.lines) if line.strip()), "")
    what = {
        "timeout": f"it was ended after {ended.seconds:.0f} s",
        "crashed": f"it was killed by signal {-(ended.code or 0)}",
        "failed": f"exit status {ended.code}",
        "ok": "exit status 0",
    }[ended.status]
    return f"{what}: {last}" if last else what


def _on_gpu(reasons: dict[str, str | None]) -> list[tuple[str, str, None, str]]:
    """The backends and dtypes to verify. ValueError if none can run."""
    names = [name for name in backends.ON_GPU if reasons.get(name) is None]
    if not names:
        why = "; ".join(f"{name}: {reasons[name]}" for name in backends.ON_GPU)
        raise ValueError(f"verify needs kernels that can run on this GPU, and there are none ({why})")
    return [
        (name, short(dtype), None, "passed") for name in backends.ON_GPU for dtype in backends.TABLE[name].proved_for
    ]


def _store(file: Path, identity: dict[str, Any], results: list[Result], times: list[dict[str, Any]]) -> None:
    keys = ("backend", "dtype", "status", "reason", "seconds")
    record = {
        "identity": identity,
        "written": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "results": [{key: getattr(result, key) for key in keys} for result in results],
        "times": times,
    }
    cache.write(file, json.dumps(record, indent=1) + "\n")


def _line(result: Result) -> str:
    said = f"  {result.backend:<10}{result.dtype:<10}{result.status:<12}{result.seconds:5.1f} s"
    return f"{said}  {result.reason}" if result.reason else said


def table(record: verified.Record) -> str:
    """What is chosen from now on, by shape: for adapters in fp32, as PEFT keeps them."""
    lines, shapes = [], {}
    for (_, dtype, operation, adapter), times in record.times.items():
        if adapter == "float32" and operation in ("forward", "backward"):
            shapes.setdefault(dtype, {}).update(dict.fromkeys(time.shape for time in times))
    for dtype, of_dtype in shapes.items():
        lines += ["", f'{dtype}, time over that of "lean"; the first of a list is chosen, if any is below 1']
        lines += [f"  {'M x K x N, rank':<26}{'forward':<34}backward"]
        for M, K, N, R in of_dtype:
            columns = [_ratios(record, dtype, operation, (M, K, N, R)) for operation in ("forward", "backward")]
            lines += [f"  {f'{M} x {K} x {N}, {R}':<26}{columns[0]:<34}{columns[1]}"]
    return "\n".join(lines) if lines else "no kernels passed: library calls go on computing on this GPU"


def _ratios(record: verified.Record, dtype: str, operation: str, shape: tuple[int, ...]) -> str:
    found = {
        backend: time.ratio
        for (backend, *key), times in record.times.items()
        if key == [dtype, operation, "float32"]
        for time in times
        if time.shape == shape
    }
    return ", ".join(f"{backend} {ratio:.2f}" for backend, ratio in sorted(found.items(), key=lambda item: item[1]))
