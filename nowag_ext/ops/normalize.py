"""normalize.h: columns, then rows, to unit norm."""

from __future__ import annotations

import torch
from torch import Tensor

from nowag_ext.ops.checks import check_aligned, dtype_code, require
from nowag_ext.ops.registry import backend_of, operation


def _normalize_fake(weight: Tensor) -> tuple[Tensor, ...]:
    rows, cols = weight.shape
    return tuple(
        weight.new_empty(shape, dtype=torch.float32) for shape in ((rows, cols), (rows,), (cols,))
    )


@operation("normalize(Tensor weight) -> (Tensor, Tensor, Tensor)", _normalize_fake)
def normalize(weight: Tensor) -> tuple[Tensor, ...]:
    """Columns, then rows, to unit norm: (normalized fp32, row_norms fp32, col_norms fp32)."""
    dtype = dtype_code(weight, "weight")
    require(
        weight.dim() == 2 and weight.numel() > 0,
        f"weight must be a non-empty matrix, not of shape {tuple(weight.shape)}.",
    )
    if weight.stride(1) != 1 or weight.stride(0) < weight.shape[1]:
        weight = weight.contiguous()
    check_aligned(weight, "weight")
    rows, cols = weight.shape
    out, row_norms, col_norms = outputs = _normalize_fake(weight)
    backend, queue = backend_of(weight.device)
    backend.normalize(
        weight.data_ptr(), dtype, rows, cols, weight.stride(0), out.data_ptr(),
        row_norms.data_ptr(), col_norms.data_ptr(), queue,
    )  # fmt: skip
    return outputs
