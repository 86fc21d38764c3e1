"""What goes with a model's weights: files that loaders, tokenizers and licences need.

They are told by their names. Weights of any form, what a training run leaves, and what is written
anew (config.json, the model card) are not among them.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.repocard import metadata_load

from nowag_ext.report import LAYERS_FILE, REPORT_FILE, ModelReport
from nowag_ext.stored import is_inside

# All in lower case.
_LEGAL = (
    "*licen[cs]e*", "copying*", "copyright*", "*notice*", "authors*", "patents*", "*use_policy*",
    "*use-policy*", "acceptable_use*", "terms*", "*_terms*", "legal*", "*agreement*",
)  # fmt: skip
# Beside a .gguf file, whose folder may be anybody's.
_LOADERS = (
    "*tokenizer*", "vocab*", "merges*", "*.tiktoken", "tekken.json", "special_tokens_map.json",
    "added_tokens.json", "*chat_template*", "*processor*.json", "generation_config.json",
)  # fmt: skip
# In a model's own folder.
_OF_A_MODEL = (
    *_LOADERS, "*.json", "*.jinja", "*.model", "*.model.v*", "*.spm", "*.bpe", "*.vocab", "*.py",
    "dict.txt", "labels*.txt", "requirements.txt",
)  # fmt: skip
# Of another form of the model, or of a training run.
_NOT = (
    "*.index.json", "*.index.*.json", "adapter_*", "*quant*_config.json",
    "quantize_config.json", "trainer_state.json", "*_results.json", "training_args*", "optimizer*",
    "scheduler*", "*.safetensors", "*.bin", "*.bin.*", "*.pt", "*.pth", "*.ckpt", "*.gguf",
    "*.ggml", "*.onnx", "*.onnx_data", "*.h5", "*.msgpack", "*.ot", "*.tflite", "*.npz", "*.npy",
    "*.pkl", "*.pickle", "*.zip", "*.tar*", "*.lock", "*.pyc",
)  # fmt: skip
_OURS = ("config.json", "readme.md", REPORT_FILE, LAYERS_FILE)
# Folders of a model's that its loaders read.
_FOLDERS = (
    "additional_chat_templates", "custom_generate", "[0-9]_*", "tokenizer", "processor",
    "licen[cs]e*", "legal",
)  # fmt: skip
_LARGEST = 256 << 20  # bytes; the largest tokenizers have some 40 MB
_WHERE = ("cache_dir", "revision", "token", "local_files_only", "proxies")


def source_folder(path_or_id: str | os.PathLike[str], **where: Any) -> Path | None:
    """The folder of a directory, a .gguf file (the file itself) or a hub id, or None.

    A hub id's side files are fetched into the cache, where that is possible; ``where`` are
    arguments of ``from_pretrained``.
    """
    path = Path(path_or_id)
    if path.exists():
        return path / (where.get("subfolder") or "") if path.is_dir() else path
    where = {name: where[name] for name in _WHERE if where.get(name) is not None}
    folders = [f"{folder}/*" for folder in _FOLDERS]
    with suppress(Exception):  # without them the model is as good
        return Path(
            snapshot_download(
                os.fspath(path_or_id),
                allow_patterns=[*_LEGAL, *map(str.upper, _LEGAL), *_OF_A_MODEL, "*.md", *folders],
                ignore_patterns=list(_NOT),
                **where,
            )
        )
    return None


def copy_side_files(model: Any, directory: Path) -> dict[str, str]:
    """Copies the side files of the model's source into ``directory``; what is there stays.

    Returns:
        The files that would belong there but were left out, by name, and why.

    Raises:
        OSError: the disk is full.
    """
    source = _source(model)
    left_out: dict[str, str] = {}
    for file, name in _candidates(source, left_out):
        assert source is not None
        target = directory / name
        if not target.exists():
            try:
                _copy(file, target, source if source.is_dir() else source.parent)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                left_out[name] = str(error.strerror or error)
    return left_out


def report_of(model: Any) -> ModelReport | None:
    """What is known of the model's compression: now, or from beside what it was loaded from."""
    known: ModelReport | None = getattr(model, "nowag_report", None)
    source = _source(model)
    if known is None and source is not None and is_inside(source / REPORT_FILE, source):
        return ModelReport.read(source / REPORT_FILE)
    return known


def licence_of(model: Any) -> dict[str, str]:
    """What the card of the model's source says of its licence: license, license_name, ..."""
    source = _source(model)
    card = source / "README.md" if source is not None and source.is_dir() else None
    if card is None or not card.is_file() or not is_inside(card, card.parent):
        return {}
    with suppress(Exception):  # whatever stands there
        said = metadata_load(card) or {}
        return {n: v for n, v in said.items() if n.startswith("license") and isinstance(v, str)}
    return {}


def _source(model: Any) -> Path | None:
    """The folder or .gguf file that a model was loaded from, if it can still be told."""
    known = getattr(model, "nowag_source", None)
    if known is not None:
        return known if known.exists() else None
    name = getattr(model.config, "name_or_path", None) or ""
    if name and Path(name).is_dir():
        return Path(name)
    with suppress(Exception):  # no name of a repository
        cached = try_to_load_from_cache(name, "config.json")
        return Path(cached).parent if isinstance(cached, str) else None
    return None


def _candidates(source: Path | None, left_out: dict[str, str]) -> Iterator[tuple[Path, str]]:
    """The files that belong to a model by their names, and these relative to its folder.

    Folders that cannot be looked into are added to ``left_out``.
    """
    if source is None:
        return
    if source.is_file():
        yield from _named(source.parent, (*_LEGAL, *_LOADERS), "", left_out)
        return
    yield from _named(source, (*_LEGAL, *_OF_A_MODEL), "", left_out)
    for folder in sorted(source.iterdir()):
        if _matches(folder.name, _FOLDERS) and folder.is_dir() and is_inside(folder, source):
            legal = _matches(folder.name, _LEGAL)
            patterns = ("*",) if legal else (*_LEGAL, *_OF_A_MODEL)
            yield from _named(folder, patterns, f"{folder.name}/", left_out)


def _named(
    folder: Path, patterns: Sequence[str], prefix: str, left_out: dict[str, str]
) -> Iterator[tuple[Path, str]]:
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        left_out[prefix or os.fspath(folder)] = str(error.strerror or error)
        return
    for file in files:
        ours = not prefix and file.name.lower() in _OURS
        wanted = _matches(file.name, patterns) and not _matches(file.name, _NOT)
        if wanted and not ours and not file.name.startswith("."):
            yield file, prefix + file.name


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)


def _copy(file: Path, target: Path, root: Path) -> None:
    """Copies a file's content; raises OSError, with the reason, for what shall not be copied."""
    if not is_inside(file, root):
        raise OSError("it is a link that leads out of the model's folder")
    if file.is_dir():
        return
    if not file.is_file():
        raise OSError("it is no regular file")
    if file.stat().st_size > _LARGEST:
        raise OSError(f"it has more than {_LARGEST >> 20} MB")
    target.parent.mkdir(exist_ok=True)
    try:
        shutil.copyfile(file, target)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
