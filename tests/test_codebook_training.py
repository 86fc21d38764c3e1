"""Codebooks trained on many linears together."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from compare import assert_same_bits
from torch import Tensor

from nowag_ext import Codebook, train_codebook, vq_compress


def layers(count: int = 4, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Linears of different sizes and scales."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(40 + 8 * i, 24 + 12 * i, generator=generator) * 10.0**i,
            torch.rand(24 + 12 * i, generator=generator) + 0.1,
        )
        for i in range(count)
    ]


def objective(codebook: Codebook, of: list[tuple[Tensor, Tensor]]) -> float:
    bits = codebook.code_bits / codebook.d
    packed = [vq_compress(*one, d=codebook.d, bits=bits, codebook=codebook) for one in of]
    return sum(weight.relative_objective or 0.0 for weight in packed) / len(packed)


def test_serves_all_layers_nearly_as_well_as_their_own() -> None:
    given = layers()
    trained = train_codebook(given, d=4, bits=1.5)
    own = [vq_compress(*one, d=4, bits=1.5) for one in given]
    mean = sum(weight.relative_objective or 0.0 for weight in own) / len(own)
    assert mean < objective(trained, given) < 1.6 * mean
    untrained = Codebook(torch.randn(64, 4, generator=torch.Generator().manual_seed(0)))
    assert objective(trained, given) < 0.75 * objective(untrained, given)


def test_scale_of_a_layer_does_not_matter() -> None:
    given = layers()
    larger = [(weight * 1024, norms * 8) for weight, norms in given]
    one, two = (train_codebook(some, d=4, bits=1.5, iters=5) for some in (given, larger))
    assert torch.allclose(one.entries.float(), two.entries.float(), atol=2e-2)


def test_same_bits_at_any_number_of_threads(threads: int) -> None:
    codebook = train_codebook(layers(), d=3, bits=2, iters=8)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert_same_bits(codebook.entries, train_codebook(layers(), d=3, bits=2, iters=8).entries)
    finally:
        torch.set_num_threads(before)


def test_a_share_of_the_rows_is_evenly_spaced() -> None:
    given = layers()
    half = train_codebook(given, d=4, bits=1.5, share=0.5)
    rows = [(weight[::2], norms) for weight, norms in given]
    assert all(weight.shape[0] % 2 == 0 for weight, _ in given)
    assert half.entries.shape == (64, 4)
    full = train_codebook(given, d=4, bits=1.5)
    assert objective(full, given) <= objective(half, given) < 1.3 * objective(full, given)
    assert len(rows) == len(given)


def test_progress_and_name() -> None:
    calls: list[tuple[int, int, float]] = []
    codebook = train_codebook(
        iter(layers(2)), d=2, bits=2, iters=6, name="gate_proj",
        progress=lambda *call: calls.append(call),
    )  # fmt: skip
    assert codebook.name == "gate_proj"
    assert [call[0] for call in calls] == list(range(len(calls)))
    assert {call[1] for call in calls} == {6}
    assert calls[-1][2] <= calls[1][2] < calls[0][2] == math.inf


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"share": 0.0}, r"share must be in \(0, 1\], not 0.0"),
        ({"share": 1.5}, r"share must be in \(0, 1\]"),
        ({"d": 9}, "d must be an integer from 1 to 8"),
        ({"iters": 0}, "iters must be a positive integer"),
        ({"d": 8, "bits": 2}, "needs at least as many sub-vectors, but the sampled rows of 4"),
        ({"name": "a.b"}, "the name of a codebook consists of"),
        ({"layers": []}, "layers is empty"),
        ({"layers": [(torch.full((2, 2), torch.nan), torch.ones(2))]}, "W must be finite"),
    ],
)
def test_refusals(changes: dict[str, Any], sentence: str) -> None:
    arguments: dict[str, Any] = {"layers": layers(), "d": 2, "bits": 2, **changes}
    with pytest.raises(ValueError, match=sentence):
        train_codebook(arguments.pop("layers"), **arguments)
