"""Runs a command that may hang or crash: in a process group of its own, with an end to its time.

What becomes of the command stays with it. It ends as one of STATUSES, its output goes to a file, and nothing that it
started outlives it. Where the caller is killed, the command is too (on Linux).
"""

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

STATUSES = ("ok", "failed", "timeout", "crashed")

# Seconds that a killed process gets to disappear: one that waits in a driver may never do.
GRACE = 5.0
# How much of the end of the output is looked at.
TAIL_BYTES = 1 << 16
# Seconds between two looks at a running command.
TICK = 0.01
PR_SET_PDEATHSIG = 1


class Ended(NamedTuple):
    """How a command ended.

    status: "ok" for exit status 0, "failed" for another, "crashed" for a signal, "timeout" where it was killed.
    seconds: how long it ran. code: its exit status, minus the signal, or None while it does not die.
    lines: the last lines of its output.
    """

    status: str
    seconds: float
    code: int | None
    lines: list[str]


class Child(NamedTuple):
    """A command that was started: its process, when on the monotonic clock, and its output from `offset` on."""

    process: subprocess.Popen
    begun: float
    output: BinaryIO
    offset: int


def run(
    command: Sequence[str | Path],
    timeout: float,
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    log: str | Path | None = None,
    keep: int = 20,
) -> Ended:
    """Runs a command to its end, or kills it and all that it started after `timeout` seconds.

    Args:
        env, cwd: of the command, by default those of this process.
        log: file for its output and errors together, by default a temporary one.
        keep: how many of the last lines are returned.

    Raises:
        OSError: the command cannot be started, or `log` cannot be written.
    """
    with open(log, "w+b") if log else tempfile.TemporaryFile() as output:
        child = start(command, output, env=env, cwd=cwd)
        return wait(child, lambda: child.begun + timeout, keep=keep)


def start(
    command: Sequence[str | Path],
    output: BinaryIO,
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    held: bool = False,
) -> Child:
    """Starts a command whose output goes to the end of a file; `wait` must follow. `held`: its stdin is a pipe."""
    offset = output.seek(0, os.SEEK_END)
    process = subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.PIPE if held else subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=None if env is None else dict(env),
        cwd=cwd,
        process_group=0,
        preexec_fn=functools.partial(end_with_parent, os.getpid()),
    )
    return Child(process, time.monotonic(), output, offset)


def wait(child: Child, until: Callable[[], float], *, keep: int = 20) -> Ended:
    """Waits for a command, at the longest until `until()` on the monotonic clock, and kills all that is left of it.

    `until` is asked again and again, so that its answer may move while the command makes progress.
    """
    process, late = child.process, False
    try:
        while not late and not ended(child):
            late = time.monotonic() > until()
            time.sleep(TICK)
    finally:
        # Whatever ends the wait, an interrupt included; and what the command left behind when it ended by itself.
        end(child)
    seconds, code = time.monotonic() - child.begun, process.returncode
    if late or code is None:
        status = "timeout"
    elif code < 0:
        status = "crashed"
    else:
        status = "failed" if code else "ok"
    return Ended(status, round(seconds, 2), code, last_lines(child, keep))


def ended(child: Child) -> bool:
    """Whether a command has ended by itself; what is left of it is still to be waited for."""
    if not hasattr(os, "waitid"):
        return child.process.poll() is not None
    # NOTE: not reaped, it keeps the number of its group, so that the signal to the group meets no other.
    return os.waitid(os.P_PID, child.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def end(child: Child) -> None:
    """Kills a command with its whole group, and waits GRACE seconds at the longest until it is gone."""
    process = child.process
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    if process.stdin:
        # Nobody reads what is still in it.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def last_lines(child: Child, keep: int = 20) -> list[str]:
    """The last lines of the output of a command."""
    end = child.output.seek(0, os.SEEK_END)
    child.output.seek(max(child.offset, end - TAIL_BYTES))
    return child.output.read().decode(errors="replace").splitlines()[-keep:] if keep else []


def end_with_parent(parent: int | None = None) -> None:
    """Has the kernel kill this process when the one that started it ends; at once if that is no longer `parent`."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent and os.getppid() != parent:
            os._exit(1)
