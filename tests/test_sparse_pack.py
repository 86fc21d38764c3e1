"""sparse_pack.h against its oracle: all exact."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nowag_ext import ops, reference

pytestmark = pytest.mark.kernel

COLS = [1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 1000, 2051]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def layer(rows: int, cols: int, dtype: torch.dtype, share: float, seed: int = 0) -> Tensor:
    """A weight, its bitmap with about ``share`` kept, its offsets and its values."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator).to(dtype)
    keep = torch.rand(rows, cols, generator=generator) < share
    bitmap = reference.to_bitmap(keep)
    return weight, bitmap, reference.sparse_offsets(bitmap, cols)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98, 1.0])
@pytest.mark.parametrize("cols", COLS)
def test_there_and_back(cols: int, share: float) -> None:
    for dtype in DTYPES:
        weight, bitmap, offsets = layer(5, cols, dtype, share, seed=cols)
        assert_same_bits(ops.sparse_offsets(bitmap, cols), offsets)
        values = ops.sparse_pack(weight, bitmap, offsets, int(offsets[-1]))
        assert_same_bits(values, reference.sparse_pack(weight, bitmap, offsets, int(offsets[-1])))
        for out in DTYPES:
            assert_same_bits(
                ops.sparse_dequantize(bitmap, values, offsets, cols, out),
                reference.sparse_dequantize(bitmap, values, offsets, cols, out),
            )


@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 300),
    share=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_property(rows: int, cols: int, share: float, dtype: torch.dtype, seed: int) -> None:
    weight, bitmap, offsets = layer(rows, cols, dtype, share, seed)
    values = ops.sparse_pack(weight, bitmap, offsets, int(offsets[-1]))
    assert_same_bits(values, weight[reference.from_bitmap(bitmap, cols)])
    dense = ops.sparse_dequantize(bitmap, values, offsets, cols, dtype)
    assert_same_bits(dense, reference.sparse_dequantize(bitmap, values, offsets, cols, dtype))


def test_threads_and_many_rows(threads: int) -> None:
    weight, bitmap, offsets = layer(517, 331, torch.bfloat16, 0.5)
    values = ops.sparse_pack(weight, bitmap, offsets, int(offsets[-1]))
    assert_same_bits(values, weight[reference.from_bitmap(bitmap, 331)])
    dense = ops.sparse_dequantize(bitmap, values, offsets, 331, torch.float32)
    assert_same_bits(
        dense, reference.sparse_dequantize(bitmap, values, offsets, 331, torch.float32)
    )


def test_strided_weight() -> None:
    weight, bitmap, offsets = layer(20, 90, torch.float32, 0.4)
    wide = torch.randn(20, 111)
    wide[:, 4:94] = weight
    assert_same_bits(
        ops.sparse_pack(wide[:, 4:94], bitmap, offsets, int(offsets[-1])),
        ops.sparse_pack(weight, bitmap, offsets, int(offsets[-1])),
    )


def test_values_keep_odd_bits() -> None:
    """NaN payloads, infinities, subnormals and -0 come through as they are."""
    odd = torch.tensor([0x7FA1, 0x7C00, 0x0001, 0x8000, 0x7E00, 0xFC01, 0x83FF, 0x3C00])
    weight = odd.to(torch.int16).repeat(9, 11).view(torch.float16)
    _, bitmap, offsets = layer(9, 88, torch.float16, 0.6)
    values = ops.sparse_pack(weight, bitmap, offsets, int(offsets[-1]))
    assert_same_bits(values, weight[reference.from_bitmap(bitmap, 88)])
    dense = ops.sparse_dequantize(bitmap, values, offsets, 88, torch.float16)
    assert_same_bits(dense, weight.where(reference.from_bitmap(bitmap, 88), 0))


def test_rounding_to_half_is_to_nearest_even() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randint(-(2**31), 2**31, (16, 640), generator=generator, dtype=torch.int64)
    weight = weight.to(torch.int32).view(torch.float32).nan_to_num()
    _, bitmap, offsets = layer(16, 640, torch.float32, 0.7)
    values = ops.sparse_pack(weight, bitmap, offsets, int(offsets[-1]))
    for dtype in (torch.float16, torch.bfloat16):
        assert_same_bits(
            ops.sparse_dequantize(bitmap, values, offsets, 640, dtype),
            weight.where(reference.from_bitmap(bitmap, 640), 0).to(dtype),
        )


def test_ops_refuse() -> None:
    weight, bitmap, offsets = layer(6, 70, torch.float32, 0.5)
    kept = int(offsets[-1])
    with pytest.raises(ValueError, match=rf"row_offsets must end at {kept + 1}, not {kept}"):
        ops.sparse_pack(weight, bitmap, offsets, kept + 1)
    with pytest.raises(ValueError, match=r"bitmap must have shape \(6, 16\), not \(6, 8\)"):
        ops.sparse_offsets(bitmap[:, :8].contiguous(), 70)
    with pytest.raises(TypeError, match=r"row_offsets must be torch\.int32"):
        ops.sparse_dequantize(bitmap, weight.flatten(), offsets.long(), 70, torch.float32)
    with pytest.raises(TypeError, match=r"not torch\.float64"):
        ops.sparse_dequantize(bitmap, weight.flatten(), offsets, 70, torch.float64)


def test_opcheck() -> None:
    weight, bitmap, offsets = layer(6, 70, torch.float16, 0.5)
    kept = int(offsets[-1])
    values = ops.sparse_pack(weight, bitmap, offsets, kept)
    torch.library.opcheck(ops.sparse_offsets, (bitmap, 70))
    torch.library.opcheck(ops.sparse_pack, (weight, bitmap, offsets, kept))
    torch.library.opcheck(
        ops.sparse_dequantize, (bitmap, values, offsets, 70), {"dtype": torch.float32}
    )
