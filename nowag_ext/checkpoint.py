"""Models to and from disk: compressed and dense checkpoints, GGUF files, the model card."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nowag_ext.decoder import name_of
from nowag_ext.files import atomic_directory, check_vacant, remove, require_space
from nowag_ext.gguf_source import check_gguf, convert_gguf, explained, read_once
from nowag_ext.integrations.transformers import QUANT_METHOD, NowagConfig, replace_by_dense
from nowag_ext.methods import METHODS
from nowag_ext.offload import layers_on_disk
from nowag_ext.report import LAYERS_FILE, REPORT_FILE, distillation_text, settings_text
from nowag_ext.side_files import copy_side_files, licence_of, report_of, source_folder
from nowag_ext.stored import checked_config, shown

CARD_FILE = "README.md"

# Room for what is not tensors: configuration, tokenizer, report, model card, file headers.
_OTHER_BYTES = 32 << 20


def load(path_or_id: str | os.PathLike[str], **kwargs: Any) -> Any:
    """A compressed model from a directory or the hub, in eval mode.

    What the checkpoint holds is checked: nothing but safetensors files of its own folder is read,
    every tensor is there, and finite.

    Args:
        path_or_id: a directory that ``save_compressed`` or ``save_pretrained`` wrote, or a hub id.
        kwargs: for ``AutoModelForCausalLM.from_pretrained``: dtype, device_map, revision, ...
            Code that the checkpoint brings is run with trust_remote_code=True only; nobody is
            asked.

    Raises:
        ValueError: the checkpoint is not a nowag one, of a format_version this release does not
            read, truncated, incomplete, needs code of its own, or its tensors do not fit its
            configuration.
        OSError: nothing is found under that name.
    """
    _check_exists(path_or_id)
    config = checked_config(path_or_id, **kwargs)
    quantization = _quantization(config)
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        raise ValueError(
            f"{os.fspath(path_or_id)} is not a checkpoint compressed by nowag_ext: its config.json "
            f'has no quantization_config of quant_method "{QUANT_METHOD}". Load it with '
            "transformers."
        )
    for name in ("load_in_8bit", "load_in_4bit"):  # either makes another method of it
        if name in quantization:
            raise ValueError(f"quantization_config.{name} of config.json is not of nowag_ext.")
    NowagConfig.from_dict(quantization)
    loaded = _load_complete(path_or_id, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.nowag_source = source_folder(path_or_id, **kwargs)
    return loaded


def load_dense_model(
    path_or_id: str | os.PathLike[str],
    dtype: torch.dtype | str = "auto",
    *,
    offload_folder: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """A dense model, in eval mode, and its tokenizer: from a directory, the hub or a .gguf file.

    The tokenizer is None where there is none. Arguments and errors are those of ``dense_model``.
    """
    with read_once():
        model = dense_model(path_or_id, dtype, offload_folder=offload_folder, **kwargs)
        return model, load_tokenizer(path_or_id, **kwargs)


def dense_model(
    path_or_id: str | os.PathLike[str],
    dtype: torch.dtype | str = "auto",
    *,
    offload_folder: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Any:
    """A dense model, in eval mode, from a directory, the hub or a .gguf file.

    A GGUF file's weights are dequantised to ``dtype`` ("auto": float32), and the model is an
    ordinary one. Weights are read from safetensors and GGUF files alone. kwargs are those of
    ``load``.

    With an ``offload_folder`` the decoder layers stay on disk, and are read when they are needed
    (offload.py): from the checkpoint itself, or, where transformers converts its tensors and of a
    GGUF file, from that directory, which must outlive the model. On a ``device`` other than the CPU
    they are there while they are needed, and all else to stay.

    Raises:
        OSError: nothing is found under that name.
        ValueError: the checkpoint is already quantised, incomplete or damaged, or needs code of its
            own.
    """
    _check_exists(path_or_id)
    path = Path(path_or_id)
    if path.suffix == ".gguf":
        wanted = _named_dtype(dtype)
        converted = None
        if offload_folder is not None:
            converted = _convert_gguf(path, wanted, Path(offload_folder))
        if converted is None:
            return _placed(_load_gguf(path, wanted, kwargs), device)
        model = dense_model(
            converted, wanted, offload_folder=offload_folder, device=device, **kwargs
        )
        model.nowag_source = path
        return model
    quantization = _quantization(checked_config(path_or_id, **kwargs))
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ValueError(
            f"{os.fspath(path_or_id)} is already quantised ({shown(method)}): a dense model is "
            "needed."
        )
    if offload_folder is not None:
        shape = model_outline(path_or_id, trust_remote_code=kwargs.get("trust_remote_code", False))
        kwargs = {
            "device_map": layers_on_disk(shape, str(device)), "offload_folder": offload_folder,
            **kwargs,
        }  # fmt: skip
    model = _load_complete(path_or_id, dtype=dtype, **kwargs)
    model.nowag_source = source_folder(path_or_id, **kwargs)
    return model if offload_folder is not None else _placed(model, device)


def _placed(model: Any, device: torch.device | str) -> Any:
    """The model, moved to a device other than the CPU: a device_map may have placed it."""
    return model if torch.device(device).type == "cpu" else model.to(device)


def _named_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Of a GGUF file's weights; by its name, as transformers takes it too."""
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    wanted = torch.float32 if dtype == "auto" else named
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise ValueError(f"dtype must be auto or a floating-point dtype, not {dtype!r}.")
    return wanted


def model_outline(path_or_id: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """The dense model of a configuration on the meta device; ValueError for one unknown here."""
    with _explained(path_or_id), torch.device("meta"):
        trust = {"trust_remote_code": trust_remote_code}
        config = AutoConfig.from_pretrained(path_or_id, **trust)
        return AutoModelForCausalLM.from_config(config, **trust)


def is_compressed(path_or_id: str | os.PathLike[str]) -> bool:
    """Whether a directory or hub id is a checkpoint compressed by nowag_ext.

    Raises:
        OSError, ValueError: as ``load`` does, for what is no model or a damaged one.
    """
    if Path(path_or_id).is_file():
        return False
    quantization = _quantization(checked_config(path_or_id))
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def load_tokenizer(
    path_or_id: str | os.PathLike[str], *, trust_remote_code: bool = False, **_others: Any
) -> Any:
    """The tokenizer beside a model, or None where there is none.

    Raises:
        ValueError: there is one, but it is damaged or needs code of its own.
    """
    path = Path(path_or_id)
    with _explained(path_or_id, "the tokenizer of "):
        if path.suffix == ".gguf":
            check_gguf(path)
            # Alone in a folder: transformers would take other models' vocabularies for this one's.
            with TemporaryDirectory() as alone:
                (Path(alone) / path.name).symlink_to(path.resolve())
                return AutoTokenizer.from_pretrained(alone, gguf_file=path.name)
        try:
            return AutoTokenizer.from_pretrained(path_or_id, trust_remote_code=trust_remote_code)
        except Exception:
            if any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
                raise
            return None


def _quantization(config: Mapping[str, Any]) -> Any:
    """The quantization_config of a configuration, or of its language model's."""
    quantization = config.get("quantization_config")
    text = config.get("text_config")
    if quantization is None and isinstance(text, dict):
        quantization = text.get("quantization_config")
    return quantization


def _load_gguf(path: Path, dtype: torch.dtype | str, kwargs: dict[str, Any]) -> Any:
    check_gguf(path)
    try:
        # Where transformers can keep GGUF blocks packed, it must be told to unpack them.
        from transformers import GgufConfig

        kwargs = {"quantization_config": GgufConfig(dequantize=True), **kwargs}
    except ImportError:
        pass
    with explained(path), read_once():
        model = _load_complete(path.parent, gguf_file=path.name, dtype=dtype, **kwargs)
        model.nowag_source = path
    return model


def _convert_gguf(path: Path, dtype: torch.dtype, folder: Path) -> Path | None:
    """The directory of a GGUF file's model in safetensors, None if it can be read only whole."""
    directory = folder / "dequantised"
    directory.mkdir(parents=True, exist_ok=True)
    try:
        convert_gguf(path, directory, dtype)
    except ValueError as error:
        # If it is damaged, loading it says so.
        warnings.warn(f"{path} is read as a whole, into memory: {error}", stacklevel=2)
        remove(directory)
        return None
    return directory


def _load_complete(path_or_id: str | os.PathLike[str], **kwargs: Any) -> Any:
    """A model of transformers all of whose weights come from the checkpoint, none from chance.

    With its loading info, if that is asked for.
    """
    wanted = kwargs.pop("output_loading_info", False)
    safe = {} if "gguf_file" in kwargs else {"use_safetensors": True}
    with _explained(path_or_id):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path_or_id,
            output_loading_info=True,
            **{"trust_remote_code": False, **safe, **kwargs},
        )
    model, info = loaded
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    missing = sorted(set(info["missing_keys"]) - set(tied)) or sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"{os.fspath(path_or_id)} is incomplete: it has no tensor {missing[0]}{more}."
        )
    return loaded if wanted else model


@contextmanager
def _explained(path_or_id: str | os.PathLike[str], what: str = "") -> Iterator[None]:
    """One sentence with the model's name, whatever transformers stumbled over in it."""
    name = what + os.fspath(path_or_id)
    try:
        yield
    except (OSError, MemoryError, ImportError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{name} brings Python code of its own (auto_map), which is not run unless you say "
                "so: read it, then give trust_remote_code=True (--trust-remote-code)."
            ) from None
        if isinstance(error, ValueError):
            raise
        text = " ".join(str(error).split())
        raise ValueError(
            f"{name} cannot be loaded, damaged or unknown here: {type(error).__name__}: {text}"
        ) from error


def save_compressed(
    model: Any,
    tokenizer: Any,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    max_shard_size: int | str = "50GB",
) -> dict[str, str]:
    """Writes a compressed model, its tokenizer (or None), model card and report: all or nothing.

    ``nowag_ext.load`` and, after ``import nowag_ext``, ``AutoModelForCausalLM.from_pretrained``
    read the directory. What its source has beside its weights (processors, templates, code,
    licences) is copied as it is; the model card is ours, with what the source's says of its
    licence.

    Returns:
        The files of the source that belong there but were left out, by name, and why.

    Raises:
        ValueError: the model is not compressed.
        FileExistsError: the directory exists and is not empty, and ``overwrite`` is not set.
        OSError: the disk is full; nothing is left of the attempt.
    """
    if getattr(model, "quantization_method", None) != QUANT_METHOD:
        raise ValueError("the model is not compressed: call compress_model first.")
    return _save(model, tokenizer, path, overwrite, max_shard_size, _compressed_card(model))


def save_dense(
    model: Any,
    tokenizer: Any,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    max_shard_size: int | str = "50GB",
) -> dict[str, str]:
    """Writes a compressed model as an ordinary checkpoint, which loads without nowag_ext.

    The model becomes dense (``to_dense``). Returns and raises as ``save_compressed`` does.
    """
    check_vacant(path, overwrite=overwrite)
    return _save(to_dense(model), tokenizer, path, overwrite, max_shard_size, _dense_card(model))


def to_dense(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Replaces, in place, packed modules by ``nn.Linear`` with the dequantised weights.

    Args:
        dtype: of the whole model; None: the packed ones become that of its other weights.

    Returns:
        The same model, an ordinary one of transformers.
    """
    if getattr(model, "quantization_method", None) != QUANT_METHOD:
        raise ValueError("the model is not compressed: there is nothing to make dense.")
    replace_by_dense(model, dtype)
    model.hf_quantizer.remove_quantization_config(model)
    return model


def _save(
    model: Any,
    tokenizer: Any,
    path: str | os.PathLike[str],
    overwrite: bool,
    max_shard_size: int | str,
    card: str,
) -> dict[str, str]:
    check_vacant(path, overwrite=overwrite)
    with atomic_directory(path, overwrite=overwrite) as directory:
        require_space(directory, model_bytes(model))
        with warnings.catch_warnings():
            # Of layers on disk a shard is in memory while it is written: by now little is left.
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
            model.save_pretrained(directory, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        report = report_of(model)
        if report is not None:
            (directory / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
            (directory / LAYERS_FILE).write_text(report.to_csv(), encoding="utf-8")
        (directory / CARD_FILE).write_text(card, encoding="utf-8")
        return copy_side_files(model, directory)


def model_bytes(model: Any) -> int:
    """Bytes that are needed to write a model; tensors that share memory count once."""
    sizes = {
        name if tensor.is_meta else tensor.data_ptr(): tensor.nbytes
        for name, tensor in model.state_dict().items()
    }
    return sum(sizes.values()) + _OTHER_BYTES


def _check_exists(path_or_id: str | os.PathLike[str]) -> None:
    """Raises FileNotFoundError for what can only be a local path and is not there."""
    name = os.fspath(path_or_id)
    local = isinstance(path_or_id, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1
    if (local or name.endswith(".gguf")) and not Path(name).exists():
        raise FileNotFoundError(f"there is no model at {name}.")


_CARD = """---
library_name: transformers
{licence}tags:
- nowag
---
{head}
{about}
{figures}"""

_COMPRESSED_HEAD = """```python
import nowag_ext  # without this line transformers would start the compressed layers at random

model = nowag_ext.load("this directory, or its hub id")
```

`import nowag_ext` (`pip install nowag-ext`) registers the format, and
`AutoModelForCausalLM.from_pretrained` reads this checkpoint from then on as well.
"""


def _compressed_card(model: Any) -> str:
    config = model.config.quantization_config
    ways: dict[str, int] = {}
    head_name, head = name_of(model, model.get_output_embeddings()), ""
    for group in config.groups:
        if group["modules"] == [head_name]:
            tied = " and the embedding that is tied to it" if "embedding" in group else ""
            form = settings_text({name: group[name] for name in ("d", "code_bits")})
            head = f" Packed too: its {head_name}{tied} ({form})."
            continue
        way = f"{METHODS[group['method']].label} ({settings_text(group.get('settings', {}))})"
        ways[way] = ways.get(way, 0) + len(group["modules"])
    listed = "; ".join(
        way if len(ways) == 1 else f"{number} by {way}" for way, number in ways.items()
    )
    about = (
        f"The linear layers of this {type(model).__name__}'s decoder were compressed in one "
        f"shot by NoWag: {listed}.{head}\n"
    )
    return _card(model, _COMPRESSED_HEAD, about)


def _dense_card(model: Any) -> str:
    about = (
        f"An ordinary {type(model).__name__} whose weights went through NoWag's compression and "
        "back: for evaluation and tools that know dense models only.\n"
    )
    return _card(model, "", about)


def _card(model: Any, head: str, about: str) -> str:
    said = licence_of(model).items()
    licence = "".join(f"{name}: {json.dumps(value)}\n" for name, value in said)
    return _CARD.format(licence=licence, head=head, about=about, figures=_figures(model))


def _figures(model: Any) -> str:
    report = report_of(model)
    if report is None:
        return ""
    rows = {
        "bits per compressed weight, all in": f"{report.bits_per_weight:.3f}",
        **(
            {f"with {report.head.name}": f"{report.bits_per_weight_with_head:.3f}"}
            if report.head
            else {}
        ),
        "mean relative objective": f"{report.mean_relative_objective:.5f}",
        "compressed share of the decoder's weights": f"{report.coverage:.1%}",
        "compressed layers": str(len(report.layers)),
        **({"distilled": distillation_text(report.distillation)} if report.distillation else {}),
        "written by": ", ".join(f"{name} {value}" for name, value in report.versions.items()),
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(
        ["", "| | |", "| --- | --- |", *lines, "", f"Every layer: `{LAYERS_FILE}`.", ""]
    )
