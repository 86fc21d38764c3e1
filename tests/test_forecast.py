"""What a compression will write and take, foretold from a model's outline."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import TEXT, save_tiny, tiny_llama
from tiny_models import ARCHITECTURES, tiny_model, tiny_tokens
from typer.testing import CliRunner, Result

import nowag_ext
from nowag_ext import cost, disk, speeds
from nowag_ext.cli import app
from nowag_ext.cost import Work, affordable_samples, forecast
from nowag_ext.decoder import decoder_layers, decoder_linears
from nowag_ext.forecast import sizes, skeleton
from nowag_ext.methods import LayerSettings, VQSettings
from nowag_ext.pipeline.blocks import Blocks
from nowag_ext.speeds import Search, Speeds

TOKENS = torch.randint(0, 257, (4, 16), generator=torch.Generator().manual_seed(1))
VQ: dict[str, Any] = {"d": 4, "bits": 2, "iters": 2}


SPEEDS = Speeds(1e6, 1e5, 1e7, 1e-3, 1e-3, 1e-9, Search(1e-7, 1e-7, 1e-8, 1e-9))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    return save_tiny(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(autouse=True)
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speeds, "_SECONDS", 0.001)
    monkeypatch.setattr(speeds, "_POINTS", 1024)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("method", "more", "settings"),
    [
        ("vq", {}, VQ),
        ("vq", {"codebook_scope": "kind", "ignore": ["o_proj"], "dtype": "bfloat16"}, VQ),
        ("prune", {"overrides": {"up_proj": {"method": "vq", **VQ}}}, {"pattern": "2:4"}),
        ("vq", {"checkpoint_format": "dense", "dtype": "float16"}, VQ),
        ("vq", {"head": {"d": 2, "bits": 4}, "dtype": "bfloat16"}, VQ),
    ],
)
def test_bytes_and_bits_are_those_of_the_run(
    source: Path, tmp_path: Path, method: str, more: dict[str, Any], settings: dict[str, Any]
) -> None:
    output = tmp_path / "out"
    report = nowag_ext.compress(source, TOKENS, method, output=output, **more, **settings)
    job = disk.Job(
        str(source), tmp_path / "other", method, settings, more.get("overrides", {}),
        tuple(more.get("ignore", ["lm_head"])), more.get("codebook_scope", "model"),
        head=more.get("head"),
        dtype=more.get("dtype", "auto"), checkpoint_format=more.get("checkpoint_format", "nowag"),
    )  # fmt: skip
    foretold = job.sizes(job.outline())
    written = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    assert foretold.checkpoint == pytest.approx(written, rel=2e-3)
    assert foretold.bits_per_weight == report.bits_per_weight
    assert foretold.weights == report.compressed_weights
    assert foretold.compressed == report.bytes
    assert foretold.head == (report.head.bytes if "head" in more else 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_groups_are_those_that_a_run_finds(architecture: str) -> None:
    model = tiny_model(architecture)
    blocks = Blocks(model, 8)
    hidden = blocks.embed(tiny_tokens(1, 8)).float()
    found = [
        (
            group.in_features,
            tuple(decoder_linears(model)[name].out_features for name in group.names),
            None not in group.taps,
        )
        for group in blocks.groups(0, hidden)
    ]
    name, layer = next(iter(decoder_layers(model).items()))
    guessed = cost._layer(name, layer, ["lm_head"], 64)
    assert [(one.inputs, one.outputs, one.sums) for one in guessed.groups] == found


def foretold(source: Path, settings: LayerSettings, scope: str, work: Work) -> cost.Forecast:
    outline = skeleton(source, "auto")
    written = sizes(outline, settings, ["lm_head"], scope, dense=False)
    return forecast(outline, settings, ["lm_head"], scope, written, work)


@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("method", ["vq", "prune"])
def test_stages_are_those_of_a_run(source: Path, scope: str, method: str) -> None:
    settings = VQ if method == "vq" else {}
    model = nowag_ext.compress(tiny_llama(), TOKENS, method, codebook_scope=scope, **settings)
    taken = foretold(
        source, LayerSettings(method, settings, {}), scope, Work("feedback", 4, 16, False)
    )
    stages = set(model.nowag_report.stages)
    if scope == "layer" or method == "prune":
        stages -= {"codebooks", "re-estimation"}  # entered, but there is nothing to do
    assert set(taken.stages) == stages
    assert all(seconds > 0 for seconds in taken.stages.values())


def test_what_takes_more(source: Path) -> None:
    settings = LayerSettings("vq", VQ, {})
    few, many, offloaded = (
        foretold(source, settings, "model", Work("feedback", windows, 512, offload))
        for windows, offload in ((4, False), (4000, False), (4000, True))
    )
    assert many.stages["forwards"] > 100 * few.stages["forwards"]
    states = 2 * 4000 * 512 * 64 * 4
    assert many.memory["hidden states"] == states
    assert many.peak_memory - offloaded.peak_memory == pytest.approx(states, rel=0.5)
    paper = foretold(source, settings, "layer", Work("paper", 4, 512, False))
    assert set(paper.stages) == {"activation norms", "compression"}
    given = foretold(source, settings, "layer", Work("paper", 0, 512, False))
    assert set(given.stages) == {"compression"}
    assert given.peak_memory < paper.peak_memory
    packed = VQSettings(d=2, bits=4)
    head = foretold(source, settings, "model", Work("feedback", 4, 512, False, packed))
    assert head.stages["head"] > 0
    assert {**head.stages, "head": 0}.keys() == {**few.stages, "head": 0}.keys()
    assert head.peak_memory >= few.peak_memory


def test_what_distillation_takes(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = LayerSettings("vq", VQ, {})
    monkeypatch.setattr(cost, "measure_speeds", lambda *_: SPEEDS)

    def taken(windows: int, length: int) -> Any:
        work = Work("feedback", 4, 512, False, distilled=windows, distilled_length=length)
        return foretold(source, settings, "model", work)

    without = taken(0, 512)
    assert "distillation" not in without.stages
    few, many, short = taken(8, 512), taken(16, 512), taken(8, 256)
    assert {**without.stages, "distillation": 0}.keys() == few.stages.keys()
    assert many.stages["distillation"] == pytest.approx(2 * few.stages["distillation"])
    assert short.stages["distillation"] < 0.6 * few.stages["distillation"]
    assert few.seconds > without.seconds
    assert many.peak_memory >= few.peak_memory >= without.peak_memory


@pytest.mark.parametrize("recipe", ["feedback", "paper"])
def test_windows_that_there_is_time_for(
    source: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more would take longer; less time than the rest takes is enough for none."""
    settings = LayerSettings("vq", VQ, {})
    monkeypatch.setattr(cost, "measure_speeds", lambda *_: SPEEDS)

    def seconds(windows: int) -> float:
        return foretold(source, settings, "model", Work(recipe, windows, 64, False)).seconds

    for windows in (9, 40, 1000):
        for budget in (seconds(windows) + 1e-6, seconds(windows + 1) - 1e-6):
            outline, work = skeleton(source, "auto"), Work(recipe, 0, 64, False)
            got = affordable_samples(outline, settings, ["lm_head"], "model", work, budget)
            assert got == windows
    assert affordable_samples(outline, settings, ["lm_head"], "model", work, 1e-9) == 0


def test_a_dry_run_reads_no_weights_and_writes_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "text").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    common = ["compress", "model", "-o", "out", "--d", 4, "--bits", 2, "--dry-run"]
    before = sorted(map(str, tmp_path.rglob("*")))
    result = run(*common, "--text", "text", "--samples", 5, "--length", 64)
    assert result.exit_code == 0, result.output
    assert "bits per compressed weight" in result.output
    assert "2.750" in result.output
    assert "From 5 windows of 64 tokens, by --recipe feedback. Nothing was written." in (
        " ".join(result.output.split())
    )
    assert sorted(map(str, tmp_path.rglob("*"))) == before
    for more, sentence in {
        ("--codebook-scope", "layer", "--d", 8): "is too small",
        ("--ignore", "nope"): "names no linear",
        ("-o", "model"): "--output: .*exists and is not empty",
    }.items():
        result = run(*common, "--text", "text", *more)
        assert result.exit_code == 1, result.output
        assert re.match(f"Error: .*{sentence}", result.stderr)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoConfig": "own.Config"}})
    )
    result = run(*common, "--text", "text")
    assert "--dry-run: model brings Python code of its own" in result.stderr
    assert sorted(map(str, tmp_path.rglob("*"))) == before
