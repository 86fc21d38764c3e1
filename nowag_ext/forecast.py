"""What a run will write, from the model's configuration alone: before weights are read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from nowag_ext.decoder import decoder_linears, matches
from nowag_ext.methods import METHODS, LayerSettings
from nowag_ext.stored import checked_config


def skeleton(source: str | os.PathLike[str], dtype: torch.dtype | str) -> Any:
    """The model without its weights, on the meta device.

    None where only loading it tells: GGUF files, and models that bring their own code.

    Raises:
        OSError: there is no such model.
        ValueError: it is quantised, or transformers knows none of its kind.
    """
    if Path(source).is_file():
        return None
    config = checked_config(source)
    if config.get("quantization_config") is not None:
        raise ValueError(f"{os.fspath(source)} is already quantised: a dense model is needed.")
    if "auto_map" in config or "model_type" not in config:
        return None
    built = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if dtype == "auto":
        # Where the configuration names none the weights do: no more than they may take is told.
        dtype = getattr(built, "dtype", None) or torch.float16
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(built, dtype=dtype)


def written_bytes(
    model: Any,
    settings: LayerSettings,
    ignore: Sequence[str],
    *,
    shared_codebook: bool,
    dense: bool,
) -> int:
    """Bytes of the tensors on disk when a compression ends: finished layers and the checkpoint."""
    own = {id(parameter): parameter.nbytes for parameter in model.parameters()}
    total = sum(own.values())
    layers = 0
    for name, linear in decoder_linears(model).items():
        if matches(name, ignore):
            continue
        layers += _packed_bytes(linear, settings, name, shared_codebook)
        if not dense:
            total -= own[id(linear.weight)]
    return total + layers + (0 if dense else layers)


def _packed_bytes(
    linear: nn.Linear, settings: LayerSettings, name: str, shared_codebook: bool
) -> int:
    one = settings.of(name)
    form = one.form()
    if shared_codebook and one.method == "vq":
        form["codebook"] = "shared"
    module = METHODS[one.method].empty(
        form, linear.in_features, linear.out_features, linear.weight.dtype, torch.device("meta")
    )
    return sum(parameter.nbytes for parameter in module.parameters())
