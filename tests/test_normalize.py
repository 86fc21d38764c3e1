"""normalize.h against its oracle, and its promise of equal bits everywhere."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st

from nowag_ext import ops, reference

pytestmark = pytest.mark.kernel

SHAPES = [(1, 1), (1, 33), (3, 5), (64, 64), (65, 31), (129, 200), (300, 1025)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_oracle(shape: tuple[int, int], dtype: torch.dtype, threads: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for got, want in zip(ops.normalize(weight), reference.normalize(weight), strict=True):
        torch.testing.assert_close(got, want, rtol=3e-7, atol=0)


def test_same_bits_at_any_thread_count() -> None:
    weight = torch.randn(513, 700, generator=torch.Generator().manual_seed(2))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(ops.normalize(weight))
    torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert_same_bits(one, two)


@given(rows=st.integers(1, 70), cols=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_denormalises_to_the_weight(rows: int, cols: int, seed: int) -> None:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    normalized, row_norms, col_norms = ops.normalize(weight)
    torch.testing.assert_close(
        normalized * row_norms[:, None] * col_norms, weight, rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("view", ["transposed", "sliced", "offset"])
def test_strides(view: str) -> None:
    base = torch.randn(80, 90, generator=torch.Generator().manual_seed(3))
    weight = {"transposed": base.T, "sliced": base[:, :77], "offset": base[3:, 5:]}[view]
    for got, want in zip(ops.normalize(weight), ops.normalize(weight.contiguous()), strict=True):
        assert_same_bits(got, want)


def test_zero_columns_and_rows_stay_finite() -> None:
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(4))
    weight[2] = 0
    weight[:, 3] = 0
    normalized, row_norms, col_norms = ops.normalize(weight)
    assert torch.isfinite(normalized).all()
    assert col_norms[3].item() == pytest.approx(1e-5)
    assert row_norms[2].item() == pytest.approx(1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_shows_in_its_column(bad: float) -> None:
    weight = torch.randn(130, 40, generator=torch.Generator().manual_seed(5))
    weight[100, 17] = bad
    col_norms = ops.normalize(weight)[2]
    assert not torch.isfinite(col_norms[17])
    assert torch.isfinite(torch.cat([col_norms[:17], col_norms[18:]])).all()


def test_refuses_other_dtypes_and_shapes() -> None:
    with pytest.raises(TypeError, match=r"float16 or torch\.bfloat16, not torch\.float64"):
        ops.normalize(torch.randn(3, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"non-empty matrix, not of shape \(3,\)"):
        ops.normalize(torch.randn(3))


def test_opcheck() -> None:
    torch.library.opcheck(ops.normalize, (torch.randn(9, 8),))
