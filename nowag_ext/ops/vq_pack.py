"""vq_pack.h: codes to and from the packed form, and to dense rows."""

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
from nowag_ext.ops.format import MAX_CODE_BITS, MAX_SUBVECTOR, packed_shape
from nowag_ext.ops.registry import backend_for, backend_of, operation


def _pack_codes_fake(codes: Tensor, code_bits: int) -> Tensor:
    return codes.new_empty(
        packed_shape(codes.shape[0], codes.shape[1], 1, code_bits), dtype=torch.uint8
    )


@operation("pack_codes(Tensor codes, int code_bits) -> Tensor", _pack_codes_fake)
def pack_codes(codes: Tensor, code_bits: int) -> Tensor:
    """uint16 codes [rows, P] to packed uint8; raises on a code of code_bits bits or more."""
    require(
        codes.dim() == 2 and codes.numel() > 0,
        f"codes must be a non-empty matrix, not of shape {tuple(codes.shape)}.",
    )
    check(codes, "codes", torch.uint16, tuple(codes.shape))
    require(
        1 <= code_bits <= MAX_CODE_BITS,
        f"code_bits must be from 1 to {MAX_CODE_BITS}, not {code_bits}.",
    )
    packed = _pack_codes_fake(codes, code_bits)
    if codes.is_cuda:  # its launcher cannot wait for an answer, so that this has to
        largest = int(codes.to(torch.int32).max())
        require(largest < 2**code_bits, f"code {largest} does not fit into {code_bits} bits.")
    backend, queue = backend_of(codes.device)
    rows, positions = codes.shape
    backend.pack_codes(codes.data_ptr(), rows, positions, code_bits, packed.data_ptr(), queue)
    return packed


def _unpack_codes_fake(packed: Tensor, rows: int) -> Tensor:
    return packed.new_empty((rows, packed.shape[1]), dtype=torch.uint16)


@operation("unpack_codes(Tensor packed, int rows) -> Tensor", _unpack_codes_fake)
def unpack_codes(packed: Tensor, rows: int) -> Tensor:
    """Packed uint8 codes to uint16 [rows, P]."""
    require(packed.dim() == 3, f"packed codes have 3 dimensions, not {packed.dim()}.")
    _, positions, tile_bytes = packed.shape
    check(packed, "packed codes", torch.uint8, packed_shape(rows, positions, 1, tile_bytes // 4))
    codes = _unpack_codes_fake(packed, rows)
    backend, queue = backend_of(packed.device)
    backend.unpack_codes(
        packed.data_ptr(), rows, positions, tile_bytes // 4, codes.data_ptr(), queue
    )
    return codes


VqSizes = tuple[int, int, int, int]
_VQ_SIZES: dict[tuple[Any, ...], VqSizes] = {}


def vq_sizes(codes: Tensor, codebook: Tensor, row_norms: Tensor, col_norms: Tensor) -> VqSizes:
    """(rows, cols, d, code_bits) of a VQ weight whose shapes, dtypes and devices agree.

    Run for every token of every layer: what depends on shapes, dtypes and devices is checked once
    for each combination of them, and remembered.
    """
    vq = (codes, codebook, row_norms, col_norms)
    on_cpu = codes.is_cpu and codebook.is_cpu and row_norms.is_cpu and col_norms.is_cpu
    key = (
        codes.shape, codebook.shape, row_norms.shape, col_norms.shape,
        codes.dtype, codebook.dtype, row_norms.dtype, col_norms.dtype,
        None if on_cpu else tuple(tensor.device for tensor in vq),
    )  # fmt: skip
    sizes = _VQ_SIZES.get(key)
    if sizes is None:
        sizes = _VQ_SIZES[key] = _check_vq(*vq)
    if not (
        codes.is_contiguous()
        and codebook.is_contiguous()
        and row_norms.is_contiguous()
        and col_norms.is_contiguous()
    ):
        raise ValueError("codes, codebook, row_norms and col_norms must be contiguous.")
    if codes.is_cuda:
        check_words("codes", codes.data_ptr(), codes.shape[2])
        check_words("codebook", codebook.data_ptr(), 4)
    return sizes


def _check_vq(codes: Tensor, codebook: Tensor, row_norms: Tensor, col_norms: Tensor) -> VqSizes:
    require(
        codes.dim() == 3 and codebook.dim() == 2,
        f"codes must have 3 dimensions and codebook 2, not {codes.dim()} and {codebook.dim()}.",
    )
    rows, cols = row_norms.numel(), col_norms.numel()
    d, code_bits = codebook.shape[1], codes.shape[2] // 4
    require(
        1 <= d <= MAX_SUBVECTOR and 1 <= code_bits <= MAX_CODE_BITS and rows > 0 and cols > 0,
        f"d must be from 1 to {MAX_SUBVECTOR}, code bits from 1 to {MAX_CODE_BITS} and the shape "
        f"not empty, not {d}, {code_bits} and {(rows, cols)}.",
    )
    check(codes, "codes", torch.uint8, packed_shape(rows, cols, d, code_bits))
    check(codebook, "codebook", torch.float16, (2**code_bits, d))
    check(row_norms, "row_norms", torch.float16, (rows,))
    check(col_norms, "col_norms", torch.float16, (cols,))
    same_device(codes.device, codebook=codebook, row_norms=row_norms, col_norms=col_norms)
    return rows, cols, d, code_bits


def check_vq_aligned(
    _codes: Tensor, codebook: Tensor, row_norms: Tensor, col_norms: Tensor
) -> None:
    """Raises where one of the float16 tensors of a weight does not begin at a whole element."""
    check_aligned(codebook, "codebook")
    check_aligned(row_norms, "row_norms")
    check_aligned(col_norms, "col_norms")


def dequantize_vq_rows(
    vq: tuple[Tensor, Tensor, Tensor, Tensor],
    sizes: tuple[int, int, int, int],
    begin: int,
    end: int,
    out: Tensor,
) -> None:
    """Writes rows [begin, end) as dense values into the first rows of ``out``."""
    check_vq_aligned(*vq)
    codes, codebook, row_norms, col_norms = vq
    backend, queue = backend_of(out.device)
    backend.vq_dequantize(
        codes.data_ptr(), codebook.data_ptr(), row_norms.data_ptr(), col_norms.data_ptr(), *sizes,
        begin, end, out.data_ptr(), DTYPES[out.dtype], out.stride(0), queue,
    )  # fmt: skip


def _vq_dequantize_fake(
    codes: Tensor, codebook: Tensor, row_norms: Tensor, col_norms: Tensor, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty((row_norms.shape[0], col_norms.shape[0]), dtype=dtype)


@operation(
    "vq_dequantize(Tensor codes, Tensor codebook, Tensor row_norms, Tensor col_norms, "
    "ScalarType dtype) -> Tensor",
    _vq_dequantize_fake,
)
def vq_dequantize(
    codes: Tensor, codebook: Tensor, row_norms: Tensor, col_norms: Tensor, dtype: torch.dtype
) -> Tensor:
    """The dense weight [out_features, in_features] of a VQ weight."""
    vq = (codes, codebook, row_norms, col_norms)
    sizes = vq_sizes(*vq)
    out = _vq_dequantize_fake(*vq, dtype)
    dtype_code(out, "dtype")
    dequantize_vq_rows(vq, sizes, 0, sizes[0], out)
    return out


def _vq_gather_fake(
    indices: Tensor,
    codes: Tensor,
    codebook: Tensor,
    row_norms: Tensor,
    col_norms: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    same_device(codes.device, indices=indices)
    return codes.new_empty((*indices.shape, col_norms.shape[0]), dtype=dtype)


@operation(
    "vq_gather(Tensor indices, Tensor codes, Tensor codebook, Tensor row_norms, Tensor col_norms, "
    "ScalarType dtype) -> Tensor",
    _vq_gather_fake,
)
def vq_gather(
    indices: Tensor,
    codes: Tensor,
    codebook: Tensor,
    row_norms: Tensor,
    col_norms: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of a VQ weight: int64 or int32 indices [...] to [..., in_features], as vq_dequantize's.

    On the CPU an index that no row has raises IndexError; a GPU takes the nearest that one has.
    """
    vq = (codes, codebook, row_norms, col_norms)
    rows, cols, d, code_bits = vq_sizes(*vq)
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"indices must be torch.int64 or torch.int32, not {indices.dtype}.")
    if not (indices.is_cpu and codes.is_cpu):
        same_device(codes.device, indices=indices)
    out = codes.new_empty((*indices.shape, cols), dtype=dtype)
    dtype_out = dtype_code(out, "dtype")
    codebook_at, rows_at, cols_at = codebook.data_ptr(), row_norms.data_ptr(), col_norms.data_ptr()
    if indices.data_ptr() % indices.itemsize or (codebook_at | rows_at | cols_at) & 1:
        check_aligned(indices, "indices")
        check_vq_aligned(*vq)
    wanted = indices.to(torch.int64).contiguous()
    backend, queue = backend_for(codes)
    try:
        backend.vq_gather(
            codes.data_ptr(), codebook_at, rows_at, cols_at, rows, cols, d, code_bits,
            wanted.data_ptr(), wanted.numel(), out.data_ptr(), dtype_out, queue,
        )  # fmt: skip
    except ValueError:
        if wanted.is_cpu:  # the kernel has looked at each already, and tells no more than that
            outside = wanted[(wanted < 0) | (wanted >= rows)]
            if outside.numel() > 0:
                raise IndexError(
                    f"indices must be from 0 to {rows - 1} in a weight of {rows} rows, not "
                    f"{int(outside[0])}."
                ) from None
        raise
    return out
