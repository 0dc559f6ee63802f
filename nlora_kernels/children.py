"""Commands in process groups of their own: what hangs or crashes costs its own time and nothing else.

Linux alone: there the kernel also ends the children of a process that is killed.
"""

import ctypes
import functools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

OK, FAILED, TIMEOUT, CRASHED = "ok", "failed", "timeout", "crashed"
# Seconds that a killed process may take to go, for its driver gives the device's memory back first.
GOING = 10
PR_SET_PDEATHSIG = 1


class Child(NamedTuple):
    process: subprocess.Popen
    begun: float  # on the monotonic clock


class Ended(NamedTuple):
    """How a child ended: "ok" with exit status 0, "failed" with another, "crashed" by a signal, or by "timeout"."""

    status: str
    code: int | None  # None where even SIGKILL did not end it
    seconds: float


def start(command: Sequence, output: IO, **options) -> Child:
    """Starts a command as leader of a process group; both its streams go to `output`, and its stdin is a pipe."""
    process = subprocess.Popen(
        [str(word) for word in command],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        process_group=0,
        preexec_fn=functools.partial(end_with_parent, os.getpid()),
        **options,
    )
    return Child(process, time.monotonic())


def wait(child: Child, until: Callable[[], float]) -> Ended:
    """Waits for a child, at the longest until `until()` on the monotonic clock, then ends its whole group.

    `until` is asked again and again, so that its answer may move while the child makes progress.
    """
    late = False
    # NOTE: a process that has ended but is not reaped keeps the number of its group, so the signal meets no other's.
    while not late and os.waitid(os.P_PID, child.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        late = time.monotonic() > until()
        time.sleep(0.01)
    code = end(child)
    seconds = time.monotonic() - child.begun
    if late or code is None:
        return Ended(TIMEOUT, code, seconds)
    return Ended(CRASHED if code < 0 else FAILED if code else OK, code, seconds)


def run(command: Sequence, timeout: float, output: IO, **options) -> Ended:
    """Runs a command, whose stdin is empty, for at most `timeout` seconds."""
    child = start(command, output, **options)
    child.process.stdin.close()
    return wait(child, lambda: child.begun + timeout)


def end(child: Child) -> int | None:
    """Kills a child with its whole group; returns its exit status, None if it does not go."""
    if child.process.returncode is None:
        os.killpg(child.process.pid, signal.SIGKILL)
    try:
        code = child.process.wait(GOING)
    except subprocess.TimeoutExpired:
        return None
    child.process.stdin.close()
    return code


def last_lines(file: Path, begin: int = 0, count: int = 20) -> list[str]:
    """The last lines of what a file holds from byte `begin` on."""
    with open(file, "rb") as stream:
        stream.seek(max(begin, stream.seek(0, os.SEEK_END) - 500 * count))
        return stream.read().decode(errors="replace").splitlines()[-count:]


def end_with_parent(parent: int | None = None) -> None:
    """Has the kernel kill this process when the one that started it ends; at once if that is no longer `parent`."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent and os.getppid() != parent:
        os._exit(1)
