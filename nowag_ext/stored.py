"""What a checkpoint's files say of themselves, checked before a library acts on it.

A checkpoint may be damaged, or made to do harm. Nothing here loads a tensor, runs what a folder
brings, or follows a name out of it.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

CONFIG = "config.json"
_ADAPTER = "adapter_config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# What transformers reads in a folder besides (model and tokenizer).
_READ = (
    "*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
# What of from_pretrained's arguments says where files are.
_WHERE = (
    "cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder",
)  # fmt: skip
# A configuration of transformers has some four levels; what copies it recurses.
_MOST_NESTED = 32
# Numbers of layers: transformers builds as many, whatever the files hold.
_LAYERS = {"num_hidden_layers", "num_layers", "n_layers", "n_layer"}
# Most of anything else that is counted ("num_labels"), which becomes a list or modules.
_MOST_THINGS = 1 << 20

_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxother, _repr.maxlong = 2, 80, 80, 40


def shown(value: Any) -> str:
    """A value out of a file for a sentence about it: short, however large or nested it is."""
    return _repr.repr(value)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises ValueError with the file's name for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is truncated or damaged: {error}.") from error
    except RecursionError:
        raise ValueError(f"{path} is damaged: it is nested too deeply.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not {shown(content)}.")
    return content


def checked_config(path_or_id: str | os.PathLike[str], **where: Any) -> dict[str, Any]:
    """config.json of a model, once what transformers does with its folder can do no harm.

    Args:
        path_or_id: a directory or a hub id.
        where: arguments of ``from_pretrained``; those that say where files are count.

    Raises:
        FileNotFoundError: the directory has no config.json.
        OSError: the hub, or its cache, has no such model.
        ValueError: JSON that is damaged or no configuration, an index or a link that leads out of
            the folder, or an adapter.
    """
    where = {name: where[name] for name in _WHERE if where.get(name) is not None}
    if Path(path_or_id).is_dir():
        root = Path(path_or_id)
        folder = root / where.get("subfolder", "")
    else:
        found = cached_file(os.fspath(path_or_id), CONFIG, **where)
        folder = root = Path(str(found)).parent
        # In the cache from now on, if the model has one.
        cached_file(
            os.fspath(path_or_id), _INDEX, _raise_exceptions_for_missing_entries=False, **where
        )
    check_no_adapter(folder)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is no model's directory.")
    if not any(folder.glob("*.safetensors")) and any(folder.glob("pytorch_model*.bin")):
        raise ValueError(
            f"{folder} has no safetensors files but pickles, which may run code and are not read: "
            "if you trust it, let transformers load it and save it again (save_pretrained)."
        )
    for pattern in _READ:
        for file in folder.glob(pattern):
            check_inside(file, root)
    for file in folder.glob("*.safetensors.index*.json"):
        _check_index(read_json(file), file)
    config = read_json(folder / CONFIG)
    _check_config(config, folder / CONFIG, _stored_tensors(folder))
    return config


def check_no_adapter(folder: Path) -> None:
    """Raises ValueError where transformers would load an adapter, on a model that it names."""
    if (folder / _ADAPTER).exists():
        raise ValueError(
            f"{folder} holds a PEFT adapter ({_ADAPTER}): merge it into its model first "
            "(merge_and_unload)."
        )


def check_inside(file: Path, root: Path) -> None:
    """Raises ValueError for a link that leads out of the model's folder.

    In the hub's cache files are links to the blobs of their repository.
    """
    if not is_inside(file, root):
        raise ValueError(f"{file} is a link that leads out of the model's folder: copy the file.")


def is_inside(file: Path, root: Path) -> bool:
    """Whether a file of a model's folder, links followed, is in it or its repository's blobs."""
    try:
        real, root = file.resolve(), root.resolve()
    except (OSError, RuntimeError):  # a link that leads to itself
        return False
    snapshot = root.parent.name == "snapshots"
    return real.is_relative_to(root) or (snapshot and real.parent == root.parent.parent / "blobs")


def check_files(files: Iterable[str], path_or_id: str) -> None:
    """Raises for a file of weights that is no safetensors file in the model's own folder.

    Args:
        files: as transformers has put them together from an index.
        path_or_id: what it was given, a directory or a hub id.

    Raises:
        ValueError: a name or link that leads out of the folder, or a file of another kind.
        FileNotFoundError: there is no such file.
    """
    for name in files:
        file, root = Path(os.path.abspath(name)), Path(os.path.abspath(path_or_id))
        within = name == path_or_id or file.is_relative_to(root)
        if not root.exists():
            marker = f"{repo_folder_name(repo_id=path_or_id, repo_type='model')}/snapshots/"
            head, found, tail = name.partition(marker)
            within = bool(found) and ".." not in PurePosixPath(tail).parts
            root = Path(head + found, *PurePosixPath(tail).parts[:1])
        if not within:
            raise ValueError(f"{name} is not in the model's folder: an index may not name it.")
        if file.suffix != ".safetensors":
            raise ValueError(f"{name} is no safetensors file: weights are read from those alone.")
        if name != path_or_id:
            check_inside(file, root)
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {name}, which the checkpoint's index names.")


def _check_index(index: Mapping[str, Any], file: Path) -> None:
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names or not isinstance(index.get("metadata"), dict):
        raise ValueError(f"{file} is damaged: an index has a weight_map and metadata.")
    for tensor, name in names.items():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise ValueError(
                f"{file} puts {shown(tensor)} into {shown(name)}: weights are read from "
                "safetensors files alone."
            )
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{file} names {shown(name)}, which is not in the model's folder.")


def _stored_tensors(folder: Path) -> int | None:
    """How many tensors the weights have; None where they have other names or are not here."""
    if (folder / _WEIGHTS).is_file():
        try:
            with safe_open(folder / _WEIGHTS, framework="pt") as opened:
                return len(opened.keys())
        except SafetensorError as error:
            raise ValueError(f"{folder / _WEIGHTS} is truncated or damaged: {error}.") from None
    index = folder / _INDEX
    return len(read_json(index)["weight_map"]) if index.is_file() else None


def _check_config(config: Mapping[str, Any], file: Path, tensors: int | None) -> None:
    """Raises ValueError for what makes transformers fetch code, or build without end."""
    for name, value in _fields(config, file):
        if name.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise ValueError(f"{name} in {file} asks for code from the hub: {shown(value)}.")
        if not isinstance(value, int):
            continue
        if name in _LAYERS and tensors is not None and value > tensors:
            raise ValueError(
                f"{name} in {file} is {shown(value)}, but the weights have {tensors} tensors."
            )
        if name.startswith("num_") and value > _MOST_THINGS:
            raise ValueError(f"{name} in {file} is {shown(value)}, more than any model has.")


def _fields(config: Mapping[str, Any], file: Path) -> Iterator[tuple[str, Any]]:
    """Every value that is no list or object, under the name of the field it belongs to."""
    rest: list[tuple[str, Any, int]] = [("", config, 0)]
    while rest:
        name, value, depth = rest.pop()
        if depth > _MOST_NESTED:
            raise ValueError(f"{file} is damaged: it is nested too deeply.")
        if isinstance(value, dict):
            within = name if name.endswith("_implementation") else None
            rest += [(within or key, one, depth + 1) for key, one in value.items()]
        elif isinstance(value, list):
            rest += [(name, one, depth + 1) for one in value]
        else:
            yield name, value
