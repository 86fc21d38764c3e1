"""Kernels on linears of SmolLM2-135M-Instruct with its own activations, where it is cached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nowag_ext
from nowag_ext import ops, reference
from nowag_ext.decoder import decoder_linears
from nowag_ext.demo_model import cached_demo_model
from nowag_ext.demo_text import demo_text
from nowag_ext.evaluate import perplexity, tokenize
from nowag_ext.normalize import normalize_weight

pytestmark = pytest.mark.slow

TOKENS = 512


@dataclass
class RealLinear:
    """weight [out, in] fp32; the inputs [16, in] of held-out tokens; act_norms [in] of others."""

    weight: Tensor
    act_norms: Tensor
    inputs: Tensor


@pytest.fixture(scope="module")
def dense() -> tuple[Any, Any]:
    """The model in fp32, and its tokenizer."""
    path = cached_demo_model()
    if path is None:
        pytest.skip("the demo's model is not in the cache: run `nowag-ext demo` once")
    return nowag_ext.load_dense_model(path, "float32")


@pytest.fixture(scope="module")
def linears(dense: tuple[Any, Any]) -> dict[str, RealLinear]:
    model, tokenizer = dense
    text = demo_text()
    calibration, held_out = (
        tokenize(tokenizer, part)[None, :TOKENS] for part in (text.calibration, text.held_out)
    )
    norms = nowag_ext.calibrate(model, [calibration])
    found = {
        name: RealLinear(linear.weight.detach(), norms[name], torch.empty(0))
        for name, linear in decoder_linears(model).items()
        if int(name.split(".")[2]) % 3 == 0  # of 30 blocks, all alike in their shapes
    }

    def keep(name: str) -> None:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name].inputs = inputs[0].flatten(0, -2)[:: TOKENS // 16].clone()

        model.get_submodule(name).register_forward_pre_hook(hook)

    for name in found:
        keep(name)
    with torch.inference_mode():
        model(held_out)
    assert len(found) == 70
    return found


def test_model_is_what_its_name_says(dense: tuple[Any, Any]) -> None:
    model, tokenizer = dense
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    tokens = tokenize(tokenizer, demo_text().held_out)
    assert 5 < perplexity(model, tokens, window=512, windows=2).perplexity < 40


def test_vq_gemv_is_within_two_thousandths(linears: dict[str, RealLinear]) -> None:
    """The bound that vq_gemv.h states for ||y - y64|| / ||y64||, token by token."""
    worst = (0.0, "")
    for name, linear in linears.items():
        weight = nowag_ext.vq_compress(
            linear.weight, linear.act_norms, d=4, bits=2, iters=2, init="random"
        )
        vq = tuple(weight.tensors().values())
        exact = reference.vq_linear(linear.inputs, *vq)
        error = ops.vq_gemv(linear.inputs, *vq).double() - exact
        worst = max(worst, (float((error.norm(dim=1) / exact.norm(dim=1)).max()), name))
    assert worst[0] <= 2e-3, worst


def test_pruning_masks_are_a_stable_sorts(linears: dict[str, RealLinear]) -> None:
    for name, linear in linears.items():
        bitmap = nowag_ext.prune(linear.weight, linear.act_norms, sparsity=0.5).bitmap
        problem = normalize_weight(linear.weight, linear.act_norms)
        saliency = (problem.importance * problem.normalized.square()).flatten()
        order = torch.argsort(saliency, stable=True)
        kept = torch.ones(saliency.numel(), dtype=torch.uint8)
        kept[order[: saliency.numel() // 2]] = 0
        bits = bitmap[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1
        unpacked = bits.flatten(1)[:, : linear.weight.shape[1]]
        assert torch.equal(unpacked.flatten(), kept), name
