"""Oracles of sparse_gemv.h."""

from __future__ import annotations

import torch
from torch import Tensor

from nowag_ext.reference.sparse_pack import sparse_dequantize


def sparse_linear(
    x: Tensor, bitmap: Tensor, values: Tensor, row_offsets: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x W^T + bias in float64 throughout, not rounded to x's dtype."""
    weight = sparse_dequantize(bitmap, values, row_offsets, x.shape[-1], torch.float64)
    y = x.double() @ weight.T
    return y if bias is None else y + bias.double()
