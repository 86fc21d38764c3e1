"""The store of finished layers: damage, other runs, other people's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import LINEARS, random_act_norms, tiny_model

from nowag_ext import compress_model
from nowag_ext.resume import clear_store, open_store

VQ: dict[str, Any] = {"d": 4, "bits": 1, "iters": 3}


def compress(directory: Path, seed: int = 0) -> Any:
    model = tiny_model(seed=seed)
    return compress_model(model, random_act_norms(model), work_dir=directory, **VQ)


@pytest.mark.parametrize("where", [0.02, 0.5, 0.999])
def test_a_damaged_layer_is_done_again(tmp_path: Path, where: float) -> None:
    whole = compress(tmp_path)
    file = sorted(tmp_path.glob("*.safetensors"))[3]
    content = bytearray(file.read_bytes())
    content[int(where * len(content))] ^= 0xFF
    file.write_bytes(content)
    again = compress(tmp_path)
    done = [layer.name for layer in again.nowag_report.layers if not layer.resumed]
    assert done == [file.name.removesuffix(".safetensors")]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert all(layer.resumed for layer in compress(tmp_path).nowag_report.layers)


@pytest.mark.parametrize("content", [b"", b"{}", bytes(64)])
def test_a_file_that_is_none_is_done_again(tmp_path: Path, content: bytes) -> None:
    compress(tmp_path)
    next(tmp_path.glob("*.down_proj.safetensors")).write_bytes(content)
    layers = compress(tmp_path).nowag_report.layers
    assert sum(layer.resumed for layer in layers) == LINEARS - 1


def test_a_second_run_is_refused(tmp_path: Path) -> None:
    with open_store(tmp_path), pytest.raises(ValueError, match="another run keeps its finished"):
        compress(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    compress(tmp_path)


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    store = tmp_path / "out.partial"
    compress(store)
    (store / "notes.txt").write_text("mine")
    save_file({"mine": torch.zeros(3)}, store / "mine.safetensors")
    clear_store(store)
    assert sorted(file.name for file in store.iterdir()) == ["mine.safetensors", "notes.txt"]
    (store / "notes.txt").unlink()
    (store / "mine.safetensors").unlink()
    compress(store)
    clear_store(store)
    assert not store.exists()
    clear_store(store)
