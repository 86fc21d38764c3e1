"""Models that mix methods, settings and dense layers."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_models import logits, random_act_norms, tiny_model
from torch import nn

import nowag_ext
from nowag_ext import ModelReport, compress_model, prune, save_compressed, vq_compress
from nowag_ext.cli.options import parse_overrides
from nowag_ext.decoder import decoder_linears
from nowag_ext.render import report_table

VQ: dict[str, Any] = {"d": 4, "bits": 1.5, "iters": 4}
DOWN = "model.layers.1.mlp.down_proj"
MIXED: dict[str, dict[str, Any]] = {
    "down_proj": {"bits": 2},
    "self_attn.o_proj": {"method": "prune", "pattern": "2:4"},
    "re:layers[.]1[.].*v_proj": {"method": "prune"},
}


def test_a_model_mixes_methods_settings_and_dense_layers(tmp_path: Path) -> None:
    model = tiny_model()
    norms = random_act_norms(model)
    dense = {name: linear.weight.detach() for name, linear in decoder_linears(model).items()}
    compress_model(model, norms, "vq", ["gate_proj"], overrides=MIXED, **VQ)
    for name, weight in dense.items():
        module = model.get_submodule(name)
        if name.endswith("gate_proj"):
            assert type(module) is nn.Linear
            continue
        want: Any
        if name.endswith("o_proj"):
            want = prune(weight, norms[name], pattern="2:4")
        elif name == "model.layers.1.self_attn.v_proj":
            want = prune(weight, norms[name], sparsity=0.5)
        else:
            bits = 2 if name.endswith("down_proj") else VQ["bits"]
            want = vq_compress(weight, norms[name], **{**VQ, "bits": bits})
        for part, tensor in want.tensors().items():
            assert torch.equal(module.get_parameter(part), tensor)
    save_compressed(model, None, tmp_path / "mixed")
    loaded = nowag_ext.load(tmp_path / "mixed")
    assert torch.equal(logits(model), logits(loaded))
    groups = loaded.config.quantization_config.groups
    assert [(g["method"], len(g["modules"])) for g in groups] == [
        ("vq", 7), ("prune", 2), ("vq", 2), ("prune", 1),
    ]  # fmt: skip
    card = (tmp_path / "mixed" / "README.md").read_text()
    assert "7 by vector quantisation (d 4, bits 1.5" in card
    assert "2 by pruning (pattern 2:4)" in card
    report = ModelReport.from_json((tmp_path / "mixed" / "report.json").read_text())
    assert report == model.nowag_report
    by_name = {layer.name: layer for layer in report.layers}
    assert by_name[DOWN].settings["bits"] == 2
    assert by_name["model.layers.0.self_attn.o_proj"].method == "prune"
    text = (tmp_path / "mixed" / "layers.csv").read_text()
    assert '"pattern 2:4"' in text or ",pattern 2:4," in text
    table = Console(width=200, record=True, file=io.StringIO())
    table.print(report_table(report))
    assert "down_proj (bits 2)" in table.export_text()


@pytest.mark.parametrize(
    ("overrides", "error", "sentence"),
    [
        ({"nowhere": {"bits": 2}}, ValueError, "overrides pattern 'nowhere' names no linear layer"),
        ({"re:(": {"bits": 2}}, ValueError, r"overrides pattern 're:\('"),
        ({"down_proj": {"bits": 9}}, ValueError, r"override 'down_proj': d \* bits must be"),
        ({"down_proj": {"sparsity": 0.5}}, TypeError, "override 'down_proj': .* no setting 'spars"),
        ({"down_proj": {"method": "magic"}}, ValueError, "override 'down_proj': method must be"),
        ({"o_proj": {"method": "prune", "bits": 2}}, TypeError, "no setting 'bits'"),
        ({"down_proj": None}, TypeError, "override 'down_proj' must be a pattern and a mapping"),
        ({3: {"bits": 2}}, TypeError, "override 3 must be a pattern and a mapping"),
        ("down_proj", TypeError, "overrides must map patterns to settings"),
        ({"q_proj": {"d": 6, "bits": 2}}, ValueError, r"layers\.0\.self_attn\.q_proj is too small"),
        ({"lm_head": {"bits": 2}}, ValueError, "'lm_head' names no linear of the decoder layers"),
        ({"gate_proj": {"bits": 2}}, ValueError, "'gate_proj' names only what ignore leaves dense"),
    ],
)
def test_unfit_overrides(overrides: Any, error: type[Exception], sentence: str) -> None:
    model = tiny_model()
    before, norms = copy.deepcopy(model.state_dict()), random_act_norms(model)
    with pytest.raises(error, match=sentence):
        compress_model(model, norms, "vq", ["gate_proj"], overrides=overrides, **VQ)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_overrides_of_the_command_line() -> None:
    texts = [
        "down_proj bits=3",
        "re:layers[.]0[.] method=prune pattern=2:4",
        "up_proj d=6 bits=1.5",
    ]
    assert parse_overrides(texts) == {
        "down_proj": {"bits": 3},
        "re:layers[.]0[.]": {"method": "prune", "pattern": "2:4"},
        "up_proj": {"d": 6, "bits": 1.5},
    }
    with pytest.raises(ValueError, match=r"--override 'down_proj bits' must be a pattern and"):
        parse_overrides(["down_proj bits"])
    with pytest.raises(ValueError, match=r"but 'bits=many' is none"):
        parse_overrides(["down_proj bits=many"])
    for text in ("down_proj", ""):
        with pytest.raises(ValueError, match="names no setting"):
            parse_overrides([text])
