"""Pruning under a full Hessian: against SparseGPT through the inverse, and what it is for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import assert_same_bits, assert_within
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nowag_ext import reference
from nowag_ext.compensate import compensate, feed_back, n_of_m, refit, whole_layer
from nowag_ext.hessian import DAMPING, factorise, relative_error
from nowag_ext.normalize import normalize_weight
from nowag_ext.prune import SparseWeight, kept_weights, parse_pattern, prune
from nowag_ext.reference import compensate as oracle

SETTINGS: list[dict[str, Any]] = [
    {"sparsity": 0.5},
    {"sparsity": 0.13},
    {"sparsity": 0.9},
    {"pattern": "2:4"},
    {"pattern": "1:3"},
    {"pattern": "5:8"},
    {"pattern": "16:32"},
]

# One block, more than one with a narrow last, a multiple of all groups: 96 = 3 * 32.
WIDTHS = [96, 288, 384]


def rounding(n: int) -> float:
    """What float32 may differ by, relatively: a unit for the condition of a damped Hessian.

    That is n / DAMPING for few tokens; four times, to be safe.
    """
    return 4 * 2**-24 * n / DAMPING


def layer(
    rows: int, n: int, seed: int = 0, tokens: int | None = None, dead: int = 0
) -> tuple[Tensor, Tensor]:
    """W and E[x x^T] of correlated inputs whose sizes differ by orders; some are always 0."""
    generator = torch.Generator().manual_seed(seed)
    tokens = 4 * n if tokens is None else tokens
    hidden = max(1, n // 4)
    x = torch.randn(tokens, hidden, generator=generator) @ torch.randn(
        hidden, n, generator=generator
    )
    x = x / hidden**0.5 + 0.3 * torch.randn(tokens, n, generator=generator)
    x *= torch.randn(n, generator=generator).exp()
    x[:, torch.randperm(n, generator=generator)[:dead]] = 0
    return torch.randn(rows, n, generator=generator) / n**0.5, x.T @ x / tokens


def norms_of(hessian: Tensor) -> Tensor:
    return hessian.diagonal().sqrt()


def pruned(weight: Tensor, hessian: Tensor, **settings: Any) -> SparseWeight:
    return prune(weight, norms_of(hessian), hessian=hessian, **settings)


def damped(hessian: Tensor) -> Tensor:
    """In units of the mean of the diagonal, as compensate takes it, in float64."""
    metric = hessian.double() / hessian.diagonal().double().mean()
    return metric + DAMPING * torch.eye(len(metric), dtype=torch.float64)


def choices(settings: dict[str, Any], rows: int, n: int) -> tuple[Any, Any]:
    """The same choice for the implementation and the oracle."""
    if "pattern" in settings:
        pattern = parse_pattern(settings["pattern"], n)
        return n_of_m(*pattern), oracle.n_of_m(*pattern)
    n_prune = int(settings["sparsity"] * rows * n)
    return whole_layer(n_prune, n), oracle.whole_layer(n_prune, n)


def fed_back(weight: Tensor, hessian: Tensor, choice: Any) -> tuple[Tensor, Tensor]:
    """Values and which are kept before the refit, as compensate has them."""
    problem = normalize_weight(weight, norms_of(hessian))
    metric = hessian / float(hessian.diagonal().double().mean())
    n = weight.shape[1]
    factor = factorise(metric, torch.ones(n), torch.arange(n))
    assert factor.damping == DAMPING
    return feed_back(weight, problem.row_norms, problem.col_norms, factor.upper, choice)


def costs(errors: Tensor, metric: Tensor) -> Tensor:
    return ((errors.double() @ metric.double()) * errors.double()).sum(1)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("n", WIDTHS)
def test_feedback_is_sparsegpts(settings: dict[str, Any], n: int) -> None:
    weight, hessian = layer(40, n, seed=n)
    choice, choose = choices(settings, 40, n)
    values, kept = fed_back(weight, hessian, choice)
    problem = normalize_weight(weight, norms_of(hessian))
    wanted, wanted_kept = oracle.feed_back(
        weight, problem.row_norms, problem.col_norms, damped(hessian), choice.columns, choose
    )
    assert_same_bits(kept, wanted_kept)
    assert_within(values, wanted, 2e-5 * float(weight.abs().max()))
    assert_same_bits(values == 0, ~kept)


def follow(kept: Tensor, by_row: bool) -> oracle.Choose:
    """Keeps what is given, after checking that its scores allow it but for rounding."""

    def choose(scores: Tensor, first: int) -> Tensor:
        keep = kept[:, first : first + scores.shape[1]]
        sizes = scores.sqrt()
        worst_lost = sizes.masked_fill(keep, -torch.inf)
        least_kept = sizes.masked_fill(~keep, torch.inf)
        excess = (
            worst_lost.amax(1) - least_kept.amin(1)
            if by_row
            else worst_lost.amax() - least_kept.amin()
        )
        assert float(excess.max()) <= rounding(kept.shape[1]) * float(sizes.max())
        return keep

    return choose


@given(
    rows=st.integers(1, 12),
    groups=st.integers(1, 40),
    m=st.integers(1, 32),
    share=st.floats(0, 0.99),
    patterned=st.booleans(),
    tokens=st.integers(1, 60),
    dead=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_property(
    rows: int,
    groups: int,
    m: int,
    share: float,
    patterned: bool,
    tokens: int,
    dead: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Any shape, few tokens: the oracle's mask but for near ties, the number, never worse."""
    n = m * groups
    weight, hessian = layer(rows, n, seed, tokens, min(dead, n - 1))
    weight = weight.to(dtype)
    settings: dict[str, Any] = {"sparsity": share}
    if patterned:
        settings = {"pattern": f"{max(1, round((1 - share) * m))}:{m}"}
    sparse = pruned(weight, hessian, **settings)
    kept = reference.from_bitmap(sparse.bitmap, n)
    choice, _ = choices(settings, rows, n)
    values, fed_kept = fed_back(weight.float(), hessian, choice)
    assert_same_bits(kept, fed_kept)
    assert int(kept.sum()) == kept_weights(
        n, rows, share if not patterned else None, sparse.pattern
    )
    problem = normalize_weight(weight.float(), norms_of(hessian))
    wanted, _ = oracle.feed_back(
        weight, problem.row_norms, problem.col_norms, damped(hessian), choice.columns,
        follow(kept, by_row=patterned),
    )  # fmt: skip
    largest = max(float(weight.abs().max()), float(wanted.abs().max()))
    assert_within(values, wanted, rounding(n) * largest)
    dense = sparse.dequantize()
    assert torch.isfinite(dense).all()
    if dtype == torch.float32:
        before = costs(weight - values, damped(hessian))
        after = costs(weight - dense, damped(hessian))
        assert_within(after, 0, before * (1 + 1e-4) + 1e-9)


def test_kept_values_are_the_best_that_the_errors_before_allow() -> None:
    """Without any factor: w_R + e_F H_FR H_RR^-1 for the columns R after those finished, F."""
    weight, hessian = layer(9, 45, seed=1)
    values, kept = fed_back(weight, hessian, n_of_m(2, 3))
    metric = damped(hessian)
    errors = weight.double() - values.double()
    for first in range(45):
        carried = errors[:, :first] @ metric[:first, first:]
        best = weight.double()[:, first:] + carried @ torch.linalg.inv(metric[first:, first:])
        here = kept[:, first]
        assert_within(values[here, first], best[here, 0], 1e-6)


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
def test_refit_converges_to_the_least(settings: dict[str, Any]) -> None:
    weight, hessian = layer(30, 160, seed=2)
    values, kept = fed_back(weight, hessian, choices(settings, 30, 160)[0])
    metric = damped(hessian)
    start = costs(weight - values, metric)
    at_ten, converged = values.clone(), values.clone()
    refit(weight, at_ten, kept, metric.float())
    refit(weight, converged, kept, metric.float(), iterations=500, worthwhile=0)
    gradient = ((weight - converged).double() @ metric) * kept
    assert float(gradient.norm()) < 1e-5 * float(
        ((weight - values).double() @ metric * kept).norm()
    )
    assert_within(converged, oracle.refit(weight, kept, metric), 1e-5)
    after, least = costs(weight - at_ten, metric), costs(weight - converged, metric)
    assert (after < start).all()
    assert float(after.sum() / least.sum()) < 1.02
    assert not at_ten[~kept].any()


def test_refit_leaves_a_row_that_it_cannot_better() -> None:
    """At the least already, or with nothing to make up for: no bit changes, and no NaN."""
    weight, hessian = layer(6, 64, seed=3)
    metric = damped(hessian)
    kept = reference.from_bitmap(pruned(weight, hessian).bitmap, 64)
    kept[0], kept[1] = True, False
    weight[2] = 0
    values = torch.where(kept, weight, 0)
    values[3:] = oracle.refit(weight, kept, metric)[3:].float()
    before = values.clone()
    refit(weight, values, kept, metric.float())
    assert_same_bits(values[:3], before[:3])
    allowed = costs(weight - before, metric) * (1 + 1e-6)
    assert_within(costs(weight - values, metric), 0, allowed)


def test_refit_leaves_a_row_whose_products_overflow() -> None:
    weight, hessian = layer(6, 64, seed=3)
    weight[2] = weight[2] / weight[2].abs().max() * 3e38
    kept = (torch.arange(64) % 2 == 0).expand(6, 64)
    values = torch.where(kept, weight, 0)
    before = values.clone()
    refit(weight, values, kept, 1e3 * damped(hessian).float())
    assert_same_bits(values[2], before[2])
    others = [0, 1, 3, 4, 5]
    metric = damped(hessian)
    assert (costs(weight - values, metric) < costs(weight - before, metric))[others].all()


def test_refit_of_a_metric_that_is_none_changes_nothing() -> None:
    weight, hessian = layer(5, 32, seed=4)
    kept = torch.rand(5, 32, generator=torch.Generator().manual_seed(5)) < 0.5
    values = torch.where(kept, weight, 0)
    before = values.clone()
    refit(weight, values, kept, -damped(hessian).float())
    assert_same_bits(values, before)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_error_is_clearly_below_that_of_plain_pruning(settings: dict[str, Any]) -> None:
    weight, hessian = layer(64, 384, seed=6)
    problem = normalize_weight(weight, norms_of(hessian))
    plain = prune(weight, norms_of(hessian), **settings).dequantize()
    errors = (weight - plain) / problem.col_norms / problem.row_norms[:, None]
    bare = relative_error(errors, problem.normalized, hessian, problem.col_norms)
    found = pruned(weight, hessian, **settings).relative_objective
    assert found is not None
    assert found < 0.8 * bare


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("settings", [{"sparsity": 0.4}, {"pattern": "2:4"}], ids=str)
def test_relative_objective_is_of_what_is_stored(
    settings: dict[str, Any], dtype: torch.dtype
) -> None:
    weight, hessian = layer(48, 160, seed=7)
    weight = weight.to(dtype)
    extra = 0.1 * layer(48, 160, seed=8)[0]
    sparse = pruned(weight, hessian, extra=extra, **settings)
    assert sparse.values.dtype == dtype
    target = weight.double() + extra.double()
    _, r, c = reference.normalize(target.float())
    scale = r.double()[:, None] * c.double()
    metric = c.double()[:, None] * hessian.double() * c.double()
    errors = (target - sparse.dequantize().double()) / scale
    wanted = costs(errors, metric).sum() / costs(target / scale, metric).sum()
    assert sparse.relative_objective == pytest.approx(float(wanted), rel=1e-4)


def test_extra_moves_the_target() -> None:
    """Exactly: as if the weight had been the sum, in float32."""
    weight, hessian = layer(20, 96, seed=9)
    extra = 0.2 * layer(20, 96, seed=10)[0]
    one = pruned(weight.bfloat16(), hessian, extra=extra)
    other = pruned(weight.bfloat16().float() + extra, hessian)
    assert_same_bits(one.bitmap, other.bitmap)
    assert_same_bits(one.values, other.values.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("settings", [{"sparsity": 0.0}, {"pattern": "4:4"}], ids=str)
def test_pruning_nothing_gives_the_target(settings: dict[str, Any], dtype: torch.dtype) -> None:
    weight, hessian = layer(10, 140, seed=11)
    extra = 0.1 * layer(10, 140, seed=12)[0]
    weight = weight.to(dtype)
    sparse = pruned(weight, hessian, extra=extra, **settings)
    assert_same_bits(sparse.dequantize(dtype), (weight.float() + extra).to(dtype))
    if dtype == torch.float32:
        assert sparse.relative_objective == 0


def test_values_stay_within_the_range_of_the_dtype() -> None:
    weight = torch.full((2, 2), 6e4, dtype=torch.float16)
    hessian = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    sparse = pruned(weight, hessian, pattern="1:2")
    assert sparse.values.tolist() == [torch.finfo(torch.float16).max] * 2


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (3, 127), (2, 129), (1, 300)], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99])
def test_exactly_the_number_asked_for(shape: tuple[int, int], sparsity: float) -> None:
    weight, hessian = layer(*shape, seed=13)
    sparse = pruned(weight, hessian, sparsity=sparsity)
    assert sparse.values.numel() == weight.numel() - int(sparsity * weight.numel())
    assert sparse.shape == shape
    assert torch.isfinite(sparse.values).all()


def test_blocks_have_their_share() -> None:
    weight, hessian = layer(7, 300, seed=14)
    kept = reference.from_bitmap(pruned(weight, hessian, sparsity=0.37).bitmap, 300)
    n_prune = int(0.37 * 2100)
    for last in (128, 256, 300):
        assert int((~kept[:, :last]).sum()) == n_prune * last // 300


@pytest.mark.parametrize("pattern", ["1:32", "2:4", "31:32", "1:1"])
def test_every_group_has_its_number(pattern: str) -> None:
    weight, hessian = layer(11, 160, seed=15)
    n, m = parse_pattern(pattern, 160)
    kept = reference.from_bitmap(pruned(weight, hessian, pattern=pattern).bitmap, 160)
    assert (kept.view(11, -1, m).sum(2) == n).all()


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
@pytest.mark.parametrize("tokens", [1, 17])
def test_fewer_tokens_than_inputs(settings: dict[str, Any], tokens: int) -> None:
    weight, hessian = layer(12, 160, seed=16, tokens=tokens)
    sparse = pruned(weight, hessian, **settings)
    assert torch.isfinite(sparse.values).all()
    assert sparse.relative_objective is not None
    assert sparse.relative_objective < 0.05


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
def test_dead_inputs_keep_their_values(settings: dict[str, Any]) -> None:
    """Nothing can be made up for at an input that is always 0."""
    weight, hessian = layer(12, 160, seed=17, dead=40)
    dead = hessian.diagonal() == 0
    assert int(dead.sum()) == 40
    sparse = pruned(weight, hessian, **settings)
    kept = reference.from_bitmap(sparse.bitmap, 160)
    there = kept & dead
    assert there.any()
    assert_within(sparse.dequantize()[there], weight[there], 1e-7)


def test_rows_and_columns_of_zeros() -> None:
    weight, hessian = layer(12, 96, seed=18)
    weight[3], weight[:, 50] = 0, 0
    sparse = pruned(weight, hessian)
    assert torch.isfinite(sparse.values).all()
    assert not sparse.dequantize()[3].any()
    nothing = pruned(torch.zeros(4, 8), layer(4, 8)[1])
    assert nothing.relative_objective == 0
    assert not nothing.values.any()


def test_a_factor_of_the_hessian_does_not_matter() -> None:
    weight, hessian = layer(16, 200, seed=19)
    one = pruned(weight, hessian)
    for factor in (2.0**-40, 2.0**40):
        other = pruned(weight, hessian * factor)
        assert_same_bits(one.bitmap, other.bitmap)
        assert_same_bits(one.values, other.values)


def test_hessian_in_float64_and_numpy() -> None:
    weight, hessian = layer(16, 96, seed=20)
    norms = norms_of(hessian)
    one = prune(weight, norms, hessian=hessian)
    for other in (
        prune(weight, norms, hessian=hessian.double()),
        prune(weight.numpy(), norms.numpy(), hessian=hessian.numpy()),
    ):
        assert_same_bits(one.values, other.values)


def test_whatever_the_default_dtype() -> None:
    weight, hessian = layer(16, 96, seed=29)
    one = pruned(weight, hessian)
    torch.set_default_dtype(torch.bfloat16)
    try:
        other = pruned(weight, hessian)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_bits(one.values, other.values)


def test_operands_are_left_as_they_were() -> None:
    weight, hessian = layer(16, 96, seed=21)
    extra = 0.1 * layer(16, 96, seed=22)[0]
    before = [weight.clone(), hessian.clone(), extra.clone()]
    pruned(weight, hessian)
    pruned(weight, hessian, extra=extra)
    for tensor, old in zip((weight, hessian, extra), before, strict=True):
        assert_same_bits(tensor, old)


def test_strided_operands() -> None:
    weight, hessian = layer(16, 96, seed=23)
    one = pruned(weight, hessian, pattern="2:4")
    other = pruned(weight.T.contiguous().T, hessian.T, pattern="2:4")
    assert_same_bits(one.bitmap, other.bitmap)
    assert_within(other.values, one.values, 1e-6)


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
def test_mask_at_any_thread_count(settings: dict[str, Any], threads: int) -> None:
    weight, hessian = layer(200, 512, seed=24)
    sparse = pruned(weight, hessian, **settings)
    torch.set_num_threads(1)
    alone = pruned(weight, hessian, **settings)
    assert_same_bits(sparse.bitmap, alone.bitmap)
    assert_within(sparse.values, alone.values, 1e-5)


def test_compensate_is_feedback_and_refit() -> None:
    weight, hessian = layer(8, 64, seed=25)
    problem = normalize_weight(weight, norms_of(hessian))
    values, kept, damping, rank = compensate(
        weight, problem.row_norms, problem.col_norms, hessian, whole_layer(256, 64)
    )
    assert damping == DAMPING
    squares = torch.linalg.eigvalsh(hessian.double()).square().sum()
    assert rank == pytest.approx(float(hessian.double().trace() ** 2 / squares), rel=1e-5)
    sparse = pruned(weight, hessian, sparsity=0.5)
    assert (sparse.damping, sparse.effective_rank) == (damping, pytest.approx(rank))
    before, same = fed_back(weight, hessian, whole_layer(256, 64))
    assert_same_bits(kept, same)
    metric = damped(hessian)
    assert costs(weight - values, metric).sum() < costs(weight - before, metric).sum()


@pytest.mark.parametrize("rows", [1, 511, 513, 1030])
def test_relative_error(rows: int) -> None:
    weight, hessian = layer(rows, 24, seed=26)
    errors, _ = layer(rows, 24, seed=27)
    scale = torch.rand(24, generator=torch.Generator().manual_seed(28))
    metric = scale.double()[:, None] * hessian.double() * scale.double()
    wanted = costs(errors, metric).sum() / costs(weight, metric).sum()
    assert relative_error(errors, weight, hessian, scale) == pytest.approx(float(wanted), rel=1e-5)


def test_relative_error_of_nothing_is_zero() -> None:
    zeros = torch.zeros(3, 4)
    assert relative_error(zeros, zeros, torch.eye(4), torch.ones(4)) == 0.0


def with_element(hessian: Tensor, row: int, column: int, value: float) -> Tensor:
    changed = hessian.clone()
    changed[row, column] = value
    return changed


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (lambda h: h.tolist(), TypeError, "hessian must be a torch.Tensor or .*, not list"),
        (lambda h: h.bfloat16(), TypeError, r"float32 or float64, not torch\.bfloat16"),
        (lambda h: h[:, :7], ValueError, r"hessian must have shape \(8, 8\).*not \(8, 7\)"),
        (lambda h: h.to("meta"), ValueError, "hessian must be on W's device cpu, not on meta"),
        (lambda h: with_element(h, 1, 2, float("nan")), ValueError, "finite, but 1 of its elem"),
        (lambda h: with_element(h, 3, 3, -2.0), ValueError, "but its diagonal holds -2"),
        (lambda h: h * 0, ValueError, "must not have a diagonal of zeros"),
        (lambda h: with_element(h, 1, 2, 1e3), ValueError, "hessian must be symmetric, but"),
        (lambda h: torch.full((8, 8), 1e4).fill_diagonal_(1), ValueError, "not be factorised"),
    ],
)
def test_refuses_hessians(change: Any, error: type[Exception], sentence: str) -> None:
    weight, hessian = layer(4, 8)
    with pytest.raises(error, match=sentence):
        prune(weight, norms_of(hessian), hessian=change(hessian))


@pytest.mark.parametrize(
    ("extra", "error", "sentence"),
    [
        (0.5, TypeError, "extra must be a floating-point tensor or array, not float"),
        (torch.zeros(4, 8, dtype=torch.int32), TypeError, r"extra must be .*not torch\.int32"),
        (torch.zeros(8, 4), ValueError, r"\(4, 8\) on cpu, not \(8, 4\) on cpu"),
        (torch.zeros(4, 8, device="meta"), ValueError, r"\(4, 8\) on cpu, not \(4, 8\) on meta"),
        (torch.full((4, 8), float("inf")), ValueError, "extra must be finite, but 32 of its"),
    ],
)
def test_refuses_extras(extra: Any, error: type[Exception], sentence: str) -> None:
    weight, hessian = layer(4, 8)
    with pytest.raises(error, match=sentence):
        pruned(weight, hessian, extra=extra)


def test_refuses_an_extra_without_a_hessian() -> None:
    weight, hessian = layer(4, 8)
    with pytest.raises(ValueError, match="extra corrects W under a Hessian: give hessian too"):
        prune(weight, norms_of(hessian), extra=torch.zeros(4, 8))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), not 1.0"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "give either sparsity or pattern"),
        ({"pattern": "3:7"}, "M = 7 of pattern '3:7' must divide in_features 8"),
    ],
)
def test_refuses_settings(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        pruned(*layer(4, 8), **settings)


def test_refuses_weights_and_norms_as_without() -> None:
    weight, hessian = layer(4, 8)
    with pytest.raises(ValueError, match="act_norms must not all be zero"):
        prune(weight, torch.zeros(8), hessian=hessian)
    weight[2, 5] = float("nan")
    with pytest.raises(ValueError, match="W must be finite, but column 5 holds"):
        pruned(weight, hessian, extra=torch.zeros(4, 8))
