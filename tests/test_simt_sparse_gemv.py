"""The sparse GEMV on the host SIMT executor (simt_cases.py)."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same_bits
from simt_cases import (
    CODES,
    DTYPES,
    SPARSE_SHAPES,
    assert_within_bound,
    needs_compiler,
    poisoned,
    randn,
    sparse_weight,
)
from simt_host import Driver
from torch import Tensor

from nowag_ext import ops

pytestmark = needs_compiler


def sparse_values(
    weight: Tensor, bitmap: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """values, row_offsets, and the weight that they and the bitmap make in float64."""
    cols = weight.shape[1]
    offsets = ops.sparse_offsets(bitmap, cols)
    values = ops.sparse_pack(weight.to(dtype), bitmap, offsets, int(offsets[-1]))
    dense = ops.sparse_dequantize(bitmap, values, offsets, cols, torch.float32).double()
    return values, offsets, dense


def check_sparse_by_tensor_cores(
    driver: Driver, weight: Tensor, bitmap: Tensor, dtype: torch.dtype
) -> None:
    rows, cols = weight.shape
    values, offsets, dense = sparse_values(weight, bitmap, dtype)
    x, bias = randn(16, cols, seed=150).to(dtype), randn(rows, seed=151).to(dtype)
    first = None
    for tokens in (1, 7, 8, 9, 16):
        y = poisoned(tokens, rows, dtype=dtype)
        some_bias = bias if tokens % 2 else None
        arguments = [x[:tokens].contiguous(), CODES[dtype], tokens, bitmap, values]
        arguments += [CODES[dtype], offsets, values.numel(), some_bias, rows, cols, y]
        assert driver.run("sparse_gemv", *arguments, seed=tokens) == 0
        assert_within_bound(y, x[:tokens], dense, some_bias)
        if some_bias is not None:
            first = y[:1] if first is None else first
            assert_same_bits(y[:1], first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
# One row; a tail of rows and columns; nothing and nearly all pruned; more steps than warps, which
# then go through several each.
@pytest.mark.parametrize(
    ("rows", "cols", "sparsity"),
    [(1, 8, 0.0), (33, 200, 0.5), (17, 1096, 0.0), (40, 1032, 0.97), (19, 4168, 0.5)],
)
def test_sparse_gemv_by_tensor_cores(
    driver: Driver, rows: int, cols: int, sparsity: float, dtype: torch.dtype
) -> None:
    weight, bitmap = sparse_weight(rows, cols, sparsity)
    check_sparse_by_tensor_cores(driver, weight, bitmap, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
# Columns that end within a step, a lane's share, and one (where rows do not begin at chunks).
@pytest.mark.parametrize(("rows", "cols"), [(35, 2208), (16, 64), (1, 1040), (20, 1064), (1, 72)])
def test_sparse_gemv_2_of_4_by_tensor_cores(
    driver: Driver, rows: int, cols: int, dtype: torch.dtype
) -> None:
    weight = randn(rows, cols, seed=141)
    bitmap = ops.prune_select_nm(weight, torch.ones(cols), 2, 4)
    check_sparse_by_tensor_cores(driver, weight, bitmap, dtype)


def test_sparse_gemv_of_one_row_that_is_not_2_of_4(driver: Driver) -> None:
    """Also where the number of values is the same."""
    weight = randn(32, 1088, seed=142)
    bitmap = ops.prune_select_nm(weight, torch.ones(1088), 2, 4)
    bitmap[20, 100] = 0b01110100  # 1 and 3 of 4
    check_sparse_by_tensor_cores(driver, weight, bitmap, torch.bfloat16)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_sparse_gemv_of_inputs_that_are_not_finite(driver: Driver, bad: float) -> None:
    """They reach outputs of their own token alone, and at least the rows that keep their column."""
    weight, bitmap = sparse_weight(24, 200, 0.5)
    values, offsets, dense = sparse_values(weight, bitmap, torch.float16)
    x = randn(3, 200, seed=150).half()
    outputs = []
    for _ in range(2):
        y = poisoned(3, 24, dtype=torch.float16)
        arguments = [x, CODES[x.dtype], 3, bitmap, values, CODES[x.dtype], offsets, values.numel()]
        assert driver.run("sparse_gemv", *arguments, None, 24, 200, y, seed=2) == 0
        outputs.append(y)
        x[1, 60] = bad
    assert_same_bits(outputs[0][::2], outputs[1][::2])
    assert not outputs[1][1, dense[:, 60] != 0].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values_dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols", "sparsity"), SPARSE_SHAPES[:3] + SPARSE_SHAPES[4:])
def test_sparse_gemv(
    driver: Driver,
    rows: int,
    cols: int,
    sparsity: float,
    dtype: torch.dtype,
    values_dtype: torch.dtype,
) -> None:
    weight, bitmap = sparse_weight(rows, cols, sparsity)
    values, offsets, dense = sparse_values(weight, bitmap, values_dtype)
    x, bias = randn(16, cols, seed=150).to(dtype), randn(rows, seed=151).to(dtype)
    results = {}
    for tokens in (1, 3, 16):
        y = poisoned(tokens, rows, dtype=dtype)
        some_bias = bias if tokens == 3 else None
        arguments = [x[:tokens].contiguous(), CODES[dtype], tokens, bitmap, values]
        arguments += [CODES[values_dtype], offsets, values.numel(), some_bias, rows, cols, y]
        assert driver.run("sparse_gemv", *arguments, seed=tokens % 4) == 0
        assert_within_bound(y, x[:tokens], dense, some_bias)
        results[tokens] = y
    assert_same_bits(results[16][:1], results[1])


LIES = (-(2**31), -1, 10**6, 2**31 - 1)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize(("dtype", "cols"), [(torch.float16, 200), (torch.float32, 70)])
def test_no_content_makes_kernels_read_elsewhere(
    driver: Driver, dtype: torch.dtype, cols: int, pattern: str
) -> None:
    """By tensor cores and by rows; the sanitizer would end the driver."""
    weight, bitmap = sparse_weight(24, cols, 0.5)
    if pattern == "2:4":
        cols -= cols % 8
        weight = weight[:, :cols].contiguous()
        bitmap = ops.prune_select_nm(weight, torch.ones(cols), 2, 4)
    values, offsets, _ = sparse_values(weight, bitmap, dtype)
    x = randn(3, cols, seed=150).to(dtype)
    lying = [(bitmap.clone().fill_(255), values, offsets), (bitmap, values[:9].clone(), offsets)]
    for place in LIES:
        for index in (0, 5, 23, 24):
            lying.append(
                (bitmap, values, offsets.clone().index_fill_(0, torch.tensor(index), place))
            )
    for some_bits, some_values, some_offsets in lying:
        sparse = (some_bits, some_values, CODES[dtype], some_offsets, some_values.numel())
        y, out = poisoned(3, 24, dtype=dtype), poisoned(24, cols, dtype=dtype)
        arguments = [x, CODES[dtype], 3, *sparse, None, 24, cols, y]
        assert driver.run("sparse_gemv", *arguments) == 0
        arguments = [*sparse, 24, cols, 0, 24, out, CODES[dtype], cols]
        assert driver.run("sparse_dequantize", *arguments) == 0
        packed = some_values.clone()
        arguments = [weight.to(dtype), CODES[dtype], 24, cols, cols, some_bits, some_offsets]
        assert driver.run("sparse_pack", *arguments, packed.numel(), packed) == 0
