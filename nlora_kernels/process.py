"""Runs a command that may hang or crash: in a process group of its own, with an end to its time.

What becomes of the command stays with it. It ends as one of STATUSES, its output goes to a file, and nothing that it
started outlives it.
"""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

STATUSES = ("ok", "failed", "timeout", "crashed")

# Seconds that a killed process gets to disappear: one that waits in a driver may never do.
GRACE = 5.0
# How much of the end of the output is looked at.
TAIL_BYTES = 1 << 16


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
        begun = time.monotonic()
        child = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=None if env is None else dict(env),
            cwd=cwd,
            start_new_session=True,
        )
        late = False
        try:
            child.wait(timeout)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            # Whatever ends the wait, an interrupt included; and what the command left behind when it ended by itself.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
        seconds = time.monotonic() - begun
        if late:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GRACE)
        code = child.returncode
        if late:
            status = "timeout"
        elif code < 0:
            status = "crashed"
        else:
            status = "failed" if code else "ok"
        return Ended(status, round(seconds, 2), code, _last_lines(output, keep))


def _last_lines(output, keep: int) -> list[str]:
    end = output.seek(0, os.SEEK_END)
    output.seek(max(0, end - TAIL_BYTES))
    return output.read().decode(errors="replace").splitlines()[-keep:] if keep else []
