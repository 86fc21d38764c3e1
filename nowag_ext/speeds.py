"""How fast this machine is at what a compression does: measured, for a second or two."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from nowag_ext.codebook_training import train_codebook
from nowag_ext.decoder import decoder_layers
from nowag_ext.methods import Given, Settings, VQSettings
from nowag_ext.sampling import AT_ONCE

# Sizes that speeds are measured at, at most; and for how long, each.
_MOST_FEATURES = 4096
_MOST_LENGTH = 2048
_MOST_LOGITS = 32768
_LOGITS_TOKENS = 64
_SEARCH_FEATURES = 768
_SEARCH_ROWS = 256
_SECONDS = 0.15
_POINTS = 1 << 17
_ITERATIONS = (1, 4)
_MOST_CODE_BITS = 12


@dataclass(frozen=True)
class Search:
    """What this machine takes to find codes, or masks, of some settings.

    Attributes:
        compression: seconds a weight, beside products.
        seeding: seconds a weight of the starting points of k-means.
        training: seconds a weight and iteration of k-means; later ones take less.
        tuning: seconds a weight and step of a distillation, beside products.
    """

    compression: float
    seeding: float
    training: float
    tuning: float

    def clustering(self, iters: int) -> float:
        """Seconds a weight that a codebook is trained on."""
        return self.seeding + iters * self.training


@dataclass(frozen=True)
class Speeds:
    """Of this machine at a model's sizes.

    Attributes:
        products: floating-point operations a second of matrix products.
        few_products: the same where they are of as few tokens as a model writes at once.
        copies: bytes a second of a large tensor.
        attention, elementwise: seconds a layer and window.
        divergence: seconds a logit: of the softmax of two models, and its gradient.
        search: with the settings of most weights.
    """

    products: float
    few_products: float
    copies: float
    attention: float
    elementwise: float
    divergence: float
    search: Search


def measure_speeds(model: Any, settings: Settings, length: int, hidden: int) -> Speeds:
    """Measures them on random numbers."""
    random = _random_numbers()
    linears = [
        part
        for layer in decoder_layers(model).values()
        for part in layer.modules()
        if isinstance(part, nn.Linear)
    ]
    widest = max(linears, key=lambda linear: linear.weight.numel())
    inputs = min(widest.in_features, _MOST_FEATURES)
    outputs = min(widest.out_features, _MOST_FEATURES)
    rows = min(length, _MOST_LENGTH)
    x, weight = random(rows, inputs), random(outputs, inputs)
    products = 2 * rows * inputs * outputs / _timed(lambda: functional.linear(x, weight))
    few = x[:AT_ONCE]
    few_products = 2 * len(few) * inputs * outputs / _timed(lambda: functional.linear(few, weight))
    copies = weight.nbytes / _timed(weight.clone)
    windows = length / rows

    inner = max(linear.out_features for linear in linears)
    states, gate = random(rows, hidden), random(rows, inner)
    elementwise = windows * _timed(lambda: _elementwise(states, gate))
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    size = getattr(config, "head_dim", None) or hidden // heads
    query = random(1, heads, rows, size)
    attention = windows**2 * _timed(
        lambda: functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    )

    vocabulary = min(model.get_input_embeddings().weight.shape[0], _MOST_LOGITS)
    logits = random(_LOGITS_TOKENS, vocabulary)
    divergence = _timed(lambda: _divergence(logits)) / logits.numel()
    search = measure_search(settings, inputs, products)
    return Speeds(products, few_products, copies, attention, elementwise, divergence, search)


def measure_search(settings: Settings, inputs: int, products: float) -> Search:
    """Measures on random numbers what so many inputs take."""
    random = _random_numbers()
    features = min(inputs, _SEARCH_FEATURES)
    layer, norms = random(_SEARCH_ROWS, features), random(features).abs() + 0.1
    activations = random(2 * features, features)
    hessian = activations.T @ activations / len(activations)
    seeding, training, codebook = 0.0, 0.0, None
    scale = 1.0
    if isinstance(settings, VQSettings):
        code_bits = round(settings.d * settings.bits)
        # Larger codebooks would take minutes; what they cost grows no faster than they do.
        scale = 2.0 ** max(0, code_bits - _MOST_CODE_BITS)
        code_bits = min(code_bits, _MOST_CODE_BITS)
        settings = replace(settings, bits=code_bits / settings.d)
        weights = settings.d * max(_POINTS, 4 << code_bits)
        sample = random(math.ceil(weights / features), features)
        seconds = {}
        for iters in _ITERATIONS:
            began = time.perf_counter()
            codebook = train_codebook(
                [(sample, norms)], d=settings.d, bits=settings.bits, init=settings.init, iters=iters
            )
            seconds[iters] = (time.perf_counter() - began) / sample.numel()
        few, more = _ITERATIONS
        training = scale * max(0.0, seconds[more] - seconds[few]) / (more - few)
        seeding = max(0.0, scale * seconds[few] - few * training)
    given = Given(hessian=hessian, codebook=codebook)
    spent = (features**3 / 3 + 3 * features * layer.numel()) / products
    compression = _timed(lambda: settings.compress(layer, norms, lambda _share: None, given))
    compression = scale * max(0.1 * compression, compression - spent) / layer.numel()
    packed = settings.compress(layer, norms, lambda _share: None, given)
    tuning = (_timed(packed.dequantize) + _timed(lambda: packed.gradients(layer))) / layer.numel()
    return Search(compression, seeding, training, tuning)


def _random_numbers() -> Callable[..., torch.Tensor]:
    """Draws tensors of the shapes it is called with, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


def _elementwise(states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """What a layer does beside products and attention, roughly: norms, an activation, sums."""
    for _ in range(2):
        variance = states.pow(2).mean(-1, keepdim=True)
        states = states + (states * torch.rsqrt(variance + 1e-6)) * 0.1
    return (functional.silu(gate) * gate)[:, :1] + states[:, :1]


def _divergence(logits: torch.Tensor) -> torch.Tensor:
    """As a distillation compares tokens, and the gradient of that."""
    expected = torch.log_softmax(logits.flip(0), -1)
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        said = torch.log_softmax(leaf, -1)
        divergence = functional.kl_div(said, expected, reduction="sum", log_target=True)
        return torch.autograd.grad(divergence, leaf)[0]


def _timed(function: Callable[[], Any]) -> float:
    """Seconds a call, the first one not counted."""
    function()
    calls, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < _SECONDS:
        function()
        calls += 1
    return passed / calls
