"""What a checkpoint's folder may not do: lead out of itself, run code, have things unpickled."""

from __future__ import annotations

import builtins
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import gguf_model, tiny_tokenizer, write_gguf
from tiny_models import random_act_norms, tiny_model
from transformers import AutoModelForCausalLM

import nowag_ext
from nowag_ext import compress_model, load_dense_model, save_compressed
from nowag_ext.checkpoint import load_tokenizer

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """packed and dense: the same model in shards."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_model()
    model.save_pretrained(folder / "dense", max_shard_size="100KB")
    compress_model(model, random_act_norms(model), "prune")
    save_compressed(model, tiny_tokenizer(), folder / "packed", max_shard_size="100KB")
    return folder


def edited(name: str, change: Callable[[Any], Any]) -> Change:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return edit


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def moved(how: str) -> Change:
    """Puts a shard outside of the folder, where the index, or a link, says it is."""

    def move(folder: Path) -> None:
        shard = shards(folder)[0]
        outside = folder.parent / "outside.safetensors"
        shutil.move(shard, outside)
        if how == "link":
            shard.symlink_to(outside)
            return
        name = str(outside) if how == "absolute" else "../outside.safetensors"
        index = folder / "model.safetensors.index.json"
        index.write_text(index.read_text().replace(shard.name, name))

    return move


def pickled(folder: Path) -> None:
    for shard in shards(folder):
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    torch.save({"model.norm.weight": torch.ones(64)}, folder / "pytorch_model.bin")


def into_a_pickle(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shards(folder)[0].name, "pytorch_model.bin"))
    torch.save({"model.norm.weight": torch.ones(64)}, folder / "pytorch_model.bin")


def config(**fields: Any) -> Change:
    return edited("config.json", lambda content: content.update(fields))


OUT = "not in the model's folder|leads out of the model's folder"
CHANGES: dict[str, tuple[Change, str]] = {
    "a relative name": (moved("relative"), OUT),
    "an absolute name": (moved("absolute"), OUT),
    "a link": (moved("link"), OUT),
    "a pickle": (pickled, "no safetensors files but pickles"),
    "a pickle in the index": (into_a_pickle, "weights are read from safetensors files alone"),
    "an index without names": (
        edited("model.safetensors.index.json", lambda index: index.pop("weight_map")),
        r"index\.json is damaged: an index has a weight_map and metadata",
    ),
    "an adapter": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),  # type: ignore[dict-item]
        "holds a PEFT adapter",
    ),
    "a kernel of the hub": (
        config(attn_implementation="some/kernel"), "asks for code from the hub: 'some/kernel'"
    ),
    "layers without end": (
        config(num_hidden_layers=10**9), r"num_hidden_layers in .* 1000000000, but the weights have"
    ),
    "labels without end": (config(num_labels=10**9), "num_labels in .* more than any model has"),
    "no object": (
        lambda folder: (folder / "config.json").write_text("[]"),  # type: ignore[dict-item]
        "must hold a JSON object",
    ),
    "nested": (
        lambda folder: (folder / "config.json").write_text(  # type: ignore[dict-item]
            '{"a": ' + "[" * 10**5 + "]" * 10**5 + "}"
        ),
        "nested too deeply",
    ),
    "another type": (config(hidden_size="64"), "cannot be loaded, damaged or unknown here: Strict"),
    "code of its own": (
        config(model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModel": "own.Own"}),
        r"Python code of its own .*trust_remote_code=True \(--trust-remote-code\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["packed", "dense"])
@pytest.mark.parametrize("name", CHANGES)
def test_what_is_refused(
    name: str, kind: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_args: Any, **_kwargs: Any) -> Any:
        raise AssertionError("nobody is asked, nothing unpickled")

    folder = tmp_path / "model"
    shutil.copytree(folders / kind, folder)
    change, sentence = CHANGES[name]
    change(folder)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr(builtins, "input", forbidden)
    monkeypatch.setattr(pickle, "Unpickler", forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    load: Any = nowag_ext.load if kind == "packed" else load_dense_model
    with pytest.raises((ValueError, OSError), match=sentence):
        load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("how", ["relative", "absolute", "link"])
def test_from_pretrained_stays_in_the_folder(how: str, folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "packed", tmp_path / "model")
    moved(how)(tmp_path / "model")
    with pytest.raises(ValueError, match=OUT):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_tensors_at_odd_addresses_are_copied(folders: Path, tmp_path: Path) -> None:
    """A header of odd length puts all that is mapped from the file at odd addresses."""
    shutil.copytree(folders / "packed", tmp_path / "model")
    for shard in shards(tmp_path / "model"):
        content = shard.read_bytes()
        length = int.from_bytes(content[:8], "little")
        shard.write_bytes((length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" "
                          + content[8 + length :])  # fmt: skip
    for parameter in nowag_ext.load(tmp_path / "model").parameters():
        assert parameter.data_ptr() % parameter.element_size() == 0


def test_links_within_the_folder_and_to_it(folders: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders / "packed", folder)
    shard = shards(folder)[0]
    (folder / "blobs").mkdir()
    shutil.move(shard, folder / "blobs" / "one")
    shard.symlink_to("blobs/one")
    (tmp_path / "link").symlink_to(folder)
    nowag_ext.load(tmp_path / "link")


def test_other_quantisers_are_not_called(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "packed", tmp_path / "model")
    edited("config.json", lambda c: c["quantization_config"].update(load_in_4bit=True))(
        tmp_path / "model"
    )
    with pytest.raises(ValueError, match=r"quantization_config\.load_in_4bit of config\.json"):
        nowag_ext.load(tmp_path / "model")
    config(quantization_config=["nowag"])(tmp_path / "model")
    with pytest.raises(ValueError, match="is not a checkpoint compressed by nowag_ext"):
        nowag_ext.load(tmp_path / "model")
    with pytest.raises(ValueError, match="is already quantised"):
        load_dense_model(tmp_path / "model")


def test_a_damaged_tokenizer_is_not_none(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "packed", tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text('{"version": 3}')
    with pytest.raises(ValueError, match=r"the tokenizer of .* cannot be loaded"):
        load_tokenizer(tmp_path / "model")
    assert load_tokenizer(folders / "dense") is None


def test_an_adapter_beside_a_gguf_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", gguf_model())
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(ValueError, match="holds a PEFT adapter"):
        load_dense_model(tmp_path / "tiny.gguf")
