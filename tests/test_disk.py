"""Models on disk, compressed by one call of Python: read layer by layer, written whole, resumed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_same_bits
from tiny_model import save_tiny, tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM

import nowag_ext
from nowag_ext import disk
from nowag_ext.checkpoint import save_compressed
from nowag_ext.report import ModelReport

SETTINGS: dict[str, Any] = {"d": 4, "bits": 2, "iters": 3}
TOKENS = torch.randint(0, 257, (4, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    return save_tiny(tmp_path_factory.mktemp("source") / "model")


def state(directory: Path) -> dict[str, Tensor]:
    return nowag_ext.load(directory).state_dict()


def assert_same(one: Path, other: Path) -> None:
    first, second = state(one), state(other)
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert_same_bits(tensor, second[name], name)


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_is_what_it_is_in_memory(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[str] = []
    through = disk.compress_blocks

    def look(model: Any, *args: Any, **kwargs: Any) -> Any:
        held.extend(name for name, one in model.named_parameters() if not one.is_meta)
        assert names(tmp_path) == ["out.partial"]
        return through(model, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(disk, "compress_blocks", look)
        report = nowag_ext.compress(source, TOKENS, output=tmp_path / "out", **SETTINGS)
    assert held
    assert not any("layers" in name for name in held)
    assert isinstance(report, ModelReport)
    stored = ModelReport.from_json((tmp_path / "out" / "report.json").read_text())
    assert stored == report
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert names(tmp_path) == ["out"]
    model = nowag_ext.compress(tiny_llama(), TOKENS, **SETTINGS)
    save_compressed(model, None, tmp_path / "memory")
    assert_same(tmp_path / "out", tmp_path / "memory")


def test_distils_too(source: Path, tmp_path: Path) -> None:
    more = TOKENS.flip(0, 1)
    report = nowag_ext.compress(
        source, TOKENS, output=tmp_path / "out", distill_tokens=more, **SETTINGS
    )
    model = nowag_ext.compress(tiny_llama(), TOKENS, **SETTINGS)
    learnt = nowag_ext.distill(model, tiny_llama(), more)
    save_compressed(model, None, tmp_path / "memory")
    assert_same(tmp_path / "out", tmp_path / "memory")
    assert report.distillation.divergences == learnt.divergences


def test_goes_on_where_it_was(source: Path, tmp_path: Path) -> None:
    def call(tokens: Tensor = TOKENS, **more: Any) -> ModelReport:
        given = {"output": tmp_path / "out", "sparsity": 0.5, **more}
        return nowag_ext.compress(source, tokens, "prune", **given)

    def stop(_name: str, done: float, total: float) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        call(progress=stop)
    assert stopped.value.kept == tmp_path / "out.partial"  # type: ignore[attr-defined]
    assert names(tmp_path) == ["out.partial"]
    for other, named in {
        "tokens": ({"tokens": TOKENS.flip(0)}, "tokens of SHA-256"),
        "model": ({"dtype": torch.bfloat16}, "dtype float32|dtype auto, not dtype bfloat16"),
        "sparsity": ({"sparsity": 0.6}, "sparsity 0.5, not sparsity 0.6"),
    }.values():
        with pytest.raises(ValueError, match=rf"out\.partial was made with .*{named}"):
            call(**other)
    report = call()
    assert {layer.resumed for layer in report.layers} == {True, False}
    assert names(tmp_path) == ["out"]
    call(output=tmp_path / "whole")
    assert_same(tmp_path / "out", tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        call(progress=stop, overwrite=True)
    report = call(sparsity=0.6, overwrite=True, resume=False)
    assert not any(layer.resumed for layer in report.layers)


def test_dtype_and_format(source: Path, tmp_path: Path) -> None:
    nowag_ext.compress(
        str(source), TOKENS, "prune", output=str(tmp_path / "out"), dtype=torch.bfloat16,
        checkpoint_format="dense", sparsity=0.75,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert float((model.model.layers[1].mlp.up_proj.weight == 0).double().mean()) == 0.75


def test_what_is_not_copied_is_warned_of(source: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    (tmp_path / "secret").write_text("a key")
    (tmp_path / "model" / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.warns(UserWarning, match="LICENSE was not copied: it is a link"):
        nowag_ext.compress(tmp_path / "model", TOKENS, "prune", output=tmp_path / "out")


@pytest.mark.parametrize(
    ("error", "sentence", "more"),
    [
        (ValueError, "output must be given, the directory to write", {"output": None}),
        (ValueError, "work_dir is for a model in memory", {"work_dir": "work"}),
        (TypeError, "tokens must be a tensor of int64 or int32, not list", {"tokens": [[1, 2]]}),
        (TypeError, "tokens must be .* not torch.float32", {"tokens": torch.ones(2, 3)}),
        (ValueError, r"tokens must have shape \[windows, length\], not \(64,\)",
         {"tokens": TOKENS.view(-1)}),
        (ValueError, "token ids must be in", {"tokens": TOKENS + 257}),
        (ValueError, "token ids must be in", {"distill_tokens": TOKENS + 257}),
        (TypeError, "distill_tokens must be a tensor of int64", {"distill_tokens": "text"}),
        (ValueError, "checkpoint_format must be one of", {"checkpoint_format": "pickle"}),
        (ValueError, "dtype must be one of", {"dtype": torch.int8}),
        (ValueError, "codebook_scope must be one of", {"codebook_scope": "all"}),
        (ValueError, "d must be an integer", {"d": 9}),
        (TypeError, "no setting 'sparsity'", {"sparsity": 0.5}),
        (ValueError, "names no linear", {"ignore": ["nope"]}),
        (ValueError, "is too small", {"d": 8, "codebook_scope": "layer"}),
        (OSError, "there is no model", {"model_or_path": "nowhere/at/all"}),
        (FileExistsError, "exists and is not empty", {"output": "{source}"}),
    ],
)  # fmt: skip
def test_refuses_in_a_sentence(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[Exception],
    sentence: str,
    more: dict[str, Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"model_or_path": source, "tokens": TOKENS, "output": "out", **SETTINGS, **more}
    if given["output"] == "{source}":
        given["output"] = source
    before = names(source)
    with pytest.raises(error, match=sentence):
        nowag_ext.compress(**given)
    assert names(tmp_path) == []
    assert names(source) == before


@pytest.mark.parametrize(
    "more", [{"output": "out"}, {"dtype": "float32"}, {"overwrite": True}, {"resume": False}]
)
def test_what_is_for_files_is_refused_in_memory(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="are for a model on disk, given by its path or hub id"):
        nowag_ext.compress(tiny_llama(), TOKENS, **SETTINGS, **more)
    with pytest.raises(ValueError, match="distill_tokens is for a model on disk"):
        nowag_ext.compress(tiny_llama(), TOKENS, **SETTINGS, distill_tokens=TOKENS)


def test_python_and_the_command_name_things_alike(source: Path, tmp_path: Path) -> None:
    """What a run is made with is noted by argument, which commands show as options."""
    job = disk.Job(
        str(source), tmp_path / "out", "vq", SETTINGS, {}, ("lm_head", "o_proj"), "model"
    )
    facts = job.made_with()
    assert facts["ignore"] == ["o_proj"]
    assert {"model", "dtype", "iters", "seed", "codebook_scope", "method"} <= set(facts)
    json.dumps(facts)
    assert not any(re.match("-", name) for name in facts)
