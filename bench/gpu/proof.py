"""Everything that a GPU can show of this package in one call of under ten minutes: `make gpu-proof`.

    make gpu-proof                           all stages; results in $OUT, or gpu-results
    make gpu-proof FLAGS="--only bench"      the stages whose names contain a word
    make gpu-proof FLAGS=--resume            what has not passed yet
    make gpu-proof FLAGS=--rehearse          every stage without a GPU, and two that hang and crash

A stage is a process of its own (stage.py) with a time limit, and behind one that hung or crashed a fresh process
multiplies two small matrices: whatever hangs, crashes or spoils its context costs itself alone. Every cell of a stage
is a line of cells.jsonl when it begins and when it ends, and proof.json is written anew after every stage, so a cut at
any moment keeps what was done. This process never starts CUDA. Exit status: 0 if every stage ended as it should.
"""

import argparse
import collections
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from bench.gpu.stage import LEFT, lines_of

ROOT = Path(__file__).resolve().parents[2]

# NOTE: by its file, for the package imports torch.
_spec = importlib.util.spec_from_file_location("process", ROOT / "nlora_kernels" / "process.py")
process = importlib.util.module_from_spec(_spec)
sys.modules["process"] = process
_spec.loader.exec_module(process)

# Where the tools of CUDA are that PATH may not name.
CUDA = "/usr/local/cuda/bin"
SKIPPED = "skipped"
# How a stage or a cell ends, the worst last. "unfinished": its time was over, which says nothing against it.
UNFINISHED = "unfinished"
STATUSES = "ok", "failed", UNFINISHED, "timeout", "crashed"
LINES = 12
# Seconds that are kept for the record at the end, and that a stage must have left to begin.
RESERVE, LEAST = 5, 8
# Seconds of the check behind a stage that hung or crashed, and how often a device that does not answer is asked again.
ALIVE, ATTEMPTS = 40, 2
# Seconds until the first cell begins: of imports, from a disk that nothing was read of, and of the start of CUDA.
STARTUP = 60
# Seconds of the whole, for a machine may be lent for ten minutes.
LIMIT = 560
# How much longer a rehearsal, a build, a stage and a cell of it may take, where the CPU has other work.
SLACK = 6
# How often a stage that hung or crashed goes on behind the cell that did it.
RESTARTS = 6


class Stage(NamedTuple):
    """cells: module:function of this folder, which returns {name: cell}. seconds: of the whole stage; patience: of one
    cell. needs: builds it waits for. rehearsed_in: the environment that a rehearsal adds. sanitizer: the tool of
    compute-sanitizer under which a GPU runs it. ends: how it should end."""

    name: str
    cells: str
    seconds: float = 40
    patience: float = 15
    needs: tuple[str, ...] = ()
    rehearsed_in: dict[str, str] = {}
    sanitizer: str = ""
    ends: str = "ok"


# Of build.py, while stages run: seconds that each may take. Kernels are checked in a build in which every wait ends
# after two seconds, and timed in that of users.
BUILDS = {"device": 200, "bounded": 200, "extension": 200, "triton": 120}

INTERPRETED = {"TRITON_INTERPRET": "1"}
LIBRARY, BOUNDED, EXTENSION, TRITON = ("device",), ("bounded",), ("extension",), ("triton",)
TIMED = EXTENSION + TRITON
# What is most wanted first, behind what it rests on: a cut takes the end.
STAGES = [
    Stage("facts", "facts:cells", STARTUP),
    Stage("probes", "probes:probes", 20, needs=LIBRARY),
    Stage("gemm", "probes:gemm", 40, needs=LIBRARY),
    Stage("kernels", "probes:others", 30, needs=LIBRARY),
    Stage("cuda layers", "layers:cuda", 40, needs=BOUNDED),
    Stage("triton layers", "layers:triton", 40, patience=25, needs=TRITON, rehearsed_in=INTERPRETED),
    Stage("bench engine", "bench:engines", 25, needs=EXTENSION),
    Stage("bench forward", "bench:forward", 40, needs=TIMED),
    Stage("bench both", "bench:both", 25, needs=TIMED),
    Stage("bench backward", "bench:backward", 50, needs=TIMED),
    Stage("graphs", "layers:graphs", 25, 25, BOUNDED + TRITON, rehearsed_in=INTERPRETED),
    Stage("bench layers", "bench:layers", 40, needs=TIMED),
    Stage("triton quantised", "layers:quantised", 40, patience=25, needs=TRITON, rehearsed_in=INTERPRETED),
    Stage("triton dropout", "layers:dropout", 25, patience=25, needs=TRITON, rehearsed_in=INTERPRETED),
    Stage("triton training", "layers:training", 40, patience=25, needs=TRITON, rehearsed_in=INTERPRETED),
    Stage("bench initialisation", "bench:initialisation", 30, needs=TIMED),
    Stage("train", "train:cells", 50, patience=40, needs=TIMED),
    Stage("bench groups", "bench:groups_of_layers", 40, patience=40, needs=TIMED),
    Stage("stress", "stress:cells", 40, 20, BOUNDED + TRITON, rehearsed_in=INTERPRETED),
    Stage("tune", "tune:cells", 40, needs=TRITON),
    Stage("bench compiled", "bench:compiled", 70, patience=60, needs=TIMED),
    Stage("train compiled", "train:compiled", 90, patience=80, needs=TIMED),
    Stage("verify", "verified:cells", 125, patience=125, needs=TIMED),
    Stage("memcheck", "layers:sanitized", 40, 40, EXTENSION, sanitizer="memcheck"),
    Stage("racecheck", "layers:sanitized", 40, 40, EXTENSION, sanitizer="racecheck"),
]
# What a rehearsal adds: the runner itself is what they test.
FAULTS = [
    Stage("hang", "faults:hang", patience=1, ends="timeout"),
    Stage("crash", "faults:crash", ends="crashed"),
]


class Proof:
    def __init__(self, options: argparse.Namespace):
        self.options, self.begun = options, time.monotonic()
        self.slack = SLACK if options.rehearse else 1
        self.out = options.out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.cells = self.out / "cells.jsonl"
        # NOTE: not beside the results, of which a machine may give back only a few files when it is cut off.
        self.scratch = tempfile.TemporaryDirectory()
        done = [line for line in lines_of(self.cells) if line.get("status") == "ok"] if options.resume else []
        replace(self.cells, "".join(json.dumps(line) + "\n" for line in done))
        self.log = open(self.out / "proof.log", "ab" if options.resume else "wb")
        self.builds: dict[str, process.Child | process.Ended] = {}
        self.record = {
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]),
            "rehearsal": options.rehearse,
            "seconds": 0.0,
            "builds": {},
            "stages": self.earlier(),
        }

    def earlier(self) -> dict:
        try:
            return json.loads((self.out / "proof.json").read_text())["stages"] if self.options.resume else {}
        except (OSError, ValueError, KeyError):
            return {}

    def left(self) -> float:
        return self.options.limit - RESERVE - (time.monotonic() - self.begun)

    def run(self, stages: list[Stage]) -> int:
        done = self.record["stages"]
        pending = [stage for stage in stages if done.get(stage.name, {}).get("status") != stage.ends]
        for name in dict.fromkeys(need for stage in pending for need in stage.needs):
            self.builds[name] = self.start(f"build-{name}", ["build", name, *self.rehearse()], held=False)
        self.write()
        alive, following = True, {}
        while pending:
            for name, child in self.builds.items():
                if isinstance(child, process.Child) and process.ended(child):
                    self.built(name, 0)
            # The order is kept but where a build is not ready.
            stage = next(filter(self.ready, pending), pending[0])
            pending.remove(stage)
            if not alive:
                result = {"status": SKIPPED, "why": "the device no longer answers"}
            elif missing := self.missing(stage):
                result = {"status": SKIPPED, "why": missing}
            elif self.left() < LEAST + ALIVE / 4:
                result = {"status": SKIPPED, "why": "no time was left"}
            else:
                child = following.pop(stage.name, None) or self.start(stage.name, self.command(stage), stage)
                # They import what they need while this one runs, and then wait.
                for upcoming in filter(self.ready, pending[:1]):
                    if upcoming.name not in following:
                        following[upcoming.name] = self.start(upcoming.name, self.command(upcoming), upcoming)
                result = self.stage(stage, child)
                alive = result.get("alive", True)
            self.write(stage, result)
        for child in following.values():
            process.end(child)
            self.close(child)
        for build in self.builds:
            self.built(build, 0)
        self.write()
        said = table(self.record)
        print(said, flush=True)
        self.log.write(said.encode())
        return 0 if all(self.record["stages"][s.name]["status"] == s.ends for s in stages) else 1

    def ready(self, stage: Stage) -> bool:
        """Whether all that a stage needs is built, or has failed."""
        children = [self.builds[need] for need in stage.needs]
        return all(isinstance(child, process.Ended) or process.ended(child) for child in children)

    def missing(self, stage: Stage) -> str | None:
        """Waits for what a stage needs; what of it there is not."""
        for need in stage.needs:
            ended = self.built(need, self.left() / 2)
            # Triton compiles beforehand only to save time.
            if need != "triton" and ended.status != "ok":
                return f"{need}: {ended.status}"
        if stage.sanitizer and not self.options.rehearse and not sanitizer():
            return "there is no compute-sanitizer"
        return None

    def built(self, name: str, patience: float) -> process.Ended:
        child = self.builds[name]
        if isinstance(child, process.Ended):
            return child
        end = min(child.begun + self.slack * BUILDS[name], time.monotonic() + patience)
        ended = self.builds[name] = self.close(child, process.wait(child, lambda: end))
        self.record["builds"][name] = {"status": ended.status, "seconds": ended.seconds, "last": ended.lines[-LINES:]}
        return ended

    def command(self, stage: Stage) -> list:
        bounded = ["--bounded"] if "bounded" in stage.needs else []
        return ["stage", stage.cells, "--name", stage.name, "--out", self.out, *bounded, *self.rehearse()]

    def rehearse(self) -> list[str]:
        return ["--rehearse"] if self.options.rehearse else []

    def start(self, name: str, command: list, stage: Stage | None = None, held: bool = True) -> process.Child:
        """Runs a module of this folder with its arguments, which `command` is."""
        environment, under = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}, []
        environment["PATH"] = f"{os.environ.get('PATH', os.defpath)}:{CUDA}"
        if stage and self.options.rehearse:
            environment |= stage.rehearsed_in
        elif stage and stage.sanitizer:
            under = [*sanitizer(), "--tool", stage.sanitizer, "--error-exitcode", "9"]
        command = [*under, sys.executable, "-m", f"bench.gpu.{command[0]}", *command[1:]]
        file = open(Path(self.scratch.name, f"{name.replace(' ', '-')}.log"), "w+b")
        return process.start(command, file, env=environment, cwd=ROOT, held=held)

    def stage(self, stage: Stage, child: process.Child) -> dict:
        """Runs a stage to its end, again and again behind a cell that hung or crashed while its time lasts."""
        begun = time.monotonic()
        end = begun + min(self.slack * stage.seconds, self.left() - ALIVE / 8)
        worst, said, spoilt = "ok", [], False
        for _ in range(1 + RESTARTS):
            before = self.cells.stat().st_size
            ended = self.go(child, end, self.slack * stage.patience)
            said += ended.lines[-LINES:]
            worst = max(worst, ended.status, key=STATUSES.index)
            spoilt |= ended.status not in ("ok", "failed") and ended.code != LEFT
            self.blame(stage, ended)
            stuck = self.cells.stat().st_size == before
            if ended.status in ("ok", "failed", UNFINISHED) or stuck or end - time.monotonic() < LEAST:
                break
            child = self.start(stage.name, self.command(stage), stage)
        result = {"status": worst, "seconds": round(time.monotonic() - begun, 2), "last": said[-LINES:]}
        return {**result, "alive": self.alive()} if spoilt else result

    def go(self, child: process.Child, end: float, patience: float) -> process.Ended:
        size, late = self.cells.stat().st_size, time.monotonic() + max(patience, STARTUP)

        def until() -> float:
            nonlocal size, late
            if self.cells.stat().st_size != size:
                size, late = self.cells.stat().st_size, time.monotonic() + patience
            return min(end, late)

        try:
            child.process.stdin.write(f"{max(1.0, end - time.monotonic() - 1):.1f}\n".encode())
            child.process.stdin.flush()
        except BrokenPipeError:
            pass
        ended = self.close(child, process.wait(child, until, keep=LINES))
        over = ended.code == LEFT or (ended.status == "timeout" and late >= end)
        return ended._replace(status=UNFINISHED) if over else ended

    def blame(self, stage: Stage, ended: process.Ended) -> None:
        """Writes down which cell a stage hung or crashed in, or had no time for."""
        text = self.cells.read_text()
        if text and not text.endswith("\n"):
            # Cut short.
            with open(self.cells, "a") as file:
                file.write("\n")
        begun = {}
        for line in lines_of(self.cells):
            if line["stage"] == stage.name:
                begun[line["cell"]] = "status" in line
        unfinished = [cell for cell, complete in begun.items() if not complete]
        with open(self.cells, "a") as file:
            for cell in unfinished:
                end = {"stage": stage.name, "cell": cell, "status": ended.status, "error": " | ".join(ended.lines[-3:])}
                file.write(json.dumps(end) + "\n")

    def alive(self) -> bool:
        """Whether a fresh process can still multiply on the device."""
        for _ in range(ATTEMPTS):
            check = self.start("alive", ["stage", "alive", *self.rehearse()])
            ended = self.go(check, time.monotonic() + min(ALIVE, max(LEAST, self.left())), ALIVE)
            if ended.status == "ok":
                return True
        return False

    def close(self, child: process.Child, ended: process.Ended | None = None) -> process.Ended | None:
        """Puts the output of a process that has ended behind that of the others."""
        child.output.seek(0)
        said = child.output.read()
        name = Path(child.output.name)
        if said:
            self.log.write(f"\n=== {name.stem}\n".encode() + said)
            self.log.flush()
        child.output.close()
        name.unlink(missing_ok=True)
        return ended

    def write(self, stage: Stage | None = None, result: dict | None = None) -> None:
        if stage:
            cells = {}
            for line in lines_of(self.cells):
                if line["stage"] == stage.name and "status" in line:
                    cells[line["cell"]] = {k: v for k, v in line.items() if k not in ("stage", "cell")}
            self.record["stages"][stage.name] = {**result, "cells": cells}
            why = f" ({result['why']})" if "why" in result else ""
            print(f"{stage.name}: {result['status']}{why}, {passed(cells)} cells", flush=True)
        self.record["seconds"] = round(time.monotonic() - self.begun, 2)
        replace(self.out / "proof.json", json.dumps(self.record, indent=1) + "\n")


def replace(file: Path, text: str) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(file)


def table(record: dict) -> str:
    """One line for each stage, and under it the figures of its cells or what went wrong."""
    lines = [""]
    for name, build in record["builds"].items():
        lines.append(f"{'build ' + name:22} {build['status']:8} {build['seconds']:7.1f}")
    lines += ["", f"{'stage':22} {'status':8} {'seconds':>7}  cells"]
    for name, stage in record["stages"].items():
        cells = stage.get("cells", {})
        row = f"{name:22} {stage['status']:8} {stage.get('seconds', 0):7.1f}  {passed(cells)} {stage.get('why', '')}"
        lines.append(row.rstrip())
        if stage["status"] != "ok" and all(cell["status"] == "ok" for cell in cells.values()):
            # Nothing of its cells says why.
            lines += [f"    {line[:160]}" for line in stage.get("last", [])[-2:]]
        for cell, result in cells.items():
            figures = {k: v for k, v in result.items() if k not in ("status", "seconds", "error", "times")}
            if result["status"] != "ok":
                lines.append(f"    {cell}: {result['status']}: {str(result.get('error', ''))[:160]}")
            if figures:
                lines.append(f"    {cell}: " + "  ".join(f"{k} {figure(v)}" for k, v in figures.items()))
    counts = collections.Counter(stage["status"] for stage in record["stages"].values())
    total = ", ".join(f"{count} {status}" for status, count in counts.items())
    return "\n".join([*lines, f"{total}; {record['seconds']:.0f} s"]) + "\n"


def figure(value) -> str:
    """Of a contender its ratio to the base; else the value."""
    return f"{value['ratio']:.3f}" if isinstance(value, dict) else str(value)


def passed(cells: dict) -> str:
    return f"{sum(cell['status'] == 'ok' for cell in cells.values())} of {len(cells)}"


@functools.cache
def sanitizer() -> list[str] | None:
    """compute-sanitizer for kernels of ours alone, as its versions call the option; None where there is none."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=CUDA)
    said = output([tool, "--help"]) if tool else ""
    option = next((name for name in ("--kernel-name", "--kernel-regex") if name in said), None)
    return tool and [tool, *((option, "kns=nlora") if option else ())]


def output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of the results")
    parser.add_argument(
        "--limit", type=float, help=f"seconds of the whole, default {LIMIT}, {SLACK} times it to rehearse"
    )
    parser.add_argument(
        "--only", default="", metavar="WORDS", help="stages whose names contain one of these, by commas"
    )
    parser.add_argument("--resume", action="store_true", help="go on with what has not passed in the same folder")
    parser.add_argument(
        "--rehearse", action="store_true", help="without a GPU, with a stage that hangs and one that crashes"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the stages")
    options = parser.parse_args(given)
    options.limit = options.limit or LIMIT * (SLACK if options.rehearse else 1)
    return options


def main() -> int:
    options = arguments()
    stages = STAGES[:2] + FAULTS + STAGES[2:] if options.rehearse else STAGES
    stages = [stage for stage in stages if any(word in stage.name for word in options.only.split(","))]
    if not stages:
        sys.exit(f"--only must name stages among {', '.join(s.name for s in STAGES)}, got {options.only!r}")
    if options.list:
        print("\n".join(stage.name for stage in stages))
        return 0
    return Proof(options).run(stages)


if __name__ == "__main__":
    sys.exit(main())
