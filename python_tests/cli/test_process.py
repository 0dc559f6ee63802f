"""Commands that hang, crash and leave processes behind: each is told for what it is, and nothing of it stays."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from nlora_kernels import process


def python(code):
    return [sys.executable, "-c", textwrap.dedent(code)]


def gone(pid) -> bool:
    """Whether a process is no more, or soon will be: the system may take a moment to bury it."""
    for _ in range(100):
        try:
            state = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_success_and_failure():
    ended = process.run(python("import sys; print('out'); print('err', file=sys.stderr)"), 60)
    assert ended.status == "ok" and ended.code == 0 and sorted(ended.lines) == ["err", "out"]
    ended = process.run(python("raise SystemExit(3)"), 60)
    assert ended.status == "failed" and ended.code == 3
    ended = process.run(python("raise ValueError('wrong')"), 60)
    assert ended.status == "failed" and ended.lines[-1] == "ValueError: wrong"


@pytest.mark.parametrize("signum", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL, signal.SIGTERM])
def test_a_signal_is_a_crash(signum):
    ended = process.run(python(f"import os; print('before', flush=True); os.kill(os.getpid(), {int(signum)})"), 60)
    assert ended.status == "crashed" and ended.code == -signum and "before" in ended.lines


def test_what_hangs_is_killed_with_all_that_it_started():
    # Neither asks to be killed: both ignore what can be ignored.
    code = """
        import signal, subprocess, sys, time
        for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(s, signal.SIG_IGN)
        inner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(inner.pid, flush=True)
        time.sleep(600)
    """
    begun = time.monotonic()
    ended = process.run(python(code), 3)
    assert ended.status == "timeout" and 3 <= ended.seconds and time.monotonic() - begun < 300
    assert gone(int(ended.lines[0]))


def test_what_a_command_leaves_behind_is_killed():
    # It holds the output open, which must not keep the caller waiting.
    code = """
        import subprocess, sys
        print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
    """
    begun = time.monotonic()
    ended = process.run(python(code), 60)
    assert ended.status == "ok" and time.monotonic() - begun < 50
    assert gone(int(ended.lines[0]))


def test_what_does_not_die_keeps_nobody_waiting(monkeypatch):
    left = []
    monkeypatch.setattr(process, "GRACE", 0.2)
    monkeypatch.setattr(process.os, "killpg", lambda pid, signum: left.append(pid))
    try:
        ended = process.run(python("import time; print('in the driver', flush=True); time.sleep(600)"), 2)
    finally:
        monkeypatch.undo()
        os.killpg(left[0], signal.SIGKILL)
    assert ended.status == "timeout" and ended.code is None


def test_an_interrupt_takes_the_command_with_it(tmp_path):
    hangs = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = f"import sys\nfrom nlora_kernels import process\nprocess.run([sys.executable, '-c', {hangs!r}], 600)"
    caller = subprocess.Popen(python(code), stderr=subprocess.DEVNULL)

    def interrupt():
        while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
            time.sleep(0.05)
        caller.send_signal(signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert caller.wait(60) != 0
    assert gone(int((tmp_path / "pid").read_text()))


def test_the_end_of_a_long_output_is_kept_and_all_of_it_logged(tmp_path):
    code = "import sys\nfor i in range(50_000): print(i)\nsys.stdout.buffer.write(b'\\xff last')"
    ended = process.run(python(code), 60, log=tmp_path / "log", keep=3)
    assert ended.lines == ["49998", "49999", "\ufffd last"]
    assert len((tmp_path / "log").read_bytes().splitlines()) == 50_001


def test_environment_and_folder(tmp_path):
    code = "import os; print(os.getcwd(), sorted(name for name in os.environ if name != 'LC_CTYPE'))"
    assert process.run(python(code), 60, env={"ONLY": "1"}, cwd=tmp_path).lines == [f"{tmp_path} ['ONLY']"]


def test_what_cannot_start_is_an_error():
    with pytest.raises(OSError):
        process.run(["no-such-command"], 1)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux ends a process with its parent")
def test_a_command_ends_when_its_caller_is_killed(tmp_path):
    hangs = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = f"import sys\nfrom nlora_kernels import process\nprocess.run([sys.executable, '-c', {hangs!r}], 600)"
    caller = subprocess.Popen(python(code))
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    caller.kill()
    caller.wait()
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_command_waits_for_what_is_written_to_it(tmp_path):
    with open(tmp_path / "log", "w+b") as output:
        output.write(b"of another\n")
        output.flush()
        child = process.start(python("print('got', input())"), output, held=True)
        child.process.stdin.write(b"word\n")
        child.process.stdin.flush()
        assert process.wait(child, lambda: child.begun + 60)[::3] == ("ok", ["got word"])


def test_a_deadline_may_move(tmp_path):
    with open(tmp_path / "log", "w+b") as output:
        child = process.start(python("import time; time.sleep(60)"), output)
        # Until it has run for a second it is given a tenth more.
        ended = process.wait(child, lambda: time.monotonic() + 0.1 if time.monotonic() < child.begun + 1 else 0)
    assert ended.status == "timeout" and 1 <= ended.seconds < 50
