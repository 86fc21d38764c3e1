"""Oracles of vq_gemv.h."""

from __future__ import annotations

from torch import Tensor

from nowag_ext.reference.vq_pack import vq_entries


def vq_linear(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    row_norms: Tensor,
    col_norms: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """x W^T + bias in float64 throughout, not rounded to x's dtype."""
    entries = vq_entries(codes, codebook, row_norms, col_norms).double()
    weight = (row_norms.double()[:, None] * entries) * col_norms.double()
    y = x.double() @ weight.T
    return y if bias is None else y + bias.double()
