"""GGUF files read a layer at a time: the same weights as from the whole, and nothing left over."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_same_bits
from test_checkpoint import gguf_model, write_gguf

import nowag_ext
from nowag_ext import checkpoint, gguf_source
from nowag_ext.checkpoint import load_dense_model
from nowag_ext.decoder import decoder_linears
from nowag_ext.files import DiskFullError
from nowag_ext.offload import weight_of

TOKENS = torch.randint(3, 200, (4, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file, gguf_model())
    return file


# A layer at a time, the rest one by one; two layers that have room together; all at once.
@pytest.mark.parametrize(
    ("room", "parts"), [(1, [1, 1, 9, 9]), (50000, [10, 10]), (gguf_source._PART_WEIGHTS, [20])]
)
@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, "bfloat16"])
def test_weights_are_those_of_the_whole(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: Any,
    room: int,
    parts: list[int],
) -> None:
    read: list[list[str]] = []
    write = gguf_source._write_part

    def look(path: Path, reader: Any, tensors: Any, part: Path) -> None:
        read.append([tensor.name for tensor in tensors])
        write(path, reader, tensors, part)

    monkeypatch.setattr(gguf_source, "_write_part", look)
    monkeypatch.setattr(gguf_source, "_PART_WEIGHTS", room)
    whole, _ = load_dense_model(source, dtype)
    model, tokenizer = load_dense_model(source, dtype, offload_folder=tmp_path)
    assert sorted(map(len, read)) == parts
    assert not any("layers" in n for n, one in model.named_parameters() if not one.is_meta)
    for name, linear in decoder_linears(whole).items():
        assert_same_bits(weight_of(model.get_submodule(name)), linear.weight, name)
    assert_same_bits(model.lm_head.weight, whole.lm_head.weight)
    assert_same_bits(model.model.norm.weight, whole.model.norm.weight)
    assert model.dtype == whole.dtype == (torch.float32 if dtype == "auto" else torch.bfloat16)
    assert tokenizer is not None
    assert model.nowag_source == source
    assert not list(tmp_path.rglob("*.gguf"))


@pytest.mark.parametrize("dtype", ["nonsense", "int8", torch.int64, "nn"])
def test_dtypes_that_are_none(source: Path, tmp_path: Path, dtype: Any) -> None:
    for folder in (None, tmp_path):
        with pytest.raises(ValueError, match="dtype must be auto or a floating-point dtype, not"):
            load_dense_model(source, dtype, offload_folder=folder)
    assert list(tmp_path.iterdir()) == []


def test_is_compressed_as_the_whole(source: Path, tmp_path: Path) -> None:
    nowag_ext.compress(source, TOKENS, "prune", output=tmp_path / "out", pattern="2:4")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    whole, _ = load_dense_model(source)
    nowag_ext.compress(whole, TOKENS, "prune", pattern="2:4")
    stored = nowag_ext.load(tmp_path / "out").state_dict()
    for name, tensor in whole.state_dict().items():
        assert_same_bits(stored[name], tensor, name)


def test_room_is_looked_for(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    with pytest.raises(DiskFullError, match="MB are needed"):
        load_dense_model(source, offload_folder=tmp_path)


def test_what_can_be_read_only_whole(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: Any) -> None:
        raise ValueError("no such model")

    monkeypatch.setattr(checkpoint, "convert_gguf", refuse)
    with pytest.warns(UserWarning, match="is read as a whole, into memory: no such model"):
        model, _ = load_dense_model(source, offload_folder=tmp_path)
    assert not any(one.is_meta for one in model.parameters())
    assert list(tmp_path.iterdir()) == []


def test_damage_is_said(source: Path, tmp_path: Path) -> None:
    content = source.read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(content[: len(content) // 2])
    with (
        pytest.warns(UserWarning, match="as a whole"),
        pytest.raises(ValueError, match=r"tiny\.gguf is damaged"),
    ):
        load_dense_model(tmp_path / "tiny.gguf", offload_folder=tmp_path / "folder")


def test_headers_are_parsed_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = pytest.importorskip("gguf")
    names = gguf.get_tensor_name_map
    parsed: list[str] = []
    begin = gguf.GGUFReader.__init__

    def note(self: Any, path: Any, *rest: Any) -> None:
        parsed.append(str(path))
        begin(self, path, *rest)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", note)
    file = tmp_path / "tiny.gguf"
    shutil.copy(source, file)
    model, _ = load_dense_model(file)
    assert parsed == [str(file)]
    load_dense_model(file)
    assert parsed == [str(file)] * 2  # not kept for longer than it takes to load
    assert (gguf.GGUFReader.__init__, gguf.get_tensor_name_map) == (note, names)
    # Of a file that changes nothing is taken from before.
    with gguf_source.read_once():
        load_dense_model(file)
        other = gguf_model()
        with torch.no_grad():
            other.model.norm.weight.fill_(2.0)
        file.unlink()
        write_gguf(file, other)
        assert (load_dense_model(file)[0].model.norm.weight == 2).all()
    assert len(parsed) == 4
    assert (model.model.norm.weight == 1).all()


def test_headers_are_parsed_once_whoever_ends_first() -> None:
    """Two threads that load at the same time, and end in the order that they began in."""
    gguf = pytest.importorskip("gguf")
    begin = gguf.GGUFReader.__init__
    one, two = gguf_source.read_once(), gguf_source.read_once()
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    assert gguf.GGUFReader.__init__ is not begin
    two.__exit__(None, None, None)
    assert gguf.GGUFReader.__init__ is begin
