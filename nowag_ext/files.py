"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class DiskFullError(OSError):
    """The disk is full, and nothing is left of what was to be written."""

    def __init__(self, sentence: str, path: Path) -> None:
        super().__init__(errno.ENOSPC, sentence, str(path))


def _is_disk_full(error: BaseException) -> bool:
    """Whether a writer failed for want of space; safetensors wraps the OSError in its own type."""
    if isinstance(error, OSError):
        return not isinstance(error, DiskFullError) and error.errno in _NO_SPACE
    return isinstance(error, Exception) and "No space left on device" in str(error)


@contextmanager
def _explain_disk_full(target: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not _is_disk_full(error):
            raise
        raise DiskFullError(
            "the disk is full: nothing was written. Make room and try again", target
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_space(directory: Path, size: int) -> None:
    """Raises DiskFullError unless the disk that holds ``directory`` has ``size`` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < size:
        raise DiskFullError(
            f"{size / 1e6:.1f} MB are needed but the disk has {free / 1e6:.1f} MB free: "
            "nothing was written. Make room and try again",
            directory,
        )


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; on success its file takes the name ``path``.

    On an exception, an interrupt included, nothing is left. Missing parent directories are made.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        with _explain_disk_full(target):
            yield temporary
            _sync(temporary)
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, target)
        _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary directory beside ``path``; on success it takes the name ``path``.

    On an exception, an interrupt included, nothing is left, and what ``path`` held before is
    untouched.

    Raises:
        FileExistsError: ``path`` is a file, or a directory that is not empty and ``overwrite`` is
            not set.
    """
    target = Path(path).absolute()
    check_vacant(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with _explain_disk_full(target):
            yield temporary
            for entry in sorted(temporary.rglob("*")):
                entry.chmod((0o777 if entry.is_dir() else 0o666) & ~_umask())
                _sync(entry)
            _sync(temporary)
        temporary.chmod(0o777 & ~_umask())
        _take_name(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_vacant(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raises FileExistsError where ``atomic_directory`` would refuse to write."""
    target = Path(path)
    if target.is_dir():
        if not overwrite and any(target.iterdir()):
            raise FileExistsError(
                f"{target} exists and is not empty: choose another directory, or overwrite it."
            )
    elif target.exists():
        raise FileExistsError(f"{target} is a file: a directory is needed.")


def _take_name(temporary: Path, target: Path) -> None:
    """Renames over ``target``; a directory in its place is set aside first, then removed."""
    if not target.exists():
        os.rename(temporary, target)
        _sync(target.parent)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(aside, target)
        raise
    _sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
