"""Child processes: how each end is told, and that nothing of a child's group outlives its time or its starter."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nlora_kernels import children

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="process groups that end with their starter need Linux")

# Starts a process that sleeps, says which, and goes on as told.
PARENT = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True); {}"


def run(code, file, timeout=20):
    with open(file, "wb") as output:
        return children.run([sys.executable, "-c", code], timeout, output)


def gone(pid, patience=5.0):
    """Whether a process ends, or is a zombie that nobody reaps."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    ("code", "status", "exit_code"),
    [
        ("print('done')", "ok", 0),
        ("raise SystemExit(3)", "failed", 3),
        ("raise ValueError('wrong')", "failed", 1),
        ("import os; os.abort()", "crashed", -signal.SIGABRT),
        ("import ctypes; ctypes.string_at(0)", "crashed", -signal.SIGSEGV),
        ("import sys; sys.stdin.read(); print('no input')", "ok", 0),
    ],
)
def test_each_end_is_told(code, status, exit_code, tmp_path):
    ended = run(code, tmp_path / "log")
    assert (ended.status, ended.code) == (status, exit_code)


@pytest.mark.parametrize(
    "code",
    [
        "import time; print('begun', flush=True); time.sleep(60)",
        "import signal; signal.signal(15, signal.SIG_IGN); print('begun', flush=True)\nwhile True: pass",
    ],
    ids=["sleeps", "spins"],
)
def test_a_child_that_hangs_is_killed(code, tmp_path):
    ended = run(code, tmp_path / "log", timeout=1.0)
    assert (ended.status, ended.code) == ("timeout", -signal.SIGKILL) and 1.0 <= ended.seconds < 5
    assert children.last_lines(tmp_path / "log") == ["begun"]


@pytest.mark.parametrize("then", ["import time; time.sleep(60)", "import os; os.abort()", "pass"])
def test_its_own_children_end_with_it(then, tmp_path):
    run(PARENT.format(then), tmp_path / "log", timeout=1.0)
    assert gone(int(children.last_lines(tmp_path / "log")[0]))


def test_a_deadline_may_move(tmp_path):
    with open(tmp_path / "log", "wb") as output:
        child = children.start([sys.executable, "-c", "import time; time.sleep(1.0)"], output)
        # Until it has run for half a second it is given a tenth more.
        ended = children.wait(child, lambda: time.monotonic() + 0.1 if time.monotonic() < child.begun + 0.5 else 0)
    assert ended.status == "timeout" and ended.seconds < 0.9


def test_a_child_waits_for_what_is_written_to_it(tmp_path):
    with open(tmp_path / "log", "wb") as output:
        child = children.start([sys.executable, "-c", "print('got', input())"], output)
        child.process.stdin.write(b"word\n")
        child.process.stdin.flush()
        assert children.wait(child, lambda: child.begun + 20).status == "ok"
    assert children.last_lines(tmp_path / "log") == ["got word"]


def test_children_end_when_their_starter_is_killed(tmp_path):
    code = f"""
import sys
from nlora_kernels import children
with open({str(tmp_path / "child")!r}, "wb") as output:
    child = children.start(["sleep", "60"], output)
    print(child.process.pid, flush=True)
    children.wait(child, lambda: child.begun + 60)
"""
    root = Path(__file__).resolve().parent.parent
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=root)
    pid = int(starter.stdout.readline())
    os.kill(starter.pid, signal.SIGKILL)
    starter.wait()
    starter.stdout.close()
    assert gone(pid)


def test_the_last_lines_are_those_from_a_place_on(tmp_path):
    file = tmp_path / "log"
    file.write_bytes(b"before\n" + b"".join(b"%d\n" % i for i in range(1000)) + b"\xff\n")
    assert children.last_lines(file, count=3) == ["998", "999", "\ufffd"]
    assert children.last_lines(file, begin=file.stat().st_size - 2) == ["\ufffd"]
