"""``nowag-ext distill``: the same as in Python, goes on after an interruption, refuses first."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import VQ, fails_with, one_line, run
from test_distill import keep_every_step
from tiny_model import TEXT, save_work, tiny_llama, tiny_tokenizer

import nowag_ext
from nowag_ext.evaluate import tokenize
from nowag_ext.pipeline import distill as distillation
from nowag_ext.source import mixed_batches, windows_of_each

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A directory with a model, a text, and what the model was compressed to."""
    directory = save_work(tmp_path_factory.mktemp("work"))
    result = run("compress", directory / "model", "-o", directory / "vq", *VQ, "--length", 64,
                 "--text", directory / "text.txt", "--samples", 4)  # fmt: skip
    assert result.exit_code == 0, result.output
    return directory


def arguments(work: Path, output: Path) -> list[Any]:
    return [
        "distill", work / "vq", "--dense", work / "model", "--text", work / "text.txt",
        "-o", output, "--length", 64, "--samples", 4, "--passes", 2,
    ]  # fmt: skip


def interrupted_after(steps: int) -> tuple[Any, list[int]]:
    """A step of a distillation that is interrupted after so many, and how many are left."""
    step, left = distillation._Run._step, [steps]

    def interrupted(self: Any, *args: Any) -> float:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return step(self, *args)

    return interrupted, left


def test_is_what_python_does(work: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = run(*arguments(work, output), "--learning-rate", 0.01, "--skip", 100)
    assert result.exit_code == 0, result.output
    said = "Learning from 4 windows of 64 tokens, the first of the text after 100 tokens that "
    said += "are skipped."
    assert said in one_line(result.output)
    tokens = tokenize(tiny_tokenizer(), TEXT)[100 : 100 + 4 * 64].view(4, 64)
    model = nowag_ext.load(work / "vq")
    learnt = nowag_ext.distill(model, tiny_llama(), tokens, passes=2, learning_rate=0.01)
    stored = nowag_ext.load(output).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(stored[name], tensor), name
    assert f"{learnt.divergences[1]:.4f}. " in one_line(result.output)
    before, after = (
        json.loads((folder / "report.json").read_text()) for folder in (work / "vq", output)
    )
    kept = after.pop("distillation")
    assert kept["divergences"] == list(learnt.divergences)
    assert before.pop("distillation") is None
    assert after.pop("peak_memory") == kept["peak_memory"] >= before.pop("peak_memory")
    assert before == after
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (work / "vq", output)]
    assert sizes[0] == sizes[1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_goes_on_after_an_interrupt(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_every_step(monkeypatch)
    given = arguments(work, tmp_path / "out")
    interrupted, left = interrupted_after(5)
    with monkeypatch.context() as patched:
        patched.setattr(distillation._Run, "_step", interrupted)
        result = run(*given)
    assert result.exit_code == 130, result.output
    partial = tmp_path / "out.partial"
    assert f"What is finished is kept in {partial}; go on with: " in result.stderr
    fails_with("--passes 2, not --passes 3", *given, "--passes", 3)
    left[0] = 3
    with monkeypatch.context() as patched:
        patched.setattr(distillation._Run, "_step", interrupted)
        assert run(*given).exit_code == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert run(*arguments(work, tmp_path / "whole")).exit_code == 0
    one, other = (tmp_path / name / "model.safetensors" for name in ("out", "whole"))
    assert one.read_bytes() == other.read_bytes()


def test_refusals_leave_nothing(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(work, tmp_path / "out")

    def but(**changes: Any) -> list[Any]:
        changed = [*given]
        for name, value in changes.items():
            place = 1 if name == "compressed" else changed.index(f"--{name}") + 1
            changed[place] = value
        return changed

    fails_with("model is not compressed: compress it first", *but(compressed=work / "model"))
    fails_with("--dense .*vq is itself compressed", *but(dense=work / "vq"))
    fails_with("there is no model .*nothing", *but(dense=tmp_path / "nothing"))
    fails_with("there is no model .*nothing", *but(compressed=tmp_path / "nothing"))
    fails_with("--dtype must be", *given, "--dtype", "int8")
    fails_with("--passes must be a positive integer, not 0", *but(passes=0))
    fails_with(
        "--learning-rate must be a number above 0, below 1, not 0.0", *given, "--learning-rate", 0
    )
    fails_with("--seed must be", *given, "--seed", -1)
    fails_with("--skip must not be negative, not -1", *given, "--skip", -1)
    fails_with(
        "--skip 90000 leaves less than a window of .*text.txt, which has ", *given, "--skip", 90000
    )
    fails_with("--text", *but(text=tmp_path / "no.txt"))
    fails_with("must not hold each other", *given, "-o", work / "vq" / "inside")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 999, 1))  # type: ignore[attr-defined]
        patched.setattr(distillation._Run, "_step", None)
        fails_with("--output: .* MB are needed but the disk has 0.0 MB free", *given)
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_says_what_none_can_is_not_passed_on(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "vq", tmp_path / "vq")
    sound = json.loads((work / "vq" / "report.json").read_text())
    learnt = asdict(nowag_ext.Distillation(1, 64, 1e-3, 0, (0.5,), 1.0))
    for damaged in (
        "{", "[" * 100_000, json.dumps({**sound, "layers": []}),
        json.dumps({**sound, "versions": {"torch": "2\n# mine"}}),
        json.dumps({**sound, "decoder_weights": "a"}),
        json.dumps({**sound, "distillation": {**learnt, "passes": "2\n# mine"}}),
        json.dumps({**sound, "distillation": {**learnt, "divergences": [math.nan]}}),
        json.dumps({**sound, "distillation": {**learnt, "divergences": ["# mine"]}}),
    ):  # fmt: skip
        (tmp_path / "vq" / "report.json").write_text(damaged)
        given = [*arguments(work, tmp_path / "out"), "--overwrite", "--samples", 1, "--passes", 1]
        given[1] = tmp_path / "vq"
        result = run(*given)
        assert result.exit_code == 0, result.output
        assert not (tmp_path / "out" / "report.json").exists()
        assert "mine" not in (tmp_path / "out" / "README.md").read_text()


def compress_arguments(work: Path, output: Path, *more: Any) -> list[Any]:
    return [
        "compress", work / "model", "-o", output, "--d", 4, "--bits", 2, "--iters", 3,
        "--text", work / "text.txt", "--samples", 4, "--length", 64, *more,
    ]  # fmt: skip


def test_compress_distils_what_it_made(work: Path, tmp_path: Path) -> None:
    """As the command does that comes after, on what calibration has left of the text."""
    result = run(*compress_arguments(work, tmp_path / "out", "--distill", 3))
    assert result.exit_code == 0, result.output
    said = one_line(result.output)
    assert "Calibrating on 4 windows of 64 tokens, the first of the text." in said
    assert "Then learning from 3 windows of 64 tokens, the first of the text after those." in said
    assert "Distilled: 1 pass of 192 tokens; KL to the dense model" in said
    assert ", distillation " in said
    given = arguments(work, tmp_path / "after")
    given[given.index("--passes") + 1], given[given.index("--samples") + 1] = 1, 3
    assert run(*given, "--skip", 4 * 64).exit_code == 0
    weights = [tmp_path / name / "model.safetensors" for name in ("out", "after")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["distillation"]["tokens"] == 192
    assert report["seconds"] >= report["stages"]["distillation"] > 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["after", "out"]


def test_compress_goes_on_with_its_distillation(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_every_step(monkeypatch)
    interrupted, left = interrupted_after(3)
    given = compress_arguments(work, tmp_path / "out", "--distill", 5)
    with monkeypatch.context() as patched:
        patched.setattr(distillation._Run, "_step", interrupted)
        assert run(*given).exit_code == 130
        left[0] = 2
        assert run(*given).exit_code == 0  # with two steps and no more
    assert run(*compress_arguments(work, tmp_path / "whole", "--distill", 5)).exit_code == 0
    weights = [tmp_path / name / "model.safetensors" for name in ("out", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_compress_goes_on_without_it(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it fails what is compressed is not lost."""

    def fail(*_: Any) -> float:
        raise ValueError("the divergence is nan")

    given = compress_arguments(work, tmp_path / "out", "--distill", 5)
    with monkeypatch.context() as patched:
        patched.setattr(distillation._Run, "_step", fail)
        fails_with("the divergence is nan What is finished is kept in", *given)
        assert run(*given[:-1], 0).exit_code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["distillation"] is None
    assert all(layer["resumed"] for layer in report["layers"])


def test_text_that_auto_leaves(work: Path, tmp_path: Path) -> None:
    """Where the text ends before the time does."""
    given = compress_arguments(work, tmp_path / "out", "--distill", 3)
    given[given.index("--samples") + 1] = "auto"
    result = run(*given)
    assert result.exit_code == 0, result.output
    windows = len(tokenize(tiny_tokenizer(), TEXT)) // 64
    assert f"Calibrating on {windows - 3} windows" in one_line(result.output)
    assert "Then learning from 3 windows" in one_line(result.output)
    fails_with(
        "--length must be at least 1, not 0", *given, "--overwrite", "--length", 0, "--dry-run"
    )
    large = 2**64 - 1
    result = run(*given, "--overwrite", "--samples", 4, "--sample-seed", large)
    assert "taken at random (seed 0)" in one_line(result.output)


def test_what_compress_distils_on(work: Path, tmp_path: Path) -> None:
    """By default 48 windows, of windows at random others; as far as the text goes."""
    result = run(*compress_arguments(work, tmp_path / "out"))
    tokens = len(tokenize(tiny_tokenizer(), TEXT))
    assert f"Then learning from {tokens // 64 - 4} windows of 64 tokens" in one_line(result.output)
    assert "The text has no more: 48 were asked for." in one_line(result.stderr)
    result = run(*compress_arguments(work, tmp_path / "random", "--sample-seed", 3, "--distill", 2))
    assert "Then learning from 2 windows of 64 tokens, taken at random (seed 4)." in one_line(
        result.output
    )
    everything = compress_arguments(work, tmp_path / "all", "--samples", tokens // 64)
    result = run(*everything)
    assert result.exit_code == 0, result.output
    assert "The text has nothing left to learn from afterwards" in one_line(result.stderr)
    assert json.loads((tmp_path / "all" / "report.json").read_text())["distillation"] is None
    pruned = compress_arguments(work, tmp_path / "pruned")
    pruned[4:10] = ["--method", "prune"]
    result = run(*pruned)
    assert result.exit_code == 0, result.output
    assert "learning" not in result.output
    alone = compress_arguments(work, tmp_path / "no", "--recipe", "paper", "--distill", 2)
    fails_with("--distill belongs to --recipe feedback", *alone)


def test_windows_of_each_text() -> None:
    texts = [torch.arange(70), torch.arange(30) + 100, torch.arange(10) + 200]
    for samples in range(1, 13):
        taken = windows_of_each([len(text) // 10 for text in texts], samples)
        windows = mixed_batches(texts, samples=samples, length=10)
        assert sum(taken) == len(windows) == min(samples, 11)
        firsts = [int(window[0, 0]) // 100 for window in windows]
        assert taken == [firsts.count(text) for text in range(3)]


def test_a_text_for_those_who_have_none(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of Python's own documentation; a file of that name comes first."""
    monkeypatch.chdir(tmp_path)
    given = compress_arguments(work, tmp_path / "out", "--distill", 2)
    given[given.index("--text") + 1] = "python-docs"
    result = run(*given)
    assert result.exit_code == 0, result.output
    assert "Then learning from 2 windows of 64 tokens" in one_line(result.output)
    (tmp_path / "python-docs").write_text("too short")
    fails_with("the text has 9 tokens, less than one window of 64", *given, "--overwrite")
