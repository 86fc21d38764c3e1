"""Files and directories that appear whole or not at all, and where they may be written.

What is unfinished has a name that starts with ``.nowag_ext.`` and is locked by its writer: such an
entry whose lock is free was left by a process that was killed, and the next writer of the same name
removes it. A finished directory holds a list of its files (``.nowag_ext.json``), and nothing but
what is on such a list is ever replaced.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARK = ".nowag_ext."
LIST_FILE = ".nowag_ext.json"

# By what the system says, for libraries that wrap its errors into their own.
_NO_SPACE = {
    os.strerror(number): (number, sentence, advice)
    for number, sentence, advice in (
        (errno.ENOSPC, "the disk is full", "Make room"),
        (errno.EDQUOT, "the disk quota is used up", "Make room"),
        (errno.EFBIG, "the limit on the size of files (ulimit -f) is reached", "Raise it"),
    )
}
_KINDS = {
    stat.S_IFIFO: "a named pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket", stat.S_IFREG: "a file", stat.S_IFDIR: "a directory",
}  # fmt: skip
_SHOWN = 3  # names in a sentence about many


class DiskFullError(OSError):
    """There is no room, and nothing is left of what was to be written."""

    def __init__(self, sentence: str, path: Path, number: int = errno.ENOSPC) -> None:
        super().__init__(number, sentence, str(path))


@contextmanager
def _explain_disk_full(target: Path) -> Iterator[None]:
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        found = [known for text, known in _NO_SPACE.items() if text in str(error)]
        if not found:
            raise
        number, sentence, advice = found[0]
        raise DiskFullError(
            f"{sentence}: nothing was written. {advice} and try again", target, number
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_space(directory: Path, size: int) -> None:
    """Raises DiskFullError unless the disk that holds ``directory`` has ``size`` bytes free.

    Where it is yet to be made, the disk is that of what exists above it.
    """
    free = shutil.disk_usage(_existing(directory)).free
    if free < size:
        raise DiskFullError(
            f"{size / 1e6:.1f} MB are needed but the disk has {free / 1e6:.1f} MB free: "
            "nothing was written. Make room and try again",
            directory,
        )


# --- where something may be written ---------------------------------------------------------------


def check_file(path: str | os.PathLike[str]) -> Path:
    """Where ``atomic_file`` will write: ``path`` with symbolic links followed.

    Raises:
        OSError: it is a directory, a pipe or a device, or nothing can be written there.
    """
    target = _resolved(path)
    kind = _kind(path)
    if kind not in (None, stat.S_IFREG):
        raise OSError(
            errno.EISDIR if kind == stat.S_IFDIR else errno.EINVAL,
            f"is {_KINDS.get(kind, 'no file')}: a regular file is needed",
            os.fspath(path),
        )
    _check_writable(target.parent, target)
    return target


def check_vacant(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Where ``atomic_directory`` will write: ``path`` with symbolic links followed.

    Raises:
        FileExistsError: it is no directory, or one that is not empty: without ``overwrite`` that is
            any, with it one that holds anything but what ``atomic_directory`` wrote.
        OSError: nothing can be written there.
    """
    target = _resolved(path)
    kind = _kind(path)
    if kind not in (None, stat.S_IFDIR):
        raise FileExistsError(f"{path} is {_KINDS.get(kind, 'no file')}: a directory is needed.")
    held = [] if kind is None else _entries(target)
    if held and not overwrite:
        raise FileExistsError(
            f"{path} exists and is not empty: choose another directory, or overwrite it."
        )
    if held:
        # Without a list the names at the top will do: what is below could be a whole disk.
        listed = _listed(target)
        others = sorted(_contents(target) - listed if listed else held)
        if others:
            more = ", ..." if len(others) > _SHOWN else ""
            raise FileExistsError(
                f"{path} exists and is not empty, and {', '.join(others[:_SHOWN])}{more} in it "
                "was not written by nowag_ext, which overwrites nothing else: choose another "
                "directory, or move that."
            )
    _check_writable(target, target)
    return target


def check_apart(output: Path, source: str | os.PathLike[str]) -> None:
    """Raises ValueError if a directory to be written and a model's directory hold each other."""
    model = Path(os.path.realpath(source))
    if not model.is_dir():
        return
    if output == model or output in model.parents or model in output.parents:
        raise ValueError(
            f"{output} and {model}, where the model is, must not hold each other: "
            "choose another directory."
        )


def _resolved(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.realpath(path))


def _kind(path: str | os.PathLike[str]) -> int | None:
    """The type of what is there, as in st_mode; None for nothing. Raises where none can be."""
    try:
        return stat.S_IFMT(os.stat(path).st_mode)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OSError(error.errno, f"cannot be written ({error.strerror})", str(path)) from None


def _entries(directory: Path) -> list[str]:
    """Names of what is in it, without what unfinished runs and new disks have in theirs."""
    try:
        found = os.listdir(directory)
    except OSError as error:
        raise OSError(error.errno, f"cannot be read ({error.strerror})", str(directory)) from None
    return [
        name
        for name in found
        if name != "lost+found" and (name == LIST_FILE or not name.startswith(MARK))
    ]


def _contents(directory: Path) -> set[str]:
    """The files in it and below, by their paths from there; of empty directories theirs."""
    found = set()
    for name in _entries(directory):
        entry = directory / name
        below = () if entry.is_symlink() else entry.rglob("*")
        inner = {
            str(one.relative_to(directory))
            for one in below
            if one.is_symlink() or not one.is_dir() or not any(one.iterdir())
        }
        found |= inner or {name}
    return found


def _listed(directory: Path) -> set[str]:
    """What ``atomic_directory`` wrote there, its list included."""
    try:
        stored = json.loads((directory / LIST_FILE).read_text(encoding="utf-8"))
        return {LIST_FILE, *map(str, stored["files"])}
    except (OSError, ValueError, TypeError, KeyError):
        return set()


def _existing(path: Path) -> Path:
    """The path, or the first one above it that exists."""
    return next(one for one in (path, *path.parents) if os.path.lexists(one))


def _check_writable(room: Path, target: Path) -> None:
    """Raises OSError unless ``room``, or what exists above it, takes new entries."""
    existing = _existing(room)
    try:
        longest = os.pathconf(existing, "PC_NAME_MAX")
        for name in target.relative_to(existing).parts:
            if len(os.fsencode(name)) > longest:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        os.rmdir(tempfile.mkdtemp(prefix=_prefix(target.name), dir=existing))
    except OSError as error:
        raise OSError(error.errno, f"cannot be written ({error.strerror})", str(target)) from None


# --- writing --------------------------------------------------------------------------------------


def _prefix(name: str) -> str:
    # Of long names the beginning: with all of it the whole would be too long a name.
    return f"{MARK}{name[:40]}."


@contextmanager
def _temporary(room: Path, name: str, *, directory: bool) -> Iterator[Path]:
    """A new file or directory in ``room``, locked, and removed at the end if it is still there."""
    _sweep(room, name)
    while True:
        if directory:
            path = Path(tempfile.mkdtemp(prefix=_prefix(name), dir=room))
            descriptor = os.open(path, os.O_RDONLY)
        else:
            descriptor, created = tempfile.mkstemp(prefix=_prefix(name), dir=room)
            path = Path(created)
        try:
            _lock(descriptor)
            if path.exists():  # not swept away by another writer before it was locked
                yield path
                return
        finally:
            remove(path)
            os.close(descriptor)


@contextmanager
def temporary_directory(room: Path, name: str) -> Iterator[Path]:
    """A directory in ``room`` that goes at the end; of a killed process, with the next made."""
    with _temporary(room, name, directory=True) as path:
        yield path


def _lock(descriptor: int) -> bool:
    """Whether the lock could be had; it goes with the descriptor, or with the process."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sweep(room: Path, name: str) -> None:
    """Removes what killed writers of this name have left."""
    ours = re.compile(re.escape(_prefix(name)) + r"[a-z0-9_]{8}")
    for entry in [one for one in os.scandir(room) if ours.fullmatch(one.name)]:
        try:
            descriptor = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            if _lock(descriptor):
                remove(Path(entry.path))
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def directories(path: Path) -> Iterator[None]:
    """Makes a directory and those above it; on an exception the ones it made go, if empty."""
    missing = [one for one in (path, *path.parents) if not one.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for one in missing:
            with suppress(OSError):
                one.rmdir()
        raise


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; on success its file takes the name ``path``.

    On an exception, an interrupt included, nothing is left. Missing parent directories are made;
    a symbolic link stays, and what it points to is written. Write into the file itself: a library
    that puts another in its place leaves that one if it is killed.

    Raises:
        OSError: ``check_file`` refuses, or there is no room.
    """
    target = check_file(path)
    with (
        directories(target.parent),
        _temporary(target.parent, target.name, directory=False) as temporary,
    ):
        with _explain_disk_full(target):
            yield temporary
            _sync(temporary)
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, target)
        _sync(target.parent)


@contextmanager
def atomic_directory(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary directory; on success what is in it is in ``path``.

    One that is new takes its name at once. One that exists is filled entry by entry, because it may
    be a mounted disk or where a shell is; ``config.json``, without which nothing loads, comes last.
    On an exception, an interrupt included, nothing is left, and what ``path`` held before is
    untouched.

    Raises:
        OSError: ``check_vacant`` refuses, or there is no room.
    """
    target = check_vacant(path, overwrite=overwrite)
    room = target if target.is_dir() else target.parent
    with directories(room), _temporary(room, target.name, directory=True) as temporary:
        with _explain_disk_full(target):
            yield temporary
            (temporary / LIST_FILE).write_text(
                json.dumps({"files": sorted(_contents(temporary))}, indent=1) + "\n",
                encoding="utf-8",
            )
            for entry in sorted(temporary.rglob("*")):
                entry.chmod((0o777 if entry.is_dir() else 0o666) & ~_umask())
                _sync(entry)
            _sync(temporary)
        temporary.chmod(0o777 & ~_umask())
        if room == target:
            _fill(target, temporary)
        else:
            os.rename(temporary, target)
        _sync(room)


def _fill(target: Path, temporary: Path) -> None:
    """Moves what is in ``temporary`` into ``target``, in the place of what an earlier one wrote.

    The list is replaced at once: whenever this is killed, there is one of what is there.
    """
    before = {name.partition(os.sep)[0] for name in _listed(target)} - {LIST_FILE}
    new = set(os.listdir(temporary)) - {LIST_FILE}
    moved: list[tuple[Path, Path]] = []

    def move(source: Path, to: Path) -> None:
        moved.append((source, to))
        os.rename(source, to)

    with _temporary(target, target.name, directory=True) as aside:
        if (target / LIST_FILE).exists():
            shutil.copy(target / LIST_FILE, aside)
        try:
            for name in sorted(before, key=lambda name: name != "config.json"):
                if os.path.lexists(target / name):
                    move(target / name, aside / name)
            move(temporary / LIST_FILE, target / LIST_FILE)
            for name in sorted(new, key=lambda name: name == "config.json"):
                move(temporary / name, target / name)
        except BaseException:
            for source, to in reversed(moved):
                if os.path.lexists(to) and not os.path.lexists(source):
                    os.rename(to, source)
            if (aside / LIST_FILE).exists():
                os.rename(aside / LIST_FILE, target / LIST_FILE)
            raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
