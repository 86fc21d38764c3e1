"""Grad modes and process-wide defaults of torch make no difference to what comes out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import logits, random_act_norms, tiny_model, tiny_tokens

import nowag_ext
from nowag_ext import SparseLinear, VQLinear, calibrate, compress_model, prune, vq_compress

VQ: dict[str, Any] = {"d": 4, "bits": 1.5, "iters": 20}


@pytest.fixture
def defaults() -> Iterator[None]:
    """Whatever a test sets is put back."""
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    torch.set_default_device(None)


def layer() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cpu").manual_seed(3)
    weight = torch.randn(96, 64, generator=generator, dtype=torch.float32, device="cpu").pow(3)
    return weight, torch.ones(64, dtype=torch.float32, device="cpu")


def packed() -> list[dict[str, torch.Tensor]]:
    weight, act_norms = layer()
    return [
        vq_compress(weight, act_norms, **VQ).tensors(),
        vq_compress(weight, act_norms, **VQ, init="random", n_init=2).tensors(),
        prune(weight, act_norms).tensors(),
        prune(weight, act_norms, pattern="2:4").tensors(),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_default_dtype(dtype: torch.dtype, defaults: None) -> None:
    want = packed()
    torch.set_default_dtype(dtype)
    for one, other in zip(want, packed(), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_default_device(defaults: None) -> None:
    want = packed()
    torch.set_default_device("meta")
    for one, other in zip(want, packed(), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_defaults_of_a_whole_model(defaults: None) -> None:
    model, tokens = tiny_model(), tiny_tokens()
    want = calibrate(model, [tokens])
    compress_model(model, want, **VQ)
    other = tiny_model()
    torch.set_default_dtype(torch.bfloat16)
    norms = calibrate(other, [tokens])
    compress_model(other, norms, **VQ)
    torch.set_default_dtype(torch.float32)
    assert all(torch.equal(want[name], norms[name]) for name in want)
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("method", ["vq", "prune"])
def test_inference_mode(method: str) -> None:
    settings = VQ if method == "vq" else {}
    model, other = tiny_model(), tiny_model()
    want = calibrate(other, [tiny_tokens()])
    compress_model(other, want, method, **settings)
    with torch.inference_mode():
        norms = calibrate(model, [torch.clone(tiny_tokens())])
        compress_model(model, norms, method, **settings)
        inside = model(tiny_tokens()).logits
    assert all(torch.equal(want[name], norms[name]) for name in want)
    assert torch.equal(inside, logits(other))
    model(tiny_tokens(), labels=tiny_tokens()).loss.backward()
    assert model.model.embed_tokens.weight.grad is not None


def test_layers_made_in_inference_mode_have_gradients_later() -> None:
    with torch.inference_mode():
        weight, act_norms = layer()
        weight, act_norms = weight.clone(), act_norms.clone()
        vq, sparse = vq_compress(weight, act_norms, **VQ), prune(weight, act_norms)
    for module in (VQLinear.from_weight(vq), SparseLinear.from_weight(sparse)):
        x = torch.randn(20, 64, requires_grad=True)
        module(x).sum().backward()
        assert x.grad is not None


def test_loading_in_inference_mode(tmp_path: Any) -> None:
    model = tiny_model()
    compress_model(model, random_act_norms(model), **VQ)
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        loaded = nowag_ext.load(tmp_path)
        inside = loaded(tiny_tokens()).logits
    assert torch.equal(inside, logits(model))


def test_a_batch_of_padding_alone_is_refused() -> None:
    ids = tiny_tokens()
    batch = {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}
    with pytest.raises(ValueError, match=r"attention_mask of a token batch .* keeps no position"):
        calibrate(tiny_model(), [batch])
