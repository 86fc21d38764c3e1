"""prune.h against a stable sort, and nowag_ext.prune on top of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compare import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nowag_ext import ops, reference
from nowag_ext.normalize import normalize_weight
from nowag_ext.prune import SparseWeight, prune

kernel = pytest.mark.kernel

SHAPES = [(1, 1), (1, 7), (3, 5), (2, 63), (5, 64), (7, 65), (33, 200), (64, 1031), (300, 1000)]
PATTERNS = [(1, 1), (1, 2), (2, 4), (1, 4), (4, 8), (3, 8), (5, 16), (9, 32), (2, 3), (4, 5)]


def operands(rows: int, cols: int, seed: int = 0, levels: int = 0) -> tuple[Tensor, Tensor]:
    """w and h; with ``levels``, of so few distinct values that saliencies tie, many at 0."""
    generator = torch.Generator().manual_seed(seed)
    if levels:
        w = torch.randint(-levels, levels + 1, (rows, cols), generator=generator).float() / 8
        h = torch.randint(0, levels + 1, (cols,), generator=generator).float()
        return w, h
    w = torch.randn(rows, cols, generator=generator)
    return w, torch.rand(cols, generator=generator).square() * 4


def assert_select(w: Tensor, h: Tensor, n_prune: int) -> None:
    got, want = ops.prune_select(w, h, n_prune), reference.prune_select(w, h, n_prune)
    assert_same_bits(got, want, f"the bitmap with {n_prune} of {w.numel()} pruned")


@kernel
@pytest.mark.parametrize("levels", [0, 1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_select_is_a_stable_sort(shape: tuple[int, int], levels: int, threads: int) -> None:
    w, h = operands(*shape, seed=1, levels=levels)
    for n_prune in {0, 1, w.numel() // 3, w.numel() // 2, w.numel() - 1, w.numel()}:
        assert_select(w, h, n_prune)


@kernel
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 150),
    share=st.floats(0, 1),
    levels=st.sampled_from([0, 0, 1, 5]),
    seed=st.integers(0, 2**31),
)
def test_select_property(rows: int, cols: int, share: float, levels: int, seed: int) -> None:
    w, h = operands(rows, cols, seed, levels)
    assert_select(w, h, int(share * w.numel()))


@kernel
@pytest.mark.parametrize("share", [0.0001, 0.1, 0.5, 0.9, 0.9999])
def test_select_when_a_sample_is_only_a_part(share: float) -> None:
    w, h = operands(1000, 1777, seed=2)
    assert_select(w, h, int(share * w.numel()))


@kernel
def test_select_when_the_sample_misleads() -> None:
    """A narrow peak of distinct values at the threshold, thinner than the gaps of the sample."""
    w, h = operands(600, 1500, seed=3)
    h[:] = 1
    w.view(-1)[123_456 : 123_456 + 40] = torch.linspace(8, 9, 40)
    w.view(-1)[700_000:] = 1e-3
    for n_prune in (w.numel() - 20, 100_000, 200_000, 200_001):
        assert_select(w, h, n_prune)


@kernel
def test_select_of_extreme_values() -> None:
    w, h = operands(50, 333, seed=4)
    scale = 10.0 ** torch.randint(-30, 20, w.shape, generator=torch.Generator().manual_seed(5))
    w = w * scale  # saliencies from 0 over subnormal to infinite
    for n_prune in (1, 4000, 8000, 12000, w.numel() - 1):
        assert_select(w, h, n_prune)


@kernel
@pytest.mark.parametrize("levels", [0, 2])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_select_nm_is_a_stable_sort(pattern: tuple[int, int], levels: int, threads: int) -> None:
    n, m = pattern
    for rows, groups in ((1, 1), (3, 2), (5, 3), (9, 17), (20, 67)):
        w, h = operands(rows, groups * m, seed=groups, levels=levels)
        assert_same_bits(ops.prune_select_nm(w, h, n, m), reference.prune_select_nm(w, h, n, m))


@kernel
@given(
    m=st.integers(1, 32), share=st.floats(0, 1), groups=st.integers(1, 40), seed=st.integers(0, 999)
)
def test_select_nm_property(m: int, share: float, groups: int, seed: int) -> None:
    n = max(1, round(share * m))
    w, h = operands(3, groups * m, seed, levels=seed % 3)
    assert_same_bits(ops.prune_select_nm(w, h, n, m), reference.prune_select_nm(w, h, n, m))


@kernel
@pytest.mark.parametrize("shape", SHAPES)
def test_objective(shape: tuple[int, int], threads: int) -> None:
    w, h = operands(*shape, seed=6)
    bitmap = reference.prune_select(w, h, w.numel() // 2)
    got = ops.prune_objective(w, h, bitmap)
    torch.testing.assert_close(got, reference.prune_objective(w, h, bitmap), rtol=1e-13, atol=0)


@kernel
def test_objective_has_pinned_bits() -> None:
    """The order of sums of prune.h, spelled out."""
    w, h = operands(37, 203, seed=7)
    bitmap = reference.prune_select(w, h, 3000)
    saliencies = torch.nn.functional.pad(h.double() * w.double().square(), (0, 5))
    keep = torch.nn.functional.pad(reference.from_bitmap(bitmap, 203), (0, 5))
    want = []
    for values in (saliencies.masked_fill(keep, 0), saliencies):
        lanes = torch.zeros(37, 8, dtype=torch.float64)
        for step in values.view(37, -1, 8).unbind(1):
            lanes += step
        for half in (4, 2, 1):
            lanes = lanes[:, :half] + lanes[:, half:]
        total = 0.0
        for row in lanes[:, 0].tolist():
            total += row
        want.append(total)
    assert ops.prune_objective(w, h, bitmap).tolist() == want


@kernel
def test_ops_refuse() -> None:
    w, h = operands(4, 12)
    with pytest.raises(ValueError, match="n_prune must be from 0 to 48, not 49"):
        ops.prune_select(w, h, 49)
    with pytest.raises(ValueError, match=r"h must have shape \(12,\), not \(11,\)"):
        ops.prune_select(w, h[:11], 3)
    with pytest.raises(ValueError, match="w must be contiguous"):
        ops.prune_select(torch.randn(12, 4).T, h, 3)
    with pytest.raises(TypeError, match=r"w must be torch\.float32, not torch\.float64"):
        ops.prune_select(w.double(), h, 3)
    with pytest.raises(ValueError, match="w and h must not hold NaN"):
        ops.prune_select(torch.full((4, 12), float("nan")), h, 3)
    with pytest.raises(ValueError, match="1 <= N <= M <= 32, not 5:4"):
        ops.prune_select_nm(w, h, 5, 4)
    with pytest.raises(ValueError, match="in_features 12 is not a multiple of M = 8"):
        ops.prune_select_nm(w, h, 4, 8)


@kernel
def test_opcheck() -> None:
    w, h = operands(9, 24)
    torch.library.opcheck(ops.prune_select, (w, h, 77))
    torch.library.opcheck(ops.prune_select_nm, (w, h, 2, 4))
    torch.library.opcheck(ops.prune_objective, (w, h, ops.prune_select(w, h, 77)))


def layer(dtype: torch.dtype = torch.float32, seed: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(48, 80, generator=generator).to(dtype),
        torch.rand(80, generator=generator) + 0.1,
    )


def assert_pruned(weight: Tensor, sparse: SparseWeight, bitmap: Tensor) -> None:
    """Exactly the weights of the bitmap are there, with their bits."""
    keep = reference.from_bitmap(bitmap, weight.shape[1])
    assert_same_bits(sparse.bitmap, bitmap)
    assert sparse.values.dtype == weight.dtype
    assert_same_bits(sparse.values, weight[keep])
    assert_same_bits(sparse.dequantize(weight.dtype), weight.where(keep, torch.zeros(())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [None, 0.0, 0.3, 0.999])
def test_prune_unstructured(dtype: torch.dtype, sparsity: float | None) -> None:
    weight, norms = layer(dtype)
    sparse = prune(weight, norms, sparsity=sparsity)
    n_prune = int((0.5 if sparsity is None else sparsity) * weight.numel())
    problem = normalize_weight(weight, norms)
    assert_pruned(
        weight, sparse, reference.prune_select(problem.normalized, problem.importance, n_prune)
    )
    assert sparse.values.numel() == weight.numel() - n_prune
    assert sparse.pattern is None


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:2", "5:5", "3:10"])
def test_prune_pattern(pattern: str) -> None:
    weight, norms = layer(torch.bfloat16)
    sparse = prune(weight, norms, pattern=pattern)
    n, m = map(int, pattern.split(":"))
    problem = normalize_weight(weight, norms)
    assert_pruned(
        weight, sparse, reference.prune_select_nm(problem.normalized, problem.importance, n, m)
    )
    assert sparse.pattern == pattern


@pytest.mark.parametrize("settings", [{"sparsity": 0.4}, {"pattern": "2:4"}])
def test_relative_objective(settings: dict[str, Any]) -> None:
    weight, norms = layer()
    sparse = prune(weight, norms, **settings)
    wn, _, _ = reference.normalize(weight)
    h = (norms.double().square() / norms.double().square().mean())[None]
    errors = h * wn.double().square()
    pruned = errors[~reference.from_bitmap(sparse.bitmap, 80)].sum()
    assert sparse.relative_objective == pytest.approx((pruned / errors.sum()).item(), rel=1e-5)


def test_bits_per_weight_counts_everything() -> None:
    sparse = prune(*layer(torch.float16))
    stored = 48 * 16 * 8 + 48 * 80 // 2 * 16 + 49 * 32
    assert sparse.bits_per_weight == stored / (48 * 80)


def test_to_and_tensors() -> None:
    sparse = prune(*layer(), pattern="2:4")
    moved = sparse.to("meta")
    assert all(tensor.is_meta for tensor in moved.tensors().values())
    assert (moved.shape, moved.pattern) == (sparse.shape, "2:4")
    assert moved.relative_objective == sparse.relative_objective


def test_numpy_equals_torch() -> None:
    weight, norms = layer(torch.float16)
    one, other = prune(weight, norms), prune(weight.numpy(), norms.numpy().astype(np.float64))
    for name, tensor in one.tensors().items():
        assert_same_bits(tensor, other.tensors()[name], name)


def test_scale_of_act_norms_does_not_matter() -> None:
    weight, norms = layer()
    assert_same_bits(prune(weight, norms).bitmap, prune(weight, norms * 16).bitmap)


def test_same_bits_at_any_thread_count(threads: int) -> None:
    weight, norms = layer(seed=9)
    sparse = prune(weight, norms)
    torch.set_num_threads(1)
    alone = prune(weight, norms)
    for name, tensor in alone.tensors().items():
        assert_same_bits(tensor, sparse.tensors()[name], name)
    assert alone.relative_objective == sparse.relative_objective


def test_strided_weights() -> None:
    weight, norms = layer()
    wide = torch.randn(48, 100)
    wide[:, :80] = weight
    for view in (wide[:, :80], weight.T.contiguous().T):
        assert_same_bits(prune(view, norms).values, prune(weight, norms).values)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), not 1.0"),
        ({"sparsity": -0.1}, r"sparsity must be in \[0, 1\), not -0.1"),
        ({"sparsity": float("nan")}, r"sparsity must be in \[0, 1\), not nan"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "give either sparsity or pattern"),
        ({"pattern": "3:7"}, "M = 7 of pattern '3:7' must divide in_features 80"),
        ({"pattern": "2-4"}, "pattern must be \"N:M\" with 1 <= N <= M, not '2-4'"),
        ({"pattern": "5:4"}, "1 <= N <= M, not '5:4'"),
        ({"pattern": "0:4"}, "1 <= N <= M, not '0:4'"),
        ({"pattern": "20:40"}, "M of pattern '20:40' must be at most 32"),
    ],
)
def test_refuses_settings(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        prune(*layer(), **settings)


@pytest.mark.parametrize(
    ("column", "value", "sentence"),
    [
        (3, float("nan"), "act_norms must be finite, but 1 of 80"),
        (0, float("inf"), "act_norms must be finite, but 1 of 80"),
        (79, -1.0, "act_norms must not be negative, but 1 of 80"),
        (slice(None), 0.0, "act_norms must not all be zero"),
    ],
)
def test_refuses_act_norms(column: Any, value: float, sentence: str) -> None:
    weight, norms = layer()
    norms[column] = value
    with pytest.raises(ValueError, match=sentence):
        prune(weight, norms)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_weights_that_are_not_finite(value: float) -> None:
    weight, norms = layer()
    weight[5, 17] = value
    with pytest.raises(ValueError, match="W must be finite, but column 17 holds"):
        prune(weight, norms)


def test_refuses_other_weights() -> None:
    weight, norms = layer()
    with pytest.raises(TypeError, match=r"not torch\.float64"):
        prune(weight.double(), norms)
    with pytest.raises(ValueError, match=r"not of shape \(3840,\)"):
        prune(weight.flatten(), norms)
    with pytest.raises(ValueError, match=r"act_norms must have shape \(80,\).*not \(79,\)"):
        prune(weight, norms[:79])
