"""The demo from end to end, on a tiny model; on the real one where it is in the cache."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.control import strip_control_codes
from tiny_model import save_tiny
from typer.testing import CliRunner

import nowag_ext
from nowag_ext import demo as demo_module
from nowag_ext import gemm
from nowag_ext.cli import app
from nowag_ext.demo import DemoResult, Effort, Method, run_demo
from nowag_ext.demo_text import demo_text
from nowag_ext.evaluate import perplexity, tokenize
from nowag_ext.source import open_model

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = ["dense", "VQ 2 bits", "50 %"]


EFFORT = Effort(
    window=128, calibration_windows=2, held_out_windows=2, iters=2, new_tokens=4, rounds=1,
    sample_tokens=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@dataclass(frozen=True)
class Run:
    result: DemoResult
    output: Path
    printed: str


@pytest.fixture(scope="module")
def demo(tiny: Path, one_thread: None) -> Run:
    out, err = (Console(file=io.StringIO(), width=200) for _ in range(2))
    output = tiny.parent / "out"
    result = run_demo(str(tiny), output, out=out, err=err, effort=EFFORT)
    assert isinstance(out.file, io.StringIO)
    return Run(result, output, out.file.getvalue())


def test_table_and_json_say_the_same(demo: Run) -> None:
    written = json.loads((demo.output / "demo.json").read_text())
    assert written == json.loads(json.dumps(asdict(demo.result)))
    assert [row["name"] for row in written["rows"]] == ROWS
    for row in written["rows"]:
        assert row["name"] in demo.printed
        assert f"{row['bits_per_weight']:.2f}" in demo.printed
        assert f"{row['perplexity']:.2f}" in demo.printed
        assert strip_control_codes(row["sample"].strip()) in demo.printed
        assert (demo.output / row["directory"] / "config.json").is_file()
        size = (demo.output / row["directory"] / "model.safetensors").stat().st_size
        assert row["bytes"] == size
    dense, vq, half = written["rows"]
    assert dense["bits_per_weight"] == 16
    assert (dense["compress_seconds"], vq["settings"]["iters"]) == (None, 2)
    assert vq["compress_seconds"] > 0
    assert half["compress_seconds"] > 0
    assert half["settings"] == {"sparsity": 0.5}


def test_what_it_was_measured_on_is_printed(demo: Run) -> None:
    assert "2 windows of 128 tokens for calibration" in demo.printed
    assert "first 2 non-overlapping windows of 128 tokens" in demo.printed
    assert "At most 2 k-means iterations" in demo.printed
    assert str(demo.output) in demo.printed


def test_demo_measures_what_it_saved(demo: Run) -> None:
    """The figures are those of the checkpoint on disk, on held-out text, in the dtype it says."""
    for row in demo.result.rows:
        loaded, tokenizer = open_model(demo.output / row.directory, demo.result.quality_dtype)
        tokens = tokenize(tokenizer, demo_text().held_out)
        again = perplexity(loaded, tokens, window=128, windows=2).perplexity
        assert again == pytest.approx(row.perplexity, rel=1e-4)
    packed = nowag_ext.load(demo.output / "pruned-50-percent").state_dict()
    assert packed["model.layers.0.mlp.up_proj.values"].dtype == torch.bfloat16


def test_quality_is_measured_in_float32_where_bfloat16_is_slow(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm, "cpu_has_gemm", lambda dtype: False)
    monkeypatch.setattr(
        demo_module, "tokens_per_second", lambda model, *_, **__: 16.0 / model.dtype.itemsize
    )
    err = Console(file=io.StringIO())
    result = run_demo(str(tiny), tmp_path / "out", out=err, err=err, effort=EFFORT)
    assert (result.generation_dtype, result.quality_dtype) == ("bfloat16", "float32")
    for row in result.rows:
        assert (row.tokens_per_second, row.dense_tokens_per_second) == (8.0, 8.0)
        loaded, tokenizer = open_model(tmp_path / "out" / row.directory, "float32")
        tokens = tokenize(tokenizer, demo_text().held_out)
        again = perplexity(loaded, tokens, window=128, windows=2).perplexity
        assert again == pytest.approx(row.perplexity, rel=1e-5)


def test_what_a_demo_left_is_replaced(demo: Run, tiny: Path) -> None:
    (demo.output / "vq-2-bits" / "config.json").write_text("damaged")
    arguments = ["demo", "--model", str(tiny), "-o", str(demo.output), "--fast"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    # The model's window is shorter than the demo's.
    assert "first 2 non-overlapping windows of 256 tokens" in " ".join(result.stdout.split())
    nowag_ext.load(demo.output / "vq-2-bits")


def test_what_is_not_a_demos_is_left_alone(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    result = CliRunner().invoke(app, ["demo", "--model", str(tiny), "-o", str(tmp_path)])
    assert result.exit_code == 1
    assert "exists and is not empty" in result.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]


def test_demo_says_what_is_too_small(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = Method("large", "large", "vq", {"d": 6, "bits": 2}, by_block=True)
    monkeypatch.setattr(demo_module, "methods", lambda _effort: [large])
    model = nowag_ext.load_dense_model(tiny)[0]
    model.config.num_hidden_layers = 1
    model.config.intermediate_size = 8
    small, output = tmp_path / "small", tmp_path / "out"
    type(model)(model.config).save_pretrained(small)
    for file in tiny.glob("tokenizer*"):
        (small / file.name).write_bytes(file.read_bytes())
    result = CliRunner().invoke(app, ["demo", "--model", str(small), "-o", str(output), "--fast"])
    assert result.exit_code == 1
    assert "a codebook of 4096 entries needs at least as many sub-vectors" in result.stderr
    assert not output.exists()
    assert not list(tmp_path.glob(".out*"))


def test_demo_offline_without_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOWAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    result = CliRunner().invoke(app, ["demo", "-o", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "--model" in result.stderr
    assert not (tmp_path / "out").exists()
