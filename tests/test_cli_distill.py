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
from tiny_model import TEXT, save_tiny, tiny_llama, tiny_tokenizer

import nowag_ext
from nowag_ext.evaluate import tokenize
from nowag_ext.pipeline import distill as distillation

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A directory with a model, a text, and what the model was compressed to."""
    directory = tmp_path_factory.mktemp("work")
    save_tiny(directory / "model")
    (directory / "text.txt").write_text(TEXT)
    result = run("compress", directory / "model", "-o", directory / "vq", *VQ, "--length", 64,
                 "--text", directory / "text.txt", "--samples", 4)  # fmt: skip
    assert result.exit_code == 0, result.output
    return directory


def arguments(work: Path, output: Path) -> list[Any]:
    return [
        "distill", work / "vq", "--dense", work / "model", "--text", work / "text.txt",
        "-o", output, "--length", 64, "--samples", 4, "--passes", 2,
    ]  # fmt: skip


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
    assert before == after
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (work / "vq", output)]
    assert sizes[0] == sizes[1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_goes_on_after_an_interrupt(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_every_step(monkeypatch)
    given = arguments(work, tmp_path / "out")
    step, left = distillation._Run._step, [5]

    def interrupted(self: Any, *args: Any) -> float:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return step(self, *args)

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
