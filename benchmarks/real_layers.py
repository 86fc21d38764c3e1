"""Linears of SmolLM2-135M-Instruct with their act_norms and inputs, for benchmarks on real data."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nowag_ext
from nowag_ext import evaluate
from nowag_ext.demo_model import demo_model
from nowag_ext.source import calibration_batches, open_dense_model
from nowag_ext.text import read_text

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CALIBRATION, TEST = "wikitext2-valid.tokens.txt", "wikitext2-test.raw.txt"


@dataclass
class RealLayer:
    """weight [out, in] fp32, act_norms [in], inputs [tokens, in] fp32 of held-out text."""

    name: str
    weight: Tensor
    act_norms: Tensor
    inputs: Tensor


def add_data_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=DATA, help=f"folder of {CALIBRATION}")


def require_data(directory: Path, names: Sequence[str] = (CALIBRATION, TEST)) -> None:
    """Ends the program with one sentence if a text is not there."""
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise SystemExit(f"{' and '.join(missing)} must be in {directory}: name it with --data.")


def calibrated(data: Path, source: str | None = None) -> tuple[Any, Any, dict[str, Tensor]]:
    """(model fp32, tokenizer, act_norms by module) from 16 x 1024 tokens of validation text."""
    model, tokenizer = open_dense_model(source or demo_model(), "float32")
    tokens = evaluate.tokenize(tokenizer, read_text(data / CALIBRATION))
    norms = nowag_ext.calibrate(model, calibration_batches(tokens, samples=16, length=1024))
    return model, tokenizer, norms


def real_layers(data: Path, suffixes: Sequence[str], tokens: int = 256) -> list[RealLayer]:
    """The linears of these names (after "model.layers."), with inputs from the test text."""
    require_data(data)
    model, tokenizer, norms = calibrated(data)
    caught: dict[str, Tensor] = {}
    names = [f"model.layers.{suffix}" for suffix in suffixes]
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: caught.__setitem__(name, inputs[0].flatten(0, -2).clone())
        )
        for name in names
    ]
    with torch.inference_mode():
        model(evaluate.tokenize(tokenizer, read_text(data / TEST))[None, :tokens])
    for hook in hooks:
        hook.remove()
    return [
        RealLayer(
            suffix, model.get_submodule(name).weight.detach().clone(), norms[name], caught[name]
        )
        for suffix, name in zip(suffixes, names, strict=True)
    ]
