"""Packing and dequantising sparse weights on the host SIMT executor (simt_cases.py)."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same_bits
from simt_cases import (
    CODES,
    DTYPES,
    SPARSE_SHAPES,
    needs_compiler,
    poisoned,
    sparse_weight,
)
from simt_host import Driver

from nowag_ext import ops

pytestmark = needs_compiler


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols", "sparsity"), SPARSE_SHAPES)
def test_sparse_pack_and_dequantize(
    driver: Driver, rows: int, cols: int, sparsity: float, dtype: torch.dtype
) -> None:
    weight, bitmap = sparse_weight(rows, cols, sparsity)
    weight = weight.to(dtype)
    offsets = poisoned(rows + 1, dtype=torch.int32)
    assert driver.run("sparse_offsets", bitmap, rows, cols, offsets) == 0
    assert_same_bits(offsets, ops.sparse_offsets(bitmap, cols))
    values = poisoned(int(offsets[-1]), dtype=dtype)
    arguments = [weight, CODES[dtype], rows, cols, cols, bitmap, offsets, len(values), values]
    assert driver.run("sparse_pack", *arguments) == 0
    assert_same_bits(values, ops.sparse_pack(weight, bitmap, offsets, int(offsets[-1])))
    for out_dtype in DTYPES:
        begin, end = rows // 3, rows
        out = poisoned(end - begin, cols, dtype=out_dtype)
        arguments = [bitmap, values, CODES[dtype], offsets, len(values), rows, cols]
        arguments += [begin, end, out]
        assert driver.run("sparse_dequantize", *arguments, CODES[out_dtype], cols) == 0
        want = ops.sparse_dequantize(bitmap, values, offsets, cols, out_dtype)
        assert_same_bits(out, want[begin:end])
