"""GGUF files read a part at a time: their weights dequantised to a checkpoint of safetensors files.

transformers dequantises all that a GGUF file holds at once. So it is given some layers after
others, as small GGUF files of their own.
"""

from __future__ import annotations

import json
import os
import re
import struct
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from nowag_ext.decoder import decoder_layers
from nowag_ext.files import require_space
from nowag_ext.stored import check_no_adapter

_MAGIC = b"GGUF"

# Weights that are dequantised together, or those of one layer where it has more: each part costs
# transformers a second or so.
_PART_WEIGHTS = 1 << 26


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """One sentence with the file's name, whatever the parser stumbled over."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{path} is damaged, or of a model unknown here: {error}") from error


# How many threads have ``read_once`` open: what it changes is the whole process's.
_reading = 0
_reading_lock = threading.Lock()
_reading_once = ExitStack()


@contextmanager
def read_once() -> Iterator[None]:
    """While this is open, headers of GGUF files are parsed once, and names of tensors listed once.

    transformers parses a header, whose vocabulary takes seconds, for the configuration, for the
    tokenizer and for the weights, and lists all names that there can be for each module of a model.
    """
    global _reading
    with _reading_lock:
        if _reading == 0:
            _change_gguf(_reading_once)
        _reading += 1
    try:
        yield
    finally:
        with _reading_lock:
            _reading -= 1
            if _reading == 0:
                _reading_once.close()


def _change_gguf(until: ExitStack) -> None:
    try:
        import gguf
    except ImportError:  # which transformers says better where it needs it
        return
    begin = gguf.GGUFReader.__init__

    @lru_cache(2)  # a file, and the part of it that is being read
    def parsed(path: str, _size: int, _changed: int, *rest: Any) -> dict[str, Any]:
        reader = gguf.GGUFReader.__new__(gguf.GGUFReader)
        begin(reader, path, *rest)
        return vars(reader)

    def begin_once(self: Any, path: str | os.PathLike[str], *rest: Any) -> None:
        found = Path(path).resolve()
        state = found.stat()
        vars(self).update(parsed(os.fspath(found), state.st_size, state.st_mtime_ns, *rest))

    names = lru_cache(2)(gguf.get_tensor_name_map)
    until.enter_context(mock.patch.object(gguf.GGUFReader, "__init__", begin_once))
    until.enter_context(mock.patch.object(gguf, "get_tensor_name_map", names))


def check_gguf(path: Path) -> None:
    """Raises ValueError for what is no GGUF file, or has an adapter beside it."""
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError(f"{path} is not a GGUF file: it does not start with the letters GGUF.")
    check_no_adapter(path.parent)


def gguf_config(path: Path) -> Any:
    """The configuration of a GGUF file's model; none of its tensors is read.

    Raises:
        ValueError: it is damaged, or of a model that transformers does not read.
    """
    check_gguf(path)
    with explained(path):
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)


def convert_gguf(path: Path, directory: Path, dtype: torch.dtype) -> None:
    """Writes a GGUF file's model as a checkpoint of safetensors files, some layers at a time.

    Args:
        directory: exists; takes config.json, the weights and their index.
        dtype: of the weights.

    Raises:
        ValueError: the file is damaged, or transformers reads no such model from a part of a file.
        DiskFullError: there is no room for the weights.
    """
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = gguf_config(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    require_space(directory, sum(parameter.nbytes for parameter in model.parameters()))
    places: dict[str, str] = {}
    part = directory / "part.gguf"
    with explained(path), _quiet():
        reader = GGUFReader(os.fspath(path))
        for number, (layers, tensors) in enumerate(_parts(reader.tensors)):
            _write_part(path, reader, tensors, part)
            with _of_layers(model, layers):
                found = load_gguf_checkpoint(
                    os.fspath(part), return_tensors=True, model_to_load=model
                )["tensors"]
            file = f"model-{number:05}.safetensors"
            converted = {name: one.to(dtype).contiguous() for name, one in found.items()}
            save_file(converted, directory / file, {"format": "pt"})
            places |= dict.fromkeys(converted, file)
    part.unlink()
    config.dtype = dtype
    config.save_pretrained(directory)
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _parts(tensors: Sequence[Any]) -> list[tuple[set[str], list[Any]]]:
    """Tensors that are read together, and the numbers of the layers that they are of."""
    layers: dict[str, list[Any]] = {}
    for tensor in tensors:
        layer = re.match(r"blk\.(\d+)\.", tensor.name)
        layers.setdefault(layer[1] if layer else tensor.name, []).append(tensor)
    parts: list[tuple[set[str], list[Any]]] = []
    room = 0
    for number, of_layer in layers.items():
        size = sum(int(tensor.n_elements) for tensor in of_layer)
        if size > room:
            parts.append((set(), []))
            room = _PART_WEIGHTS
        parts[-1][0].add(number)
        parts[-1][1].extend(of_layer)
        room -= size
    return parts


@contextmanager
def _of_layers(model: Any, numbers: Collection[str]) -> Iterator[None]:
    """The model without its layers but those of these numbers.

    For each module of a model transformers makes a list of all names that there can be.
    """
    lists = {name.rpartition(".")[0] for name in decoder_layers(model)}
    whole = {name: model.get_submodule(name) for name in lists}
    for name, layers in whole.items():
        some = {n: layer for n, layer in layers.named_children() if n in numbers}
        model.set_submodule(name, nn.ModuleDict(some))
    try:
        yield
    finally:
        for name, layers in whole.items():
            model.set_submodule(name, layers)


def _write_part(path: Path, reader: Any, tensors: Sequence[Any], part: Path) -> None:
    """A GGUF file of some of another's tensors, and all that it says but for its vocabulary."""
    fields = [
        field
        for name, field in reader.fields.items()
        if not name.startswith(("GGUF.", "tokenizer."))
    ]
    version = int(reader.fields["GGUF.version"].parts[-1][0])
    head = [_MAGIC, struct.pack("<IQQ", version, len(tensors), len(fields))]
    head += [_bytes_of(field) for field in fields]
    offset = 0
    for tensor in tensors:
        # The last 8 bytes of what is said of a tensor are where it begins.
        head += [_bytes_of(tensor.field)[:-8], struct.pack("<Q", offset)]
        offset += _padded(tensor.n_bytes, reader.alignment)
    begin = b"".join(head)
    with path.open("rb") as source, part.open("wb") as file:
        file.write(begin.ljust(_padded(len(begin), reader.alignment), b"\0"))
        for tensor in tensors:
            # Read, not mapped: what is read once need not stay in memory.
            source.seek(tensor.data_offset)
            data = source.read(tensor.n_bytes)
            file.write(data.ljust(_padded(len(data), reader.alignment), b"\0"))


def _bytes_of(field: Any) -> bytes:
    return b"".join(part.tobytes() for part in field.parts)


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


@contextmanager
def _quiet() -> Iterator[None]:
    """No bar and no advice from transformers for each part."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
