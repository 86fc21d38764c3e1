"""sparse_gemv.h: sparse_gemv for few tokens, sparse_linear for any number of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nowag_ext import _cpu
from nowag_ext.ops.checks import DTYPES, check_aligned, dtype_code, require, same_device
from nowag_ext.ops.linear import (
    check_linear,
    tiled_linear,
    tiled_linear_grad,
)
from nowag_ext.ops.linear_autograd import register_linear_autograd
from nowag_ext.ops.registry import KernelCall, backend_for, operation
from nowag_ext.ops.sparse_pack import check_sparse, dequantize_sparse_rows, refused_offsets

MAX_TOKENS: int = _cpu.sparse_gemv_max_tokens
_WEIGHT = "Tensor bitmap, Tensor values, Tensor row_offsets"


def _sparse_linear_fake(
    x: Tensor, bitmap: Tensor, values: Tensor, row_offsets: Tensor, bias: Tensor | None = None
) -> Tensor:
    same_device(bitmap.device, x=x, bias=bias)
    return x.new_empty((*x.shape[:-1], row_offsets.shape[0] - 1))


def _launch(
    x: Tensor, tokens: int, sparse: tuple[Tensor, Tensor, Tensor], rows: int, bias: Tensor | None
) -> Tensor:
    bitmap, values, row_offsets = sparse
    y = x.new_empty((*x.shape[:-1], rows))
    if tokens:
        x_at = x.data_ptr()
        if x_at % x.element_size():
            check_aligned(x, "x")
        backend, queue = backend_for(x)
        try:
            backend.sparse_gemv(
                x_at, DTYPES[x.dtype], tokens, bitmap.data_ptr(), values.data_ptr(),
                DTYPES[values.dtype], row_offsets.data_ptr(), values.numel(),
                bias.data_ptr() if bias is not None else 0, rows, x.shape[-1], y.data_ptr(), queue,
            )  # fmt: skip
        except ValueError as error:
            raise refused_offsets(row_offsets, values) from error
    return y


def run_sparse_gemv(
    x: Tensor, bitmap: Tensor, values: Tensor, row_offsets: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x W^T + bias by the few-token kernel: x [..., in_features], at most 16 tokens."""
    cols = x.shape[-1] if x.dim() else 0
    rows = check_sparse(bitmap, values, row_offsets, cols)
    x, tokens, bias = check_linear(x, bias, rows, cols, bitmap)
    require(tokens <= MAX_TOKENS, f"sparse_gemv takes at most {MAX_TOKENS} tokens, not {tokens}.")
    return _launch(x, tokens, (bitmap, values, row_offsets), rows, bias)


def sparse_linear_call(calls: Sequence[tuple[Tensor, Sequence[Any]]]) -> KernelCall | None:
    """As ``vq_linears_call``, of one call of sparse_linear."""
    ((y, (x, bitmap, values, row_offsets, *biases)),) = calls
    bias = biases[0] if biases else None
    cols, rows = x.shape[-1], row_offsets.shape[0] - 1
    tokens = x.numel() // cols
    tensors = [x, bitmap, values, row_offsets, *([] if bias is None else [bias])]
    if not 0 < tokens <= MAX_TOKENS or not all(one.is_contiguous() for one in tensors):
        return None
    arguments = (
        x.data_ptr(), DTYPES[x.dtype], tokens, bitmap.data_ptr(), values.data_ptr(),
        DTYPES[values.dtype], row_offsets.data_ptr(), values.numel(),
        0 if bias is None else bias.data_ptr(), rows, cols, y.data_ptr(),
    )  # fmt: skip
    return KernelCall(_cpu.sparse_gemv, arguments, [*tensors, y])


sparse_gemv = operation(
    f"sparse_gemv(Tensor x, {_WEIGHT}, Tensor? bias=None) -> Tensor", _sparse_linear_fake
)(run_sparse_gemv)


@operation(f"sparse_linear(Tensor x, {_WEIGHT}, Tensor? bias=None) -> Tensor", _sparse_linear_fake)
def sparse_linear(
    x: Tensor, bitmap: Tensor, values: Tensor, row_offsets: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x W^T + bias for x [..., in_features], any number of tokens; with gradients."""
    cols = x.shape[-1] if x.dim() else 0
    sparse = (bitmap, values, row_offsets)
    rows = check_sparse(*sparse, cols)
    x, tokens, bias = check_linear(x, bias, rows, cols, bitmap)
    if tokens <= MAX_TOKENS:
        return _launch(x, tokens, sparse, rows, bias)
    return tiled_linear(
        x,
        bias,
        rows,
        lambda begin, end, out: dequantize_sparse_rows(sparse, cols, begin, end, out),
    )


def _sparse_linear_grad_fake(
    grad_y: Tensor, bitmap: Tensor, values: Tensor, row_offsets: Tensor, cols: int
) -> Tensor:
    return grad_y.new_empty((*grad_y.shape[:-1], cols))


@operation(
    f"sparse_linear_grad(Tensor grad_y, {_WEIGHT}, SymInt cols) -> Tensor",
    _sparse_linear_grad_fake,
)
def sparse_linear_grad(
    grad_y: Tensor, bitmap: Tensor, values: Tensor, row_offsets: Tensor, cols: int
) -> Tensor:
    """grad_y W, the gradient of sparse_linear's x: grad_y [..., out_features]."""
    sparse = (bitmap, values, row_offsets)
    rows = check_sparse(*sparse, cols)
    dtype_code(grad_y, "grad_y")
    if grad_y.dim() == 0 or grad_y.shape[-1] != rows:
        raise ValueError(
            f"grad_y must have {rows} features in its last dimension, not {tuple(grad_y.shape)}."
        )
    same_device(bitmap.device, grad_y=grad_y)
    return tiled_linear_grad(
        grad_y,
        cols,
        lambda begin, end, out: dequantize_sparse_rows(sparse, cols, begin, end, out),
    )


register_linear_autograd(sparse_linear, sparse_linear_grad, lambda x: (x.shape[-1],))
