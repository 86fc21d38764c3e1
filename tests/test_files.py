"""Where things are written: every kind of destination, litter of killed writers, full disks."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fresh_process import fresh_python

from nowag_ext import files
from nowag_ext.files import (
    LIST_FILE,
    MARK,
    atomic_directory,
    atomic_file,
    check_apart,
    check_file,
    check_vacant,
    require_space,
)


def fill(path: Path, name: str = "config.json", text: str = "{}", overwrite: bool = False) -> None:
    with atomic_directory(path, overwrite=overwrite) as directory:
        (directory / name).write_text(text)
        (directory / "below").mkdir()
        (directory / "below" / name).write_text(text)


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


WHOLE = [LIST_FILE, "below", "config.json"]


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of its own, 1 MB."""
    path = tmp_path / "mounted"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here: only root may")
    yield path
    subprocess.run(["umount", str(path)], check=True)


# --- directories ----------------------------------------------------------------------------------


def test_a_mounted_directory_is_filled(mounted: Path) -> None:
    (mounted / "lost+found").mkdir()  # as a new ext4 has it
    fill(mounted)
    assert names(mounted) == [*WHOLE, "lost+found"]
    fill(mounted, text="[]", overwrite=True)
    assert (mounted / "config.json").read_text() == "[]"
    assert names(mounted.parent) == ["mounted"]


def test_a_mounted_directory_that_is_too_small(mounted: Path) -> None:
    with pytest.raises(OSError, match=r"2\.0 MB are needed but the disk has"):
        require_space(mounted / "not" / "yet", 2_000_000)
    with (
        pytest.raises(OSError, match="the disk is full: nothing was written"),
        atomic_directory(mounted) as directory,
    ):
        (directory / "large").write_bytes(bytes(2 << 20))
    assert names(mounted) == []


def test_where_a_shell_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very directory is filled: another one of its name would not be where the shell is."""
    monkeypatch.chdir(tmp_path)
    fill(Path("."))
    assert sorted(os.listdir(".")) == WHOLE


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_is_followed(tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    fill(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == WHOLE
    with atomic_file(tmp_path / "link" / "file") as temporary:
        temporary.write_text("one")
    (tmp_path / "alias").symlink_to("real/file")
    with atomic_file(tmp_path / "alias") as temporary:
        temporary.write_text("two")
    assert (tmp_path / "alias").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "two"


def special_files(path: Path) -> dict[str, Path]:
    os.mkfifo(path / "fifo")
    server = socket.socket(socket.AF_UNIX)
    relative = os.path.relpath(path / "socket")  # names of sockets are short
    server.bind(min(str(path / "socket"), relative, key=len))
    server.close()
    (path / "to_fifo").symlink_to("fifo")
    return {
        "a named pipe": path / "fifo", "a socket": path / "socket", "a device": Path("/dev/null"),
    }  # fmt: skip


def test_what_is_neither_file_nor_directory_stays(tmp_path: Path) -> None:
    specials = special_files(tmp_path)
    before = names(tmp_path)
    for kind, path in [*specials.items(), ("a named pipe", tmp_path / "to_fifo")]:
        mode = os.lstat(path).st_mode
        with pytest.raises(OSError, match=f"is {kind}: a regular file is needed"):
            check_file(path)
        with pytest.raises(OSError, match=f"is {kind}: a directory is needed"):
            check_vacant(path)
        assert os.lstat(path).st_mode == mode
    read, write = os.pipe()
    with pytest.raises(OSError, match="a named pipe: a regular"):
        check_file(f"/dev/fd/{write}")
    os.close(read)
    os.close(write)
    assert names(tmp_path) == before


def test_a_file_for_a_directory_and_the_other_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file: a directory is needed"):
        check_vacant(tmp_path / "file")
    with pytest.raises(IsADirectoryError, match="is a directory: a regular file is needed"):
        check_file(tmp_path)
    for check in (check_vacant, check_file):
        with pytest.raises(OSError, match=r"cannot be written \(Not a directory\)"):
            check(tmp_path / "file" / "below" / "deep")
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("check", [check_vacant, check_file])
def test_names_that_cannot_be(tmp_path: Path, check: object) -> None:
    assert callable(check)
    (tmp_path / "loop").symlink_to("loop")
    for name in ("x" * 256, "é" * 128, "new/" + "x" * 256, "loop", "d/" * 2100 + "x"):
        with pytest.raises(OSError, match=r"cannot be written \((File name too|Too many lev)"):
            check(tmp_path / name)
    assert check(tmp_path / ("x" * 255)) == tmp_path / ("x" * 255)
    assert names(tmp_path) == ["loop"]


def test_the_longest_names_are_written(tmp_path: Path) -> None:
    fill(tmp_path / ("d" * 255))
    with atomic_file(tmp_path / ("é" * 127)) as temporary:
        temporary.write_text("one")
    assert names(tmp_path) == ["d" * 255, "é" * 127]


def test_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for check in (check_vacant, check_file):
        with pytest.raises(OSError, match=r"cannot be written \("):
            check("/proc/nowag/out")

    def refused(*_args: object, **_kwargs: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.tempfile, "mkdtemp", refused)
    for check in (check_vacant, check_file):
        with pytest.raises(PermissionError, match=r"cannot be written \(Permission denied\)"):
            check(tmp_path / "new" / "out")
    assert names(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    for check in (check_vacant, check_file):
        with pytest.raises(PermissionError, match="Permission denied"):
            check(tmp_path / "out")
    tmp_path.chmod(0o755)


@pytest.mark.parametrize("path", ["/", "/usr"])
def test_directories_of_others(path: str) -> None:
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="exists and is not empty"):
            check_vacant(path, overwrite=overwrite)


def test_only_what_was_written_here_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out)
    with pytest.raises(FileExistsError, match="not empty: choose another"):
        check_vacant(out)
    for mine in ("notes.txt", "below/notes.txt"):
        (out / mine).write_text("mine")
        with pytest.raises(FileExistsError, match=f"{mine} in it was not written by nowag_ext"):
            fill(out, overwrite=True)
        (out / mine).unlink()
    (out / "mine").mkdir()
    with pytest.raises(FileExistsError, match="mine in it was not written"):
        check_vacant(out, overwrite=True)
    (out / "mine").rmdir()
    fill(out, name="other.json", overwrite=True)
    assert names(out) == [LIST_FILE, "below", "other.json"]
    (out / LIST_FILE).write_text("[")
    with pytest.raises(FileExistsError, match=r"was not written by nowag_ext"):
        check_vacant(out, overwrite=True)


@pytest.mark.parametrize("moves", range(5))
def test_a_swap_that_fails_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    out = tmp_path / "out"
    fill(out, text="old")
    before = (out / LIST_FILE).read_text()
    rename, left = os.rename, iter(range(moves))

    def failing(source: Path, to: Path) -> None:
        if next(left, None) is None and "KeyboardInterrupt" not in str(sys.exc_info()):
            raise KeyboardInterrupt
        rename(source, to)

    monkeypatch.setattr(files.os, "rename", failing)
    with pytest.raises(KeyboardInterrupt):
        fill(out, text="new", overwrite=True)
    assert names(out) == WHOLE
    assert (out / "config.json").read_text() == (out / "below/config.json").read_text() == "old"
    assert (out / LIST_FILE).read_text() == before


SWAPS = """
import os, sys
from pathlib import Path
from nowag_ext.files import atomic_directory
rename = os.rename
for moves in range(5):
    out = Path(sys.argv[1]) / str(moves)
    for text in ("old", "killed", "new"):
        if os.fork():
            os.wait()
            continue
        left = [moves]
        def killed(*args):
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            rename(*args)
        if text == "killed":
            os.rename = killed
        with atomic_directory(out, overwrite=True) as directory:
            for name in ("config.json", text):
                (directory / name).write_text(text)
        os._exit(0)
"""


def test_a_swap_that_is_killed_can_be_done_again(tmp_path: Path) -> None:
    subprocess.run(**fresh_python("-c", SWAPS, tmp_path), check=True)
    for out in tmp_path.iterdir():
        assert names(out) == [LIST_FILE, "config.json", "new"]
        assert (out / "config.json").read_text() == "new"
    assert len(names(tmp_path)) == 5


def test_a_model_and_an_output_do_not_hold_each_other(tmp_path: Path) -> None:
    model = tmp_path / "a" / "model"
    model.mkdir(parents=True)
    (tmp_path / "link").symlink_to(model)
    for output in (model, model / "out", tmp_path / "a", tmp_path):
        for source in (model, tmp_path / "link"):
            with pytest.raises(ValueError, match="must not hold each other"):
                check_apart(output, source)
    check_apart(tmp_path / "a" / "out", model)
    check_apart(tmp_path / "a" / "out", "some/hub-id")


def test_a_failure_leaves_no_directory_that_it_made(tmp_path: Path) -> None:
    for writer in (atomic_file, atomic_directory):
        with pytest.raises(RuntimeError), writer(tmp_path / "a" / "b" / "out"):
            raise RuntimeError
    assert names(tmp_path) == []


# --- killed writers -------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from nowag_ext.files import atomic_directory, atomic_file
with {writer}(sys.argv[1]) as temporary:
    os.path.isdir(temporary) and open(temporary / "half", "w").write("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("writer", [atomic_file, atomic_directory])
def test_what_a_killed_writer_left_goes(tmp_path: Path, writer: type) -> None:
    out = tmp_path / "out"
    mine = [f"{MARK}out.mine", ".out.abcdefgh", f"{MARK}other.abcdefgh", f"{MARK}outer.abcdefgh"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    code = KILLED.format(writer=writer.__name__)
    killed = subprocess.run(**fresh_python("-c", code, out), check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == len(mine) + 1
    with writer(out) as temporary:
        if temporary.is_dir():
            (temporary / "file").write_text("whole")
    assert names(tmp_path) == sorted([*mine, "out"])


def test_what_another_writer_is_at_stays(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out") as first:
        (first / "file").write_text("first")
        with atomic_file(tmp_path / "out2"), atomic_file(tmp_path / "elsewhere"):
            pass
        with pytest.raises(RuntimeError), atomic_directory(tmp_path / "out"):
            raise RuntimeError
        assert (first / "file").exists()
    assert (tmp_path / "out" / "file").read_text() == "first"


def test_disks_that_cannot_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / f"{MARK}out.abcdefgh").mkdir()
    monkeypatch.setattr(fcntl, "flock", cannot)
    fill(tmp_path / "out")
    assert names(tmp_path) == [f"{MARK}out.abcdefgh", "out"]


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with (
            pytest.raises(OSError, match=r"limit on the size of files \(ulimit -f\) is reached"),
            atomic_file(tmp_path / "out") as temporary,
        ):
            temporary.write_bytes(bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == []
