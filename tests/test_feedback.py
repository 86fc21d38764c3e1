"""VQ under a full Hessian: against GPTQ's own form, what it gains, odd layers, refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from compare import assert_same_bits, assert_within
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nowag_ext import Codebook, reference, vq_compress
from nowag_ext.feedback import EntrySums, FeedbackPoints, shared_points
from nowag_ext.hessian import DAMPING, factorise


def layer(
    rows: int, inputs: int, seed: int = 0, tokens: int = 2000
) -> tuple[Tensor, Tensor, Tensor]:
    """(W, act_norms, H) of inputs that are correlated, and of sizes that differ by orders."""
    generator = torch.Generator().manual_seed(seed)
    causes = max(1, inputs // 4)
    mixing = torch.randn(causes, inputs, generator=generator) / math.sqrt(causes)
    sizes = torch.randn(inputs, generator=generator).exp()
    x = torch.randn(tokens, causes, generator=generator) @ mixing
    x = (x + 0.3 * torch.randn(tokens, inputs, generator=generator)) * sizes
    hessian = x.T @ x / tokens
    weight = torch.randn(rows, inputs, generator=generator)
    return weight, hessian.diagonal().sqrt(), hessian


def output_error(weight: Tensor, quantised: Tensor, hessian: Tensor) -> float:
    """E |x (W - Q)^T|^2 relative to E |x W^T|^2, in float64."""
    error, whole = (m.double() for m in (weight - quantised, weight))
    h = hessian.double()
    return float(((error @ h) * error).sum() / ((whole @ h) * whole).sum())


@pytest.mark.parametrize(("d", "code_bits"), [(1, 3), (2, 5), (4, 8), (6, 9)])
def test_codes_are_those_of_gptq_through_the_inverse(d: int, code_bits: int) -> None:
    weight, _, hessian = layer(40, 24)
    codebook = torch.randn(2**code_bits, d, generator=torch.Generator().manual_seed(1)) / 5
    norms = torch.rand(24) + 0.5
    points = FeedbackPoints(weight / 5, hessian, norms, d)
    got = points.assign(codebook)
    codes, quantised = reference.feedback(
        weight / 5, norms[:, None] * hessian * norms, codebook, points.order, DAMPING
    )
    same = (got.codes.to(torch.int64) == codes).float().mean()
    assert same > 0.995, f"only {same:.4f} of the codes are the same"
    exact = output_error((weight / 5) * norms, quantised * norms, hessian)
    assert_within(torch.tensor(got.relative_objective), exact, 2e-3 * exact)


def test_most_important_positions_come_first() -> None:
    weight, _, hessian = layer(8, 12)
    points = FeedbackPoints(weight, hessian, torch.ones(12), 3)
    sizes = hessian.diagonal().view(4, 3).sum(1)[points.order]
    assert (sizes.diff() <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("d", "bits"), [(4, 2), (6, 1), (3, 2)])
def test_error_of_outputs_is_far_below_that_of_the_diagonal(
    d: int, bits: int, dtype: torch.dtype
) -> None:
    weight, act_norms, hessian = layer(128, 62)
    weight = weight.to(dtype)
    plain = vq_compress(weight, act_norms, d=d, bits=bits, iters=20)
    under = vq_compress(weight, act_norms, d=d, bits=bits, iters=20, hessian=hessian)
    errors = [output_error(weight, w.dequantize(), hessian) for w in (plain, under)]
    assert errors[1] < 0.75 * errors[0]
    assert under.relative_objective == pytest.approx(errors[1], rel=0.1)  # but for row norms
    assert under.codes.shape == plain.codes.shape
    assert under.bits_per_weight == plain.bits_per_weight


def test_objective_is_that_of_what_is_stored() -> None:
    weight, act_norms, hessian = layer(64, 40)
    packed = vq_compress(weight, act_norms, d=4, bits=2, iters=10, hessian=hessian)
    row, column = packed.row_norms.double(), packed.col_norms.double()
    exact = output_error(
        weight.double() / row[:, None], packed.dequantize().double() / row[:, None], hessian
    )
    assert float(column.min()) > 0
    assert packed.relative_objective == pytest.approx(exact, rel=1e-3)


def test_given_and_shared_codebooks_are_kept() -> None:
    weight, act_norms, hessian = layer(32, 24)
    entries = torch.randn(64, 3, generator=torch.Generator().manual_seed(2)) / 5
    own = vq_compress(weight, act_norms, d=3, bits=2, codebook=entries, hessian=hessian)
    assert_same_bits(own.codebook, entries.half())
    shared = Codebook(entries * math.sqrt(24), "model")
    taken = vq_compress(weight, act_norms, d=3, bits=2, codebook=shared, hessian=hessian)
    assert taken.codebook is shared.entries
    assert taken.codebook_name == "model"
    assert taken.relative_objective == pytest.approx(own.relative_objective, rel=0.05)


@pytest.mark.parametrize("exponent", [-90, -30, 90])
def test_a_factor_of_the_hessian_does_not_matter(exponent: int) -> None:
    weight, act_norms, hessian = layer(32, 26)
    one, other = (
        vq_compress(weight, act_norms, d=3, bits=2, iters=5, hessian=h)
        for h in (hessian, hessian * 2.0**exponent)
    )
    assert_same_bits(other.codes, one.codes)
    assert other.relative_objective == pytest.approx(one.relative_objective, rel=1e-6)


def test_strides_do_not_matter() -> None:
    weight, act_norms, hessian = layer(32, 26)
    wanted = vq_compress(weight, act_norms, d=3, bits=2, iters=5, hessian=hessian)
    wide = torch.zeros(52, 52)
    wide[::2, ::2] = hessian
    got = vq_compress(
        weight.T.contiguous().T, act_norms, d=3, bits=2, iters=5, hessian=wide[::2, ::2]
    )
    assert_same_bits(got.codes, wanted.codes)
    assert_same_bits(got.codebook, wanted.codebook)


def test_correction_moves_the_target() -> None:
    weight, act_norms, hessian = layer(32, 24)
    extra = 0.3 * torch.randn(32, 24)
    given = vq_compress(weight, act_norms, d=3, bits=2, hessian=hessian, extra=extra)
    wanted = vq_compress(weight + extra, act_norms, d=3, bits=2, hessian=hessian)
    for name, tensor in given.tensors().items():
        assert_same_bits(tensor, wanted.tensors()[name], name)


def test_other_devices_are_refused() -> None:
    weight, act_norms, hessian = (part.to("meta") for part in layer(8, 12))
    with pytest.raises(ValueError, match="runs on the CPU and on CUDA devices, not on meta"):
        vq_compress(weight, act_norms, d=2, bits=1, hessian=hessian)


def test_hessian_may_be_an_array_or_float64() -> None:
    weight, act_norms, hessian = layer(32, 24)
    wanted = vq_compress(weight, act_norms, d=3, bits=2, hessian=hessian)
    for other in (hessian.numpy(), hessian.double(), hessian.double().numpy()):
        got = vq_compress(weight, act_norms, d=3, bits=2, hessian=other)
        assert_same_bits(got.codes, wanted.codes)


ODD: dict[str, Any] = {
    "one weight": (torch.tensor([[0.7]]), torch.tensor([[2.0]]), 1),
    "one row": (torch.randn(1, 30), torch.eye(30), 4),
    "one input": (torch.randn(30, 1), torch.ones(1, 1), 3),
    "padding": (torch.randn(20, 13), torch.eye(13) + 0.5, 6),
    "dead inputs": (torch.randn(20, 12), torch.diag(torch.arange(12.0)).clamp(max=5), 4),
    "one token": (torch.randn(20, 12), torch.outer(torch.arange(12.0), torch.arange(12.0)), 4),
    "zeros": (torch.zeros(20, 12), torch.eye(12), 4),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_layers(name: str) -> None:
    weight, hessian, d = ODD[name]
    codebook = torch.randn(16, d, generator=torch.Generator().manual_seed(3)) / 4
    packed = vq_compress(
        weight, hessian.diagonal().sqrt(), d=d, bits=4 / d, codebook=codebook, hessian=hessian
    )
    assert torch.isfinite(packed.dequantize()).all()
    assert packed.relative_objective is not None
    assert 0 <= packed.relative_objective < math.inf


@given(
    st.integers(1, 40), st.integers(1, 20), st.integers(1, 8), st.integers(1, 30), st.integers(0, 9)
)
def test_any_shape_and_rank(rows: int, inputs: int, d: int, tokens: int, seed: int) -> None:
    weight, act_norms, hessian = layer(rows, inputs, seed, tokens)
    codebook = torch.randn(2**d, d, generator=torch.Generator().manual_seed(seed)) / 4
    packed = vq_compress(weight, act_norms, d=d, bits=1, codebook=codebook, hessian=hessian)
    row = packed.row_norms.double()[:, None]
    exact = output_error(weight.double() / row, packed.dequantize().double() / row, hessian)
    assert packed.relative_objective == pytest.approx(exact, rel=1e-2, abs=1e-4)


def test_factor_is_of_the_damped_matrix_in_its_order() -> None:
    _, _, hessian = layer(1, 20)
    scale, order = torch.rand(20) + 0.5, torch.randperm(20)
    factor = factorise(hessian, scale, order)
    metric = (scale[:, None] * hessian * scale)[order][:, order].double()
    metric += DAMPING * metric.diagonal().mean() * torch.eye(20)
    assert_same_bits(factor.upper, factor.upper.triu())
    assert_within(
        factor.upper.double() @ factor.upper.double().T, metric, 1e-5 * float(metric.max())
    )


def test_a_share_of_the_rows_in_the_units_of_all() -> None:
    weight, _, hessian = layer(30, 13)
    whole, part = (shared_points(weight, hessian, 2, share) for share in (1.0, 0.2))
    assert_same_bits(part.points, whole.points[[0, 5, 10, 15, 20, 25]])
    assert_same_bits(part.upper, whole.upper)
    assert len(shared_points(weight, hessian, 2, 1e-9).points) == 1


def test_factor_of_padding_is_zero() -> None:
    tokens = torch.randn(40, 13, generator=torch.Generator().manual_seed(5))
    hessian, scale = tokens.T @ tokens / 40, torch.linspace(0.5, 2, 13)
    order = torch.tensor([3, 13, 0, 5, 1, 14, 12, 2, 4, 6, 7, 8, 9, 10, 11])
    inside = order < 13
    got, want = factorise(hessian, scale, order), factorise(hessian, scale, order[inside])
    assert not got.upper[~inside].any()
    assert not got.upper[:, ~inside].any()
    torch.testing.assert_close(got.upper[inside][:, inside], want.upper)
    assert (got.damping, got.added) == pytest.approx((want.damping, want.added))
    assert got.effective_rank == pytest.approx(want.effective_rank)


def test_damping_doubles_until_it_is_enough() -> None:
    vectors = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    indefinite = vectors @ torch.diag(torch.tensor([5.0, 1, 1, 1, 1, 1, 1, -0.5])) @ vectors.T
    factor = factorise((indefinite + indefinite.T) / 2, torch.ones(8), torch.arange(8))
    assert factor.damping == DAMPING * 4  # 0.1 and 0.2 times the mean, 1.19, are less than 0.5
    hopeless = torch.full((8, 8), 1.0) - 2 * torch.eye(8) + torch.diag(torch.full((8,), 1e-3))
    with pytest.raises(ValueError, match="positive semi-definite"):
        vq_compress(torch.randn(4, 8), torch.ones(8), d=2, bits=1, hessian=-1e4 * hopeless.abs())


def test_solved_entries_are_no_worse_for_the_points_they_serve() -> None:
    weight, _, hessian = layer(200, 24)
    points = FeedbackPoints(weight / 5, hessian, torch.ones(24), 4)
    codebook = torch.randn(32, 4, generator=torch.Generator().manual_seed(4)) / 5
    before = points.assign(codebook, sums := EntrySums(32, 4, weight.numel(), weight.device))
    after = points.assign(sums.solve(codebook))
    assert after.relative_objective < 0.9 * before.relative_objective


def test_entries_without_points_stay() -> None:
    sums = EntrySums(4, 2, 100, torch.device("cpu"))
    codebook = torch.randn(4, 2)
    assert_same_bits(sums.solve(codebook), codebook)


def _refused(**changes: Any) -> dict[str, Any]:
    weight, act_norms, hessian = layer(8, 12)
    return {"W": weight, "act_norms": act_norms, "hessian": hessian, "d": 2, "bits": 1, **changes}


_, _, H = layer(8, 12)
NAN = H.clone()
NAN[3, 4] = math.nan


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hessian": NAN}, "hessian must be finite, but 1 of its elements"),
        ({"hessian": H[:6, :6]}, r"hessian must have shape \(12, 12\).*not \(6, 6\)"),
        ({"hessian": H + torch.triu(H.abs(), 1)}, "hessian must be symmetric"),
        ({"hessian": H.half()}, "hessian must be of dtype float32 or float64, not torch.float16"),
        ({"hessian": "H"}, "hessian must be a torch.Tensor or a numpy.ndarray, not str"),
        ({"hessian": -H}, "hessian must be positive semi-definite, but its diagonal holds -"),
        ({"hessian": torch.zeros(12, 12)}, "must not have a diagonal of zeros"),
        ({"extra": torch.zeros(3, 3)}, r"extra must have W's shape and device, \(8, 12\)"),
        ({"extra": torch.full((8, 12), math.inf)}, "extra must be finite, but 96"),
        ({"extra": np.zeros((8, 12), dtype=np.int64)}, "extra must be a floating-point"),
        ({"hessian": None, "extra": torch.zeros(8, 12)}, "extra corrects W under a Hessian"),
    ],
)
def test_refusals(changes: dict[str, Any], sentence: str) -> None:
    arguments = _refused(**changes)
    weight, act_norms = arguments.pop("W"), arguments.pop("act_norms")
    with pytest.raises((ValueError, TypeError), match=sentence):
        vq_compress(weight, act_norms, **arguments)
