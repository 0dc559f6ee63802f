"""Several files written as one, whatever happens between: killed, full disk, links, other files, other writers."""

import contextlib
import errno
import os
import signal
from pathlib import Path

import pytest

from nlora_kernels.atomic import locked, replacing

OLD, NEW = {"config": "old", "weights": "old weights"}, {"config": "new", "weights": "new weights"}
SUPERSEDED = {"weights": "weights.bin"}
# What changes something on a disk, as pathlib and shutil call it.
STEPS = ("fsync", "link", "mkdir", "replace", "rmdir", "symlink", "unlink")


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    # Waiting for the disk is most of what these tests would take. It still counts as a step.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def write(folder: Path, files: dict[str, str]) -> None:
    with replacing(folder, SUPERSEDED) as new:
        for name, text in files.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_text(text)


def plainly(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Every file and link below, by name, with what is in it; folders that are empty too."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = path.read_text()
        elif not any(path.iterdir()):
            found[name] = "empty"
    return found


def read(folder: Path) -> dict[str, str]:
    names = ("config", "weights", "weights.bin", "second/config", "second/weights")
    return {name: (folder / name).read_text() for name in names if (folder / name).exists()}


def absent(root: Path) -> Path:
    return root / "out"


def empty(root: Path) -> Path:
    (root / "out").mkdir()
    return root / "out"


def alone(root: Path) -> Path:
    return plainly(root / "out", OLD)


def among_others(root: Path) -> Path:
    plainly(root / "out", {"train.log": "log", "checkpoint-1/optimizer": "state", ".hidden": "h"})
    (root / "out" / "logs").symlink_to("nowhere")
    return plainly(root / "out", OLD)


def through_a_link(root: Path) -> Path:
    plainly(root / "real", OLD | {"notes": "n"})
    (root / "out").symlink_to("real")
    return root / "out"


def linked_files(root: Path) -> Path:
    plainly(root / "store", {"a": OLD["config"], "b": OLD["weights"]})
    plainly(root / "out", {"notes": "n"})
    (root / "out" / "config").symlink_to(root / "store" / "a")
    (root / "out" / "link").symlink_to("../store/b")
    (root / "out" / "weights").symlink_to("link")
    return root / "out"


TARGETS = (absent, empty, alone, among_others, through_a_link, linked_files)


def settled(root: Path, place, files: dict[str, str], tmp_path_factory) -> dict[str, str]:
    """What root holds in the end: as if the files had been written through the links one after the other."""
    other = tmp_path_factory.mktemp("expected")
    return {name: text.replace(str(other), str(root)) for name, text in contents_of(other, place, files).items()}


def contents_of(root: Path, place, files: dict[str, str]) -> dict[str, str]:
    plainly(place(root), files)
    return contents(root)


def steps_of(call, last: int | None = None, stop=None) -> int:
    """The steps on the disk that a call takes; at the last of them, if it is given, stop() comes in its place."""
    count = 0
    originals = {name: getattr(os, name) for name in STEPS}

    def counting(original):
        def step(*args, **kwargs):
            nonlocal count
            count += 1
            if count == last:
                stop()
            return original(*args, **kwargs)

        return step

    try:
        for name, original in originals.items():
            setattr(os, name, counting(original))
        call()
    finally:
        for name, original in originals.items():
            setattr(os, name, original)
    return count


def killed_at(step: int, call) -> None:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            steps_of(call, step, lambda: os._exit(0))
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("place", TARGETS)
def test_killed_at_every_step(place, tmp_path, tmp_path_factory):
    (tmp_path / "counted").mkdir()
    folder = place(tmp_path / "counted")
    before = read(folder)
    steps = steps_of(lambda: write(folder, NEW))
    assert steps > 10 and read(folder) == NEW
    seen = []
    for step in range(1, steps + 1):
        root = tmp_path / str(step)
        root.mkdir()
        folder = place(root)
        killed_at(step, lambda folder=folder: write(folder, NEW))
        seen.append(read(folder))
        write(folder, {"config": "last", "weights": "last"})
        assert contents(root) == settled(root, place, {"config": "last", "weights": "last"}, tmp_path_factory), step
    assert all(found in (before, NEW) for found in seen)
    # The old ones up to one step, and from there the new ones.
    assert seen == sorted(seen, key=lambda found: found == NEW) and before in seen and NEW in seen


def test_killed_again_while_it_settles_what_was_killed(tmp_path):
    (tmp_path / "counted").mkdir()
    steps = steps_of(lambda: write(alone(tmp_path / "counted"), NEW))
    for first in range(steps // 3, steps, 4):
        for second in range(1, steps, 3):
            root = tmp_path / f"{first} {second}"
            root.mkdir()
            folder = alone(root)
            killed_at(first, lambda folder=folder: write(folder, NEW))
            between = read(folder)
            killed_at(second, lambda folder=folder: write(folder, {"config": "newer", "weights": "newer"}))
            assert read(folder) in (between, {"config": "newer", "weights": "newer"})
            write(folder, NEW)
            assert contents(root) == {f"out/{name}": text for name, text in NEW.items()}


@pytest.mark.parametrize("place", TARGETS)
def test_full_disk_at_every_step(place, tmp_path, tmp_path_factory):
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "counted").mkdir()
    steps = steps_of(lambda: write(place(tmp_path / "counted"), NEW))
    for step in range(1, steps + 1):
        root = tmp_path / str(step)
        root.mkdir()
        folder = place(root)
        before, present = read(folder), contents(root)
        try:
            steps_of(lambda folder=folder: write(folder, NEW), step, full)
        except OSError as error:
            assert error.errno == errno.ENOSPC
        found = read(folder)
        assert found in (before, NEW)
        if found == before and not any("nlora_kernels-" in name for name in contents(root)):
            assert contents(root) == present
        write(folder, {"config": "last", "weights": "last"})
        assert contents(root) == settled(root, place, {"config": "last", "weights": "last"}, tmp_path_factory), step


@pytest.mark.parametrize("place", TARGETS)
def test_an_error_of_the_caller_leaves_all_as_it_was(place, tmp_path):
    folder = place(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(RuntimeError, match="mine"), replacing(folder) as new:
        (new / "config").write_text("half")
        raise RuntimeError("mine")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("place", TARGETS)
@pytest.mark.parametrize("lacking", ["symlink", "link", "flock", "one_file_system"])
def test_file_systems_that_lack_something(lacking, place, tmp_path, tmp_path_factory, monkeypatch):
    folder = place(tmp_path)
    replace = os.replace

    def refuse(*args, **kwargs):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def within_one_folder(source, target):
        if os.path.dirname(source) != os.path.dirname(target):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        replace(source, target)

    if lacking == "flock":
        monkeypatch.setattr("fcntl.flock", refuse)
    elif lacking == "one_file_system":
        monkeypatch.setattr(os, "replace", within_one_folder)
    else:
        monkeypatch.setattr(os, lacking, refuse)
    write(folder, NEW)
    monkeypatch.undo()
    assert contents(tmp_path) == settled(tmp_path, place, NEW, tmp_path_factory)


def test_folders_within(tmp_path):
    files = NEW | {f"second/{name}": f"second {text}" for name, text in NEW.items()}
    folder = plainly(tmp_path / "out", OLD | {"second/notes": "n"})
    write(folder, files)
    assert contents(folder) == files | {"second/notes": "n"}


def test_what_is_superseded_goes_and_nothing_else(tmp_path):
    folder = plainly(tmp_path / "out", OLD | {"more": "m"})
    write(folder, {"config": "new", "weights.bin": "new"})
    assert contents(folder) == {"config": "new", "weights.bin": "new", "more": "m"}
    write(folder, NEW)
    assert contents(folder) == NEW | {"weights.bin": "new", "more": "m"}


def test_writers_side_by_side(tmp_path):
    folder = alone(tmp_path)
    with replacing(folder) as first:
        (first / "config").write_text("first")
        with replacing(folder) as second:
            assert first.exists()
            (second / "config").write_text("second")
        assert (folder / "config").read_text() == "second"
        (first / "weights").write_text("first weights")
    assert contents(folder) == {"config": "first", "weights": "first weights"}


def test_modes_are_kept(tmp_path):
    folder = alone(tmp_path)
    folder.chmod(0o750)
    (folder / "config").chmod(0o640)
    write(folder, NEW)
    assert folder.stat().st_mode & 0o777 == 0o750
    assert (folder / "config").stat().st_mode & 0o777 == 0o640


def test_what_is_no_folder_to_write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plainly(tmp_path, {"file": "f", "out/config/file": "f"})
    with pytest.raises(ValueError, match="must have a name, got ''"):
        write("", NEW)
    with pytest.raises(ValueError, match=r"must be a folder, got the file .*/file"):
        write(tmp_path / "file", NEW)
    with pytest.raises(IsADirectoryError, match="out/config"):
        write(tmp_path / "out", NEW)
    (tmp_path / "out" / "weights").symlink_to("weights")
    with pytest.raises(OSError, match="symbolic links"):
        write(tmp_path / "out", {"weights": "new"})
    assert contents(tmp_path) == {"file": "f", "out/config/file": "f", "out/weights": "-> weights"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_file_that_must_not_be_written_stays(tmp_path):
    folder = alone(tmp_path)
    (folder / "weights").chmod(0o444)
    with pytest.raises(PermissionError, match="weights"):
        write(folder, NEW)
    assert contents(folder) == OLD


@pytest.mark.parametrize("folder", [True, False], ids=["folder", "file"])
def test_a_child_that_was_forked_meanwhile_holds_no_lock(tmp_path, folder):
    path = tmp_path if folder else tmp_path / "lock"
    with locked(path) as held:
        if not held:
            pytest.skip("this file system has no locks")
        child = os.fork()
        if child == 0:
            try:
                signal.pause()
            finally:
                os._exit(1)
        with locked(path, wait=False) as twice:
            assert not twice
    try:
        with locked(path, wait=False) as again:
            assert again
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_child_that_was_forked_meanwhile_lets_no_lock_go(tmp_path):
    with contextlib.ExitStack() as stack:
        if not stack.enter_context(locked(tmp_path)):
            pytest.skip("this file system has no locks")
        child = os.fork()
        if child == 0:
            try:
                stack.close()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        with locked(tmp_path, wait=False) as twice:
            assert not twice


def test_a_lock_is_let_go_with_an_error(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path, wait=False) as again:
        assert again
