"""sparse_pack.h: kept weights to and from the packed form, and to dense rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nowag_ext.ops.checks import (
    DTYPES,
    check,
    check_aligned,
    check_words,
    dtype_code,
    require,
    same_device,
)
from nowag_ext.ops.format import bitmap_shape
from nowag_ext.ops.registry import backend_of, operation


def _sparse_offsets_fake(bitmap: Tensor, cols: int) -> Tensor:
    return bitmap.new_empty(bitmap.shape[0] + 1, dtype=torch.int32)


@operation("sparse_offsets(Tensor bitmap, int cols) -> Tensor", _sparse_offsets_fake)
def sparse_offsets(bitmap: Tensor, cols: int) -> Tensor:
    """Running popcount of a bitmap's rows, int32 [rows + 1]."""
    rows = bitmap.shape[0]
    require(rows > 0 and cols > 0, f"the shape must not be empty, not {(rows, cols)}.")
    check(bitmap, "bitmap", torch.uint8, bitmap_shape(rows, cols))
    offsets = _sparse_offsets_fake(bitmap, cols)
    backend, queue = backend_of(bitmap.device)
    backend.sparse_offsets(bitmap.data_ptr(), rows, cols, offsets.data_ptr(), queue)
    return offsets


def _sparse_pack_fake(weight: Tensor, bitmap: Tensor, row_offsets: Tensor, kept: int) -> Tensor:
    return weight.new_empty(kept)


@operation(
    "sparse_pack(Tensor weight, Tensor bitmap, Tensor row_offsets, SymInt kept) -> Tensor",
    _sparse_pack_fake,
)
def sparse_pack(weight: Tensor, bitmap: Tensor, row_offsets: Tensor, kept: int) -> Tensor:
    """The ``kept`` weights whose bit is set, row by row, with their bits unchanged."""
    dtype = dtype_code(weight, "weight")
    rows, cols = weight.shape
    check(bitmap, "bitmap", torch.uint8, bitmap_shape(rows, cols))
    check(row_offsets, "row_offsets", torch.int32, (rows + 1,))
    same_device(weight.device, bitmap=bitmap, row_offsets=row_offsets)
    if weight.stride(1) != 1 or weight.stride(0) < cols:
        weight = weight.contiguous()
    check_aligned(weight, "weight")
    require(
        int(row_offsets[-1]) == kept, f"row_offsets must end at {kept}, not {int(row_offsets[-1])}."
    )
    values = _sparse_pack_fake(weight, bitmap, row_offsets, kept)
    backend, queue = backend_of(weight.device)
    try:
        backend.sparse_pack(
            weight.data_ptr(), dtype, rows, cols, weight.stride(0), bitmap.data_ptr(),
            row_offsets.data_ptr(), kept, values.data_ptr(), queue,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(
            f"row_offsets must be the running popcount of bitmap's {cols} columns, but differ."
        ) from error
    return values


_SPARSE_ROWS: dict[tuple[Any, ...], int] = {}


def check_sparse(bitmap: Tensor, values: Tensor, row_offsets: Tensor, cols: int) -> int:
    """Number of rows of a sparse weight whose shapes, dtypes and devices agree.

    Run for every token, as ``vq_sizes``, and remembers as much.
    """
    key = (
        bitmap.shape, values.shape, row_offsets.shape, cols,
        bitmap.dtype, values.dtype, row_offsets.dtype,
        bitmap.device, values.device, row_offsets.device,
    )  # fmt: skip
    rows = _SPARSE_ROWS.get(key)
    if rows is None:
        rows = _SPARSE_ROWS[key] = _check_sparse(bitmap, values, row_offsets, cols)
    for tensor in (bitmap, values, row_offsets):
        if not tensor.is_contiguous():
            raise ValueError("bitmap, values and row_offsets must be contiguous.")
    if row_offsets.data_ptr() % 4 or values.data_ptr() % values.element_size():
        check_aligned(row_offsets, "row_offsets")
        check_aligned(values, "values")
    if bitmap.is_cuda:
        check_words("bitmap", bitmap.data_ptr(), bitmap.shape[-1])
    return rows


def _check_sparse(bitmap: Tensor, values: Tensor, row_offsets: Tensor, cols: int) -> int:
    rows = row_offsets.numel() - 1
    require(rows > 0 and cols > 0, f"the shape must not be empty, not {(rows, cols)}.")
    check(bitmap, "bitmap", torch.uint8, bitmap_shape(rows, cols))
    check(row_offsets, "row_offsets", torch.int32, (rows + 1,))
    dtype_code(values, "values")
    require(values.dim() == 1, f"values must be a vector, not of shape {tuple(values.shape)}.")
    same_device(bitmap.device, values=values, row_offsets=row_offsets)
    return rows


def refused_offsets(row_offsets: Tensor, values: Tensor) -> ValueError:
    """What to say where a kernel would not read a weight whose other operands are checked."""
    return ValueError(
        f"row_offsets must ascend from 0 to at most the number of values, {values.numel()}; these "
        f"begin at {int(row_offsets[0])}, end at {int(row_offsets[-1])}, or fall in between."
    )


def dequantize_sparse_rows(
    sparse: tuple[Tensor, Tensor, Tensor], cols: int, begin: int, end: int, out: Tensor
) -> None:
    """Writes rows [begin, end) as dense values into the first rows of ``out``."""
    bitmap, values, row_offsets = sparse
    backend, queue = backend_of(out.device)
    try:
        backend.sparse_dequantize(
            bitmap.data_ptr(), values.data_ptr(), DTYPES[values.dtype], row_offsets.data_ptr(),
            values.numel(), row_offsets.numel() - 1, cols, begin, end, out.data_ptr(),
            DTYPES[out.dtype], out.stride(0), queue,
        )  # fmt: skip
    except ValueError as error:
        raise refused_offsets(row_offsets, values) from error


def _sparse_dequantize_fake(
    bitmap: Tensor, values: Tensor, row_offsets: Tensor, cols: int, dtype: torch.dtype
) -> Tensor:
    return bitmap.new_empty((row_offsets.shape[0] - 1, cols), dtype=dtype)


@operation(
    "sparse_dequantize(Tensor bitmap, Tensor values, Tensor row_offsets, int cols, "
    "ScalarType dtype) -> Tensor",
    _sparse_dequantize_fake,
)
def sparse_dequantize(
    bitmap: Tensor, values: Tensor, row_offsets: Tensor, cols: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight [out_features, in_features] of a sparse weight."""
    rows = check_sparse(bitmap, values, row_offsets, cols)
    out = _sparse_dequantize_fake(bitmap, values, row_offsets, cols, dtype)
    dtype_code(out, "dtype")
    dequantize_sparse_rows((bitmap, values, row_offsets), cols, 0, rows, out)
    return out
