"""Text that a model writes itself: drawn from what it says, kept, and calibrated on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import families, make_model
from test_cli import VQ, fails_with, one_line, run
from tiny_model import TEXT, save_work, tiny_llama, tiny_tokenizer
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import nowag_ext
from nowag_ext import self_text
from nowag_ext.cli import compress as command
from nowag_ext.evaluate import tokenize
from nowag_ext.sampling import AT_ONCE, windows_to_write

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    return save_work(tmp_path_factory.mktemp("work"))


def arguments(work: Path, output: Path, *texts: object, distill: int = 2) -> list[Any]:
    given = [part for text in texts for part in ("--text", text)]
    return ["compress", work / "model", "-o", output, *VQ, *given, "--length", 32,
            "--samples", 4, "--distill", distill]  # fmt: skip


@torch.no_grad()
def surprise(model: Any, first: int, tokens: Tensor) -> tuple[float, float]:
    """Nats a token that the model is surprised by, and those that it expects to be."""
    ids = torch.cat([torch.full((len(tokens), 1), first), tokens], 1)
    said = torch.log_softmax(model(ids).logits[:, :-1].double(), -1)
    chosen = said.gather(-1, tokens[..., None])
    return -float(chosen.mean()), -float((said.exp() * said).sum(-1).mean())


@families
def test_is_drawn_from_what_the_model_says(family: str) -> None:
    model = make_model(family)
    model.generation_config.bos_token_id = 3
    for parameter in model.parameters():  # random models say anything
        parameter.data *= 1.5
    tokens = self_text(model, 24, 20)
    assert tokens.shape == (24, 20)
    assert tokens.dtype == torch.int64
    got, expected = surprise(model, 3, tokens)
    assert got == pytest.approx(expected, abs=0.3)


def test_is_drawn_from_what_a_model_says_that_is_sure_of_much() -> None:
    model = tiny_llama()  # of large weights; its texts begin after the one that ended
    tokens = self_text(model, 64, 32)
    got, expected = surprise(model, 0, tokens)
    assert expected < 0.9 * torch.tensor(257.0).log()
    assert got == pytest.approx(expected, abs=0.1)
    shuffled, _ = surprise(model, 0, tokens[:, torch.randperm(32)])
    assert shuffled > expected + 0.5


def test_is_the_same_again() -> None:
    model = tiny_llama()
    before = torch.get_rng_state()
    tokens = self_text(model, AT_ONCE + 2, 8, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(self_text(model, AT_ONCE + 2, 8, seed=5), tokens)
    assert not torch.equal(self_text(model, AT_ONCE + 2, 8, seed=6), tokens)
    assert len(tokens.unique(dim=0)) == AT_ONCE + 2


def test_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    model = tiny_llama()
    windows, length = 2 * AT_ONCE + 1, 6
    whole = self_text(model, windows, length, seed=1)
    seen: list[float] = []

    def show(stage: str, done: float, total: float) -> None:
        assert (stage, total) == ("writing text", windows * length)
        seen.append(done)
        if len(seen) == length + 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        self_text(model, windows, length, seed=1, work_dir=tmp_path, progress=show)
    assert sorted(seen) == seen
    seen[:] = [0.0] * 99
    assert torch.equal(
        self_text(model, windows, length, seed=1, work_dir=tmp_path, progress=show), whole
    )
    assert seen[99] == AT_ONCE * length
    seen[:] = [0.0] * 99
    self_text(model, windows, length, seed=1, work_dir=tmp_path, progress=show)
    assert len(seen) == 99
    self_text(tiny_llama(seed=1), windows, length, seed=1, work_dir=tmp_path, progress=show)
    assert seen[99] == 0


def broken() -> Any:
    model = tiny_llama()
    model.model.norm.weight.data[0] = torch.nan
    return model


def on_disk() -> Any:
    return tiny_llama().to("meta")


def learnt() -> Any:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=8, vocab_size=20,
                        bos_token_id=1, eos_token_id=1)  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize(
    ("model", "given", "sentence"),
    [
        (tiny_llama, {"windows": 0}, "windows must be an integer from 1 to .*, not 0"),
        (tiny_llama, {"length": 2.5}, "length must be an integer from 1 to .*, not 2.5"),
        (tiny_llama, {"seed": -1}, "seed must be an integer from 0"),
        (broken, {}, "logits are not finite after 0 tokens of its own: it is damaged"),
        (on_disk, {}, "must be in memory, but model.embed_tokens.weight is not"),
        (learnt, {"length": 9}, "a prompt of 1 tokens and 9 new ones are more than the 8 posi"),
    ],
)
def test_refusals(model: Callable[[], Any], given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        self_text(model(), **{"windows": 2, "length": 4, **given})


def test_as_many_tokens_as_there_are_positions() -> None:
    assert self_text(learnt(), 3, 8).shape == (3, 8)


def test_its_share_of_the_text() -> None:
    for texts in (1, 2, 3):
        for samples, later in ((4, 0), (5, 64), (32, 100)):
            windows = windows_to_write(samples, 32, later, texts)
            assert windows * 32 * texts >= samples * 32 + later
            assert (windows - 2) * 32 * texts < samples * 32 + later


def test_compress_on_it(work: Path, tmp_path: Path) -> None:
    result = run(*arguments(work, tmp_path / "out", "self"))
    assert result.exit_code == 0, result.output
    tokens = self_text(tiny_llama(), 6, 32)
    nowag_ext.compress(
        work / "model", tokens[:4], output=tmp_path / "python", distill_tokens=tokens[4:],
        d=4, bits=2, iters=3,
    )  # fmt: skip
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "python")]
    assert files[0] == files[1]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["stages"]["writing text"] > 0
    assert report["seconds"] > report["stages"]["writing text"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "python"]


def test_compress_on_it_beside_other_text(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Tensor] = []
    through = command.compress_blocks

    def look(model: Any, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        taken.append(tokens)
        return through(model, tokens, *args, **kwargs)

    monkeypatch.setattr(command, "compress_blocks", look)
    result = run(*arguments(work, tmp_path / "out", work / "text.txt", "self"))
    assert result.exit_code == 0, result.output
    own = self_text(tiny_llama(), 3, 32)
    text = tokenize(tiny_tokenizer(), TEXT).view(-1)
    wanted = torch.stack([text[:32], own[0], text[32:64], own[1]])
    assert torch.equal(taken[0], wanted)
    assert "from 2 texts in turn" in one_line(result.output)


def test_goes_on_with_what_was_written(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_args: Any, **_kwargs: Any) -> None:
        raise KeyboardInterrupt

    given = arguments(work, tmp_path / "out", "self")
    assert run(*arguments(work, tmp_path / "whole", "self")).exit_code == 0
    with monkeypatch.context() as patched:
        patched.setattr(command, "compress_blocks", stop)
        assert run(*given).exit_code != 0
    assert (tmp_path / "out.partial" / "text.safetensors").exists()
    fails_with("made with --text .'written by the model'., not", *arguments(
        work, tmp_path / "out", work / "text.txt"
    ))  # fmt: skip
    with monkeypatch.context() as patched:
        patched.setattr("nowag_ext.sampling._written", stop)
        result = run(*given)
    assert result.exit_code == 0, result.output
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert files[0] == files[1]


def test_what_cannot_be(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fails_with("--text: self can be given once", *arguments(work, "out", "self", "self"))
    fails_with("there is no text file self", "calibrate", work / "model", "--text", "self",
               "-o", "stats")  # fmt: skip
    with monkeypatch.context() as patched:
        patched.setattr(os, "sysconf", lambda name: 1)
        sentence = "--text: to write text the model must be in memory"
        fails_with(sentence, *arguments(work, "out", "self"))
    assert list(tmp_path.iterdir()) == []
    Path("self").write_text(TEXT)  # a file of that name comes first
    result = run(*arguments(work, "out", "self", distill=0))
    assert result.exit_code == 0, result.output
    assert "writing text" not in json.loads(Path("out/report.json").read_text())["stages"]


@pytest.mark.parametrize("seed", [3, 2**64 - 1])
def test_windows_at_random(work: Path, tmp_path: Path, seed: int) -> None:
    result = run(*arguments(work, tmp_path / "out", "self"), "--sample-seed", seed)
    assert result.exit_code == 0, result.output
    assert f"taken at random (seed {seed})" in one_line(result.output)


def test_dry_run(work: Path, tmp_path: Path) -> None:
    without = run(*arguments(work, tmp_path / "out", "python-docs"), "--dry-run")
    result = run(*arguments(work, tmp_path / "out", "self", "python-docs"), "--dry-run")
    assert result.exit_code == 0, result.output
    assert "writing text" in result.output
    assert "writing text" not in without.output
    assert list(tmp_path.iterdir()) == []
