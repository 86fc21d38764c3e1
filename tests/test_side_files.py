"""What goes with the weights of a model: all that loaders and licences need, and no more."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import gguf_model, write_gguf
from tiny_models import random_act_norms, tiny_model

import nowag_ext
from nowag_ext import compress_model, load_dense_model, save_compressed, save_dense

SIDE = (
    "LICENSE", "Licence.txt", "NOTICE", "USE_POLICY.md", "COPYING.LESSER", "LICENSES/MIT.txt",
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/tool.jinja",
    "tokenizer.model", "tokenizer.model.v3", "tekken.json", "vocab.txt", "merges.txt",
    "qwen.tiktoken", "special_tokens_map.json", "modeling_tiny.py", "configuration_tiny.py",
    "custom_generate/generate.py", "modules.json", "1_Pooling/config.json", "requirements.txt",
)  # fmt: skip
OTHERS = (
    "README.md", "pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth",
    "model-q4.gguf", "tf_model.h5", "flax_model.msgpack", "model.onnx", "onnx/config.json",
    "adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "training_args.bin",
    "quantize_config.json", ".git/config.json", "notes.txt", "photo.png", "venv/lib/module.py",
    "model.safetensors.index.json.bak", "checkpoint-5/tokenizer.json",
)  # fmt: skip


def fill(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}" if name.endswith(".json") else f"this is {name}")


def files(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def dense_folder(folder: Path) -> Path:
    tiny_model().save_pretrained(folder)
    fill(folder, SIDE + OTHERS)
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: tiny-terms\nlicense_link: LICENSE\ntags: [a]\n---\nHi\n"
    )
    return folder


def compressed(source: Path | str) -> Any:
    model = load_dense_model(source, torch.float32)[0]
    return compress_model(model, random_act_norms(model), "prune")


@pytest.mark.parametrize("save", [save_compressed, save_dense])
def test_all_that_is_needed_and_no_more(save: Any, tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "source")
    assert save(compressed(source), None, tmp_path / "out") == {}
    ours = {".nowag_ext.json", "config.json", "generation_config.json", "model.safetensors"}
    written = ours | {"README.md", "report.json", "layers.csv"}
    assert files(tmp_path / "out") == written | set(SIDE)
    for name in SIDE:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'license: "other"\nlicense_name: "tiny-terms"\nlicense_link: "LICENSE"\ntags:' in card
    model = nowag_ext.load(tmp_path / "out") if save is save_compressed else None
    if model is not None:
        save_compressed(model, None, tmp_path / "again")
        assert files(tmp_path / "again") == written | set(SIDE)


def test_what_is_written_is_not_overwritten(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "source")
    (source / "report.json").write_text('{"mine": 1}')
    (source / "generation_config.json").write_text('{"max_new_tokens": 5}')
    model = compressed(source)
    model.generation_config.max_new_tokens = 7
    save_compressed(model, None, tmp_path / "out")
    assert "mine" not in (tmp_path / "out" / "report.json").read_text()
    config = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert config["max_new_tokens"] == 7


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "source")
    (tmp_path / "secret").write_text("a key")
    (source / "LICENSE").unlink()
    (source / "LICENSE").symlink_to(tmp_path / "secret")
    (source / "NOTICE").unlink()
    (source / "NOTICE").symlink_to("Licence.txt")
    os.mkfifo(source / "vocab.json")
    (source / "merges.txt").unlink()
    (source / "merges.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"merges\.txt is a link that leads out"):
        load_dense_model(source)
    (source / "merges.txt").unlink()
    left_out = save_compressed(compressed(source), None, tmp_path / "out")
    assert left_out == {
        "LICENSE": "it is a link that leads out of the model's folder",
        "vocab.json": "it is no regular file",
    }
    assert (tmp_path / "out" / "NOTICE").read_text() == "this is Licence.txt"
    assert not (tmp_path / "out" / "NOTICE").is_symlink()


def test_a_source_that_is_gone_and_none_at_all(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "source")
    model = compressed(source)
    shutil.rmtree(source)
    assert save_compressed(model, None, tmp_path / "out") == {}
    model = tiny_model()
    compress_model(model, random_act_norms(model), "prune")
    assert save_compressed(model, None, tmp_path / "other") == {}


def test_beside_a_gguf_file(tmp_path: Path) -> None:
    source = tmp_path / "downloads"
    source.mkdir()
    write_gguf(source / "tiny.gguf", gguf_model())
    fill(source, ("LICENSE", "NOTICE.md", "chat_template.jinja", "processor_config.json",
                  "holiday.json", "script.py", "other.gguf", "tokenizer.model"))  # fmt: skip
    model, tokenizer = load_dense_model(source / "tiny.gguf")
    compress_model(model, random_act_norms(model), "prune")
    save_compressed(model, tokenizer, tmp_path / "out")
    got = files(tmp_path / "out")
    assert got >= {"LICENSE", "NOTICE.md", "processor_config.json", "tokenizer.model"}
    assert not got & {"holiday.json", "script.py", "other.gguf", "tiny.gguf"}


def test_out_of_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a snapshot are links to blobs, and are copied as files."""
    dense_folder(tmp_path / "source")
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--some--tiny"
    for name in files(tmp_path / "source"):
        blob = repository / "blobs" / name.replace("/", "-")
        link = repository / "snapshots" / commit / name
        for folder in (blob.parent, link.parent):
            folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "source" / name, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    model, _ = load_dense_model("some/tiny", cache_dir=tmp_path / "hub")
    compress_model(model, random_act_norms(model), "prune")
    save_compressed(model, None, tmp_path / "out")
    assert files(tmp_path / "out") >= set(SIDE)
    assert not any(file.is_symlink() for file in (tmp_path / "out").rglob("*"))
    snapshot = repository / "snapshots" / commit
    assert save_compressed(compressed(snapshot), None, tmp_path / "other") == {}
    assert files(tmp_path / "other") == files(tmp_path / "out")
