"""Statistics of two streams: the Hessian, and the least squares that correct a linear's target."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from nowag_ext.pipeline.statistics import _UNSEEN, GroupStatistics

TOKENS, INPUTS, OUTPUTS = 300, 40, 24


class Streams(NamedTuple):
    """What a linear reads in both streams, and the residual streams that it adds to."""

    dense: Tensor
    compressed: Tensor
    residual: Tensor
    behind: Tensor

    def parts(self, counts: tuple[int, ...]) -> list[Streams]:
        split = [part.split(counts) for part in self]
        return [Streams(*one) for one in zip(*split, strict=True)]


@pytest.fixture
def streams() -> Streams:
    torch.manual_seed(0)
    mixed = torch.randn(INPUTS, INPUTS)
    dense = torch.randn(TOKENS, INPUTS) @ mixed
    residual = 50 * torch.randn(TOKENS, OUTPUTS)
    return Streams(
        dense,
        dense + 0.1 * torch.randn_like(dense),
        residual,
        residual + torch.randn_like(residual),
    )


def least_squares(inputs: Tensor, lack: Tensor) -> Tensor:
    """(mean x~ x~^T + damping)^-1 mean x~ D^T in float64, as a weight [outputs, inputs]."""
    x, lack = inputs.double(), lack.double()
    hessian = x.T @ x / len(x)
    hessian.diagonal().add_(_UNSEEN * len(hessian) / len(x) * hessian.diagonal().mean())
    return torch.linalg.solve(hessian, x.T @ lack / len(x)).T


@pytest.mark.parametrize("bias", [False, True])
def test_corrections_of_linears_that_add_to_the_residual_stream(
    streams: Streams, bias: bool
) -> None:
    weight = torch.randn(OUTPUTS, INPUTS)
    shift = torch.randn(OUTPUTS) if bias else torch.zeros(OUTPUTS)
    statistics = GroupStatistics(INPUTS, weight.device)
    for part in streams.parts((100, 150, 50)):
        after = {"o": part.residual + functional.linear(part.dense, weight, shift)}
        before = {"o": part.behind + shift}
        statistics.add_pair(part.dense, part.compressed, after, before, all_summed=True)
    lack = streams.residual - streams.behind + (streams.dense - streams.compressed) @ weight.T
    wanted = least_squares(streams.compressed, lack)
    corrections = statistics.corrections({"o": weight})
    assert_close(corrections["o"], wanted.float(), rtol=1e-3, atol=1e-4)


def test_corrections_of_other_linears(streams: Streams) -> None:
    weights = {"q": torch.randn(OUTPUTS, INPUTS), "k": torch.randn(3, INPUTS).bfloat16()}
    statistics = GroupStatistics(INPUTS, torch.device("cpu"))
    for part in streams.parts((1, 299)):
        statistics.add_pair(part.dense, part.compressed, {}, {}, all_summed=False)
    corrections = statistics.corrections(weights)
    for name, weight in weights.items():
        wanted = least_squares(
            streams.compressed, (streams.dense - streams.compressed) @ weight.float().T
        )
        assert_close(corrections[name], wanted.float(), rtol=1e-3, atol=1e-4)


def test_streams_whose_tokens_are_routed_differently_correct_nothing(streams: Streams) -> None:
    statistics = GroupStatistics(INPUTS, torch.device("cpu"))
    statistics.add_pair(streams.dense[1:], streams.compressed, {}, {}, all_summed=False)
    weights = {"q": torch.randn(OUTPUTS, INPUTS)}
    assert statistics.corrections(weights) == {}
    x = streams.compressed.double()
    assert_close(statistics.hessian(), (x.T @ x / len(x)).float(), rtol=1e-5, atol=1e-4)


def unit_rows(*shape: int) -> Tensor:
    rows = torch.randn(*shape)
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("pair", [False, True])
def test_an_input_with_all_the_energy_counts_no_more_than_ten(pair: bool) -> None:
    torch.manual_seed(0)
    x = unit_rows(TOKENS, INPUTS)
    x[7] *= 1000
    statistics = GroupStatistics(INPUTS, torch.device("cpu"))
    if pair:
        statistics.add_pair(x, x, {}, {}, all_summed=False)
    else:
        statistics.add(x)
    x[7] *= math.sqrt(10) / 1000
    assert_close(statistics.hessian(), x.T @ x / TOKENS, rtol=1e-4, atol=1e-6)


def test_a_residual_stream_with_all_the_energy_counts_no_more_than_ten() -> None:
    """In everything that is added up, or a correction would not fit its Hessian."""
    torch.manual_seed(0)
    x, wanted = unit_rows(TOKENS, INPUTS), unit_rows(TOKENS, OUTPUTS)
    wanted[7] *= 1000
    before = torch.randn(TOKENS, OUTPUTS)
    statistics = GroupStatistics(INPUTS, torch.device("cpu"))
    statistics.add_pair(x, x, {"o": before + wanted}, {"o": before}, all_summed=True)
    weight = torch.randn(OUTPUTS, INPUTS)
    corrections = statistics.corrections({"o": weight})
    weights = torch.ones(TOKENS, 1)
    weights[7] = math.sqrt(10) / 1000
    expected = least_squares(weights * x, weights * (wanted - x @ weight.T))
    assert_close(corrections["o"], expected.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_inputs_of_zeros_are_nobodys_sink(tokens: int) -> None:
    x = torch.zeros(tokens, INPUTS)
    if tokens > 1:
        x[0] = 1  # the median token has no energy at all
    statistics = GroupStatistics(INPUTS, torch.device("cpu"))
    statistics.add(x)
    if tokens > 0:
        assert_close(statistics.hessian(), x.T @ x / tokens)
