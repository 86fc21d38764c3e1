"""Checkpoints of format version 1, kept as an earlier release wrote them: they load for ever."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import nowag_ext
from nowag_ext import ModelReport

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("name", ["v1_vq", "v1_prune"])
def test_version_1_loads_and_is_written_back_as_version_2(name: str, tmp_path: Path) -> None:
    stored = json.loads((DATA / name / "config.json").read_text())["quantization_config"]
    assert stored["format_version"] == 1
    expected = load_file(DATA / f"{name}.expected.safetensors")
    model = nowag_ext.load(DATA / name)
    with torch.inference_mode():
        logits = model(input_ids=expected["input_ids"]).logits.float()
    # Written where the GEMM's sums may have had another order.
    torch.testing.assert_close(logits, expected["logits"], rtol=2e-2, atol=2e-2)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["format_version"] == 2
    for group in written["groups"]:
        assert group["method"] == stored["method"]
        assert group["settings"] == stored["settings"]
    again = nowag_ext.load(tmp_path)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key


@pytest.mark.parametrize("name", ["v1_vq", "v1_prune"])
def test_reports_of_version_1_are_read(name: str) -> None:
    report = ModelReport.from_json((DATA / name / "report.json").read_text())
    assert {layer.method for layer in report.layers} == {report.method}
    assert report.codebook_bytes == 0
    assert 0 < report.bits_per_weight < 16
