"""``nowag-ext compress --head``: the same as in Python, foretold, and refused first."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import VQ, fails_with, one_line, run
from tiny_model import TEXT, save_work, tiny_llama, tiny_tokenizer

import nowag_ext
from nowag_ext.embedding import VQEmbedding
from nowag_ext.evaluate import tokenize

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    return save_work(tmp_path_factory.mktemp("work"))


def arguments(work: Path, output: Path, head: str) -> list[Any]:
    return [
        "compress", work / "model", "-o", output, *VQ, "--length", 64, "--samples", 4,
        "--text", work / "text.txt", "--head", head,
    ]  # fmt: skip


def test_is_what_python_does_and_is_used(work: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = run(*arguments(work, output, "2,4"))
    assert result.exit_code == 0, result.output
    tokens = tokenize(tiny_tokenizer(), TEXT)[: 4 * 64].view(4, 64)
    model = nowag_ext.compress(tiny_llama(), tokens, d=4, bits=2, iters=3, head={"d": 2, "bits": 4})
    stored = nowag_ext.load(output)
    assert isinstance(stored.get_input_embeddings(), VQEmbedding)
    for name, tensor in model.state_dict().items():
        assert torch.equal(stored.state_dict()[name], tensor), name
    for line in ("lm_head", "with it"):
        assert line in one_line(result.output), line
    result = run("generate", output, "--prompt", "It was", "--max-new-tokens", 3)
    assert result.exit_code == 0, result.output
    result = run("eval", output, "--text", work / "text.txt", "--window", 64, "--windows", 2)
    assert result.exit_code == 0, result.output
    result = run("distill", output, "--dense", work / "model", "--text", work / "text.txt",
                 "-o", tmp_path / "distilled", "--length", 64, "--samples", 2)  # fmt: skip
    assert result.exit_code == 0, result.output


def test_a_dry_run_says_what_it_takes(work: Path, tmp_path: Path) -> None:
    result = run(*arguments(work, tmp_path / "out", "2,4"), "--dry-run")
    assert result.exit_code == 0, result.output
    assert "MB of the packed head" in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("head", "more", "sentence"),
    [
        ("2", [], "--head must be D,BITS such as 2,4, not '2'"),
        ("2,4,1", [], "--head must be D,BITS such as 2,4, not '2,4,1'"),
        ("two,4", [], "--head must be D,BITS such as 2,4, not 'two,4'"),
        ("2,nan", [], "--head: d * bits must be an integer, not 2 * nan = nan"),
        ("9,1", [], "--head: d must be an integer from 1 to 8, not 9"),
        ("3,0.5", [], "--head: d * bits must be an integer, not 3 * 0.5 = 1.5"),
        ("4,4", [], "--head: lm_head is too small: its 257 x 64 weights are"),
        ("2,4", ["--recipe", "paper"], "--head belongs to --recipe feedback"),
    ],
)
def test_unfit_heads_are_refused(
    work: Path, tmp_path: Path, head: str, more: list[Any], sentence: str
) -> None:
    fails_with(re.escape(sentence), *arguments(work, tmp_path / "out", head), *more)
    assert list(tmp_path.iterdir()) == []
