"""Generated programs: cut out of an answer, and run against their tests in a process with limits.

A process of its own with limits of time, memory and file sizes, in an empty folder and without the environment, keeps a
clumsy program from doing harm. It is no wall against one that means harm: nothing here takes away the network or the
rights of the user. Run what a model that you do not trust has written inside a container or a virtual machine.
"""

import os
import re
import resource
import signal
import subprocess
import sys
import tempfile

SECONDS = 10
MEMORY = 2**30
WRITTEN = 2**20


def code_of(text: str) -> str:
    """The first fenced block of an answer, else its text as far as it goes on being a program."""
    if block := re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", text, re.DOTALL | re.IGNORECASE):
        return block.group(1)
    # HumanEval's stop words: what follows is another program.
    return re.split(r"\n(?:class |def |#|if __name__|print\(|assert )", text)[0] if text.startswith(" ") else text


def passes(program: str, *, seconds: float = SECONDS, memory: int = MEMORY) -> bool:
    """Whether the program comes to its end within its limits. It runs with the rights of the user."""

    def limit():
        for kind, most in (
            (resource.RLIMIT_CPU, int(seconds) + 1),
            (resource.RLIMIT_AS, memory),
            (resource.RLIMIT_FSIZE, WRITTEN),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(kind, (most, most))

    # A program that leaves by itself before its tests has not passed them: the last line says that it came so far.
    end = "pass" + "ed its tests"
    # NOTE: a file and no pipe, which a child that goes on would keep open.
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", f"{program}\nprint({end!r})"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            preexec_fn=limit,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _kill_group(process)
        out.seek(0)
        return status == 0 and out.read().decode(errors="replace").rstrip().endswith(end)


def _kill_group(process: subprocess.Popen) -> None:
    # With the processes that it started.
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()
