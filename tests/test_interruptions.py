"""Commands that are stopped half-way, by signals, full disks and kills, and go on again."""

from __future__ import annotations

import errno
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_process import fresh_python
from safetensors.torch import load_file
from tiny_model import TEXT, save_tiny
from typer.testing import CliRunner, Result

from nowag_ext import cli, resume
from nowag_ext.cli import app
from nowag_ext.files import DiskFullError
from nowag_ext.resume import LayerStore

COMMON = ["--length", 32, "--samples", 6]
VQ = ["--d", 4, "--bits", 2, "--iters", 3, "--codebook-scope", "layer"]
COMMANDS: dict[str, list[object]] = {
    "feedback": ["compress", *VQ],
    "paper": ["compress", "--recipe", "paper", *VQ],
    "calibrate": ["calibrate"],
}
KILLED = {**COMMANDS, "head": ["compress", *VQ, "--head", "2,4"]}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("work")
    save_tiny(directory / "model")
    (directory / "text.txt").write_text(TEXT)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield directory
    torch.set_num_threads(before)


def arguments(work: Path, output: Path, command: str) -> list[str]:
    name, *rest = KILLED[command]
    given = [name, work / "model", "--text", work / "text.txt", "-o", output, *COMMON, *rest]
    return [str(one) for one in given]


def run(given: list[str], *more: object) -> Result:
    return CliRunner().invoke(app, [*given, *map(str, more)], prog_name="nowag-ext")


def tensors(output: Path) -> dict[str, torch.Tensor]:
    """What must be the same whatever happened in between: safetensors shuffles its metadata."""
    return load_file(output if output.is_file() else output / "model.safetensors")


def assert_same(output: Path, whole: Path) -> None:
    one, other = tensors(output), tensors(whole)
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def stop_after(
    monkeypatch: pytest.MonkeyPatch, layers: int, error: BaseException, name: str = "put"
) -> None:
    """The n-th layer, or window, is not written: the error comes instead."""
    original, count = getattr(LayerStore, name), iter(range(layers))

    def put(*args: Any, **kwargs: Any) -> None:
        if next(count, None) is None:
            raise error
        original(*args, **kwargs)

    monkeypatch.setattr(LayerStore, name, put)


def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics are kept after every window."""
    monkeypatch.setattr(cli.calibrate, "_KEEPING", float("inf"))


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "Interrupted. "),
        (cli.base.Terminated(), 143, "Terminated. "),
        (DiskFullError("the disk is full", Path("here")), 1, "Error: here: the disk is full "),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_goes_on_by_itself(
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    error: BaseException,
    status: int,
    said: str,
) -> None:
    """It says how, keeps what is finished, and ends in the bits of a run that was not stopped."""
    eager(monkeypatch)
    output, whole = tmp_path / "out", tmp_path / "whole"
    given = arguments(work, output, command)
    with monkeypatch.context() as patched:
        stop_after(patched, 3, error, "put_statistics" if command == "calibrate" else "put")
        result = run(given)
    assert result.exit_code == status, result.output
    partial = tmp_path / "out.partial"
    assert result.stderr.splitlines()[-1] == (
        f"{said}What is finished is kept in {partial}; go on with: nowag-ext {' '.join(given)}"
    )
    assert not output.exists()
    assert LayerStore(partial).keeps_something()
    done: list[str] = []
    if command == "calibrate":
        monkeypatch.setattr(
            cli.calibrate, "collect_statistics",
            lambda *args, original=cli.calibrate.collect_statistics, **kwargs: (
                done.append("window"), original(*args, **kwargs)
            ),
        )  # fmt: skip
    result = run(given)
    assert result.exit_code == 0, result.output
    if command == "calibrate":
        assert len(done) == 3
    else:
        report = (output / "report.json").read_text()
        # Of the groups of feedback those are resumed that were finished: q, k and v.
        assert report.count('"resumed": true') == 3
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out"]
    run(arguments(work, whole, command))
    assert_same(output, whole)


def test_other_settings_are_refused_by_name(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(work, tmp_path / "out", "feedback")
    partial = tmp_path / "out.partial"
    with monkeypatch.context() as patched:
        stop_after(patched, 3, KeyboardInterrupt())
        assert run(given).exit_code == 130
    before = {file.name: file.read_bytes() for file in partial.iterdir()}
    (tmp_path / "text").write_text(TEXT + "!")
    for more, named in {
        ("--iters", 5): ("--iters 3", "--iters 5"),
        ("--seed", 1): ("--seed 0", "--seed 1"),
        ("--sample-seed", 1): ("--sample-seed not given", "--sample-seed 1"),
        ("--recipe", "paper"): ("--recipe feedback", "--recipe paper"),
        ("--ignore", "up_proj"): (r"--ignore \[\]", r"--ignore \['up_proj'\]"),
        ("--override", "up_proj bits=1"): ("--override {}", "--override {'up_proj'"),
        ("--text", tmp_path / "text"): ("--text", "--text"),
    }.items():
        result = run(given, *more)
        assert result.exit_code == 1, result.output
        pattern = f"{partial} was made with {named[0]}.*, not {named[1]}.*: pass the same, remove"
        assert re.search(pattern, result.stderr), result.stderr
        assert {file.name: file.read_bytes() for file in partial.iterdir()} == before
    result = run(given, "--iters", 2, "--no-resume")
    assert result.exit_code == 0, result.output
    assert '"resumed": true' not in (tmp_path / "out" / "report.json").read_text()
    assert not partial.exists()


def test_what_matters_not_may_differ(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defaults by name, another spelling of the model, another format of the output."""
    given = arguments(work, tmp_path / "out", "paper")
    with monkeypatch.context() as patched:
        stop_after(patched, 3, KeyboardInterrupt())
        assert run(given).exit_code == 130
    (tmp_path / "alias").symlink_to(work / "model")
    given[1] = str(tmp_path / "alias")
    result = run(given, "--seed", 0, "--method", "vq", "--format", "dense")
    assert result.exit_code == 0, result.output
    assert '"resumed": true' in (tmp_path / "out" / "report.json").read_text()


def test_a_damaged_record_and_what_is_in_the_way(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(work, tmp_path / "out", "paper")
    partial = tmp_path / "out.partial"
    partial.write_text("mine")
    result = run(given)
    assert result.exit_code == 1
    assert "--output: " in result.stderr
    assert "out.partial, where finished work is to be kept, exists" in result.stderr
    partial.unlink()
    with monkeypatch.context() as patched:
        stop_after(patched, 3, KeyboardInterrupt())
        assert run(given).exit_code == 130
    (partial / resume._MADE_WITH).write_text('{"--iters": ')
    assert run(given).exit_code == 0


def test_a_second_run_is_refused(work: Path, tmp_path: Path) -> None:
    for command in COMMANDS:
        with resume.open_store(tmp_path / "out.partial"):
            result = run(arguments(work, tmp_path / "out", command))
        assert result.exit_code == 1
        assert "another run keeps its finished layers in" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_at_the_end(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All layers are kept when the checkpoint does not fit."""
    given = arguments(work, tmp_path / "out", "paper")

    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("nowag_ext.report.ModelReport.to_json", full)
        result = run(given)
    assert result.exit_code == 1
    assert "out: the disk is full: nothing was written" in result.stderr
    assert "go on with: nowag-ext compress" in result.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.partial"]
    assert run(given).exit_code == 0
    report = (tmp_path / "out" / "report.json").read_text()
    assert report.count('"resumed": true') == 14


# The process is killed in the middle of writing: what is half-written is there afterwards.
KILL = """
import os, signal, sys
import nowag_ext.cli as cli, nowag_ext.resume as resume
cli.calibrate._KEEPING = float("inf")
left = [int(os.environ['KILL_AFTER'])]
save = resume.save
def killed(*args):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return save(*args)
resume.save = killed
cli.app()
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", KILLED)
def test_after_a_kill(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    eager(monkeypatch)
    output = tmp_path / "out"
    given = arguments(work, output, command)
    # Beyond the six windows of a calibration; at the head, which comes last.
    after = {"paper": "9", "head": "14"}.get(command, "4")
    process = subprocess.run(
        **fresh_python("-c", KILL, *given, OMP_NUM_THREADS="1", KILL_AFTER=after),
        capture_output=True,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.partial"]
    partial = tmp_path / "out.partial"
    assert LayerStore(partial).keeps_something()
    assert any(re.search(r"nowag_ext\..*\.\w{8}$", file.name) for file in partial.iterdir())
    result = run(given)
    assert result.exit_code == 0, result.output
    if command != "calibrate":
        assert '"resumed": true' in (output / "report.json").read_text()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    run(arguments(work, tmp_path / "whole", command))
    assert_same(output, tmp_path / "whole")
