"""Several files written as one: whoever reads the folder finds the old ones or the new ones, and all else stays."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

# The folder of a writer lies in the folder it writes to. It holds `new` and `old`, what the files will be and were, and
# the link `now` to one of the two.
_MARK = ".nlora_kernels-"
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)
_MOST_LINKS = 40


@contextlib.contextmanager
def replacing(folder: str | os.PathLike, superseded: Mapping[str, str] | None = None) -> Iterator[Path]:
    """Gives an empty folder; what was written there takes its places in `folder`, all at the same moment.

    No two files can be renamed in one step. So every file first gives way to a link that leads through `now` to what it
    was; then `now` turns from `old` to `new`, which is one step; then the new files take the places of the links. A
    process that is killed between leaves links that lead to the one side or the other, and the next one that writes
    here puts the files in their places. An error leaves what was. Links are followed, modes kept, and other files not
    touched. Where a file system has no symbolic links, files are replaced one by one.

    Args:
        folder: made if it is not there.
        superseded: names of files that go when one of the name they map to is written beside them, and none of theirs.

    Raises:
        ValueError: folder is "" or a file. OSError: something cannot be written.
    """
    if not os.fspath(folder):
        raise ValueError("the folder to write must have a name, got ''")
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"the folder to write must be a folder, got the file {folder}")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.ExitStack() as stack:
            with locked(folder):
                for writer in folder.glob(f"{_MARK}*"):
                    with locked(writer / "lock", wait=False) as abandoned:
                        if abandoned:
                            _settle(folder, writer)
                writer = Path(tempfile.mkdtemp(dir=folder, prefix=_MARK))
                stack.enter_context(locked(writer / "lock"))
            try:
                # Whoever may read the folder may follow a link through this one.
                shutil.copymode(folder, writer)
                (writer / "new").mkdir()
                yield writer / "new"
                with locked(folder):
                    _switch(folder, writer, superseded or {})
            finally:
                with locked(folder):
                    _settle(folder, writer)
    finally:
        for path in made:
            # Not when something is in it, as it is when all went well.
            with contextlib.suppress(OSError):
                path.rmdir()


def _switch(folder: Path, writer: Path, superseded: Mapping[str, str]) -> None:
    new, old = writer / "new", writer / "old"
    names = _files(new)
    for gone, by in superseded.items():
        names += [
            name.with_name(gone) for name in names if name.name == by and not (new / name).with_name(gone).exists()
        ]
    places = {name: _place(folder / name) for name in names}
    for place in places.values():
        if place.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(place))
        if place.exists() and not os.access(place, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
    for name, place in places.items():
        if place.exists():
            (old / name).parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(place.resolve(), old / name)
            if (new / name).exists():
                shutil.copymode(place, new / name)
    for path in [*writer.rglob("*"), writer]:
        _flush(path)
    for place in places.values():
        place.parent.mkdir(parents=True, exist_ok=True)
    try:
        (writer / "now").symlink_to("old")
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        for name, place in places.items():
            _move(new / name, place) if (new / name).exists() else place.unlink(missing_ok=True)
        return
    for name, place in places.items():
        (writer / "link").symlink_to(os.path.relpath(writer / "now" / name, place.parent))
        _move(writer / "link", place)
    for parent in {place.parent for place in places.values()}:
        _flush(parent)
    (writer / "link").symlink_to("new")
    (writer / "link").replace(writer / "now")
    _flush(writer)


def _settle(folder: Path, writer: Path) -> None:
    """Puts the files that `now` leads to in the places of the links, and removes the writer's folder."""
    now = writer / "now"
    # Without it no file has given way yet.
    for name in {*_files(writer / "old"), *_files(writer / "new")} if now.is_symlink() else ():
        place = _place(folder / name)
        _beside(place).unlink(missing_ok=True)
        if place.is_symlink() and writer.name in Path(os.readlink(place)).parts:
            _move(now / name, place) if (now / name).exists() else place.unlink()
            _flush(place.parent)
    shutil.rmtree(writer)
    _flush(folder)


def _files(folder: Path) -> list[Path]:
    # Where links are missing, weights are replaced before the configuration that names them.
    return sorted((path.relative_to(folder) for path in folder.rglob("*") if path.is_file()), reverse=True)


def _place(path: Path) -> Path:
    """Where a file is really, links followed; one that a writer put there stands for the file."""
    for _ in range(_MOST_LINKS):
        path = Path(os.path.realpath(path.parent), path.name)
        if not path.is_symlink():
            return path
        target = os.readlink(path)
        if any(part.startswith(_MARK) for part in Path(target).parts):
            return path
        path = path.parent / target
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def _beside(place: Path) -> Path:
    return place.with_name(f".{place.name}{_MARK}")


def _move(source: Path, place: Path) -> None:
    """source takes the place, in one step on another file system too."""
    try:
        source.replace(place)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = _beside(place)
        beside.unlink(missing_ok=True)
        shutil.copy2(source, beside, follow_symlinks=False)
        if not beside.is_symlink():
            _flush(beside)
        beside.replace(place)
        source.unlink()


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Holds the lock of a folder, or of a file made for it, and gives whether it does: some systems have none."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT)
    locked, owner = False, os.getpid()
    try:
        try:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except (ImportError, OSError):
            pass
        yield locked
    finally:
        # NOTE: a child that was forked meanwhile has the same open file: with close alone it would hold the lock for as
        # long as it lives, and it must not let go what its parent holds.
        if locked and os.getpid() == owner:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
