"""What commands read: models of any kind, windows of text for calibration."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from nowag_ext.checkpoint import (
    dense_model,
    is_compressed,
    load,
    load_tokenizer,
    model_outline,
)
from nowag_ext.evaluate import split_windows
from nowag_ext.gguf_source import read_once
from nowag_ext.stored import checked_config

DTYPES: dict[str, torch.dtype | str] = {
    "auto": "auto",
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def named_dtype(name: str) -> torch.dtype | str:
    """The dtype of a name; "auto" stands for the checkpoint's own."""
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {name!r}.")
    return DTYPES[name]


def open_tokenizer(source: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model, compressed or dense, whose weights are not read.

    Raises:
        OSError: there is no such model.
        ValueError: it has no tokenizer, or a damaged one, or its configuration is none that can be
            loaded, or it brings code that is not trusted.
    """
    check_found(source)
    if Path(source).suffix != ".gguf":
        checked_config(source)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        # Where the model is of no use either, that is the first thing to know.
        model_outline(source, trust_remote_code=trust_remote_code)
        raise ValueError(f"there is no tokenizer beside the model {os.fspath(source)}.")
    return tokenizer


def open_dense_model(
    source: str | os.PathLike[str],
    dtype: str = "auto",
    *,
    tokenizer: Any = None,
    offload_folder: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A dense model and its tokenizer from a directory, a hub id or a .gguf file.

    With an ``offload_folder`` decoder layers stay on disk (``dense_model``). A tokenizer that is
    given (``open_tokenizer``) is not read again.

    Raises:
        OSError: there is no such model.
        ValueError: it is already compressed, has no tokenizer, or brings code that is not trusted.
    """
    with read_once():
        if tokenizer is None:
            tokenizer = open_tokenizer(source, trust_remote_code=trust_remote_code)
        model = dense_model(
            source, dtype=named_dtype(dtype), offload_folder=offload_folder, device=device,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    return model, tokenizer


def open_model(
    source: str | os.PathLike[str],
    dtype: str = "auto",
    *,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A model, compressed or dense, and its tokenizer, which may be given (``open_tokenizer``).

    Raises:
        OSError: there is no such model.
        ValueError: it has no tokenizer, is damaged, or brings code that is not trusted.
    """
    if tokenizer is None:
        tokenizer = open_tokenizer(source, trust_remote_code=trust_remote_code)
    if not is_compressed(source):
        return open_dense_model(
            source, dtype, tokenizer=tokenizer, trust_remote_code=trust_remote_code
        )
    model = load(source, dtype=named_dtype(dtype), trust_remote_code=trust_remote_code)
    return model, tokenizer


def calibration_batches(
    tokens: Tensor, *, samples: int, length: int, seed: int | None = None
) -> list[Tensor]:
    """Non-overlapping windows of a text, one a batch, int64 [1, length] each.

    Args:
        tokens: int64 [n], the whole text.
        samples: at most this many windows.
        length: tokens a window.
        seed: which windows, at random; None takes the first ones.

    Raises:
        ValueError: the text is shorter than one window, or a number is out of range.
    """
    if samples < 1:
        raise ValueError(f"the number of calibration samples must be at least 1, not {samples}.")
    windows = split_windows(tokens, length)
    chosen: Sequence[int] = range(min(samples, len(windows)))
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(windows), generator=generator)[:samples].tolist()
    return [windows[index][None] for index in chosen]


def mixed_batches(
    texts: Sequence[Tensor], *, samples: int, length: int, seed: int | None = None
) -> list[Tensor]:
    """``calibration_batches`` of several texts in turn, until there are enough or all are read."""
    batches = [
        calibration_batches(text, samples=samples, length=length, seed=seed) for text in texts
    ]
    mixed = [batch for turn in zip_longest(*batches) for batch in turn if batch is not None]
    return mixed[:samples]


def windows_of_each(available: Sequence[int], samples: int) -> list[int]:
    """How many of so many windows of each text ``mixed_batches`` takes."""
    taken = [0] * len(available)
    for turn in range(max(available, default=0)):
        if sum(taken) >= samples:
            break
        for text, count in enumerate(available):
            if turn < count and sum(taken) < samples:
                taken[text] += 1
    return taken


def check_found(source: str | os.PathLike[str]) -> None:
    """Raises OSError for a name that is neither a local path nor a model of the hub."""
    if Path(source).exists():
        return
    try:
        PretrainedConfig.get_config_dict(source)
    except OSError:
        raise OSError(
            f"there is no model {os.fspath(source)}: no directory or .gguf file of this name "
            "exists, and the hub (or its cache here) gave no model of this name."
        ) from None
