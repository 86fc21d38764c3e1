"""Oracles of normalize.h."""

from __future__ import annotations

from torch import Tensor

EPS = 1e-5


def normalize(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columns, then rows, to unit norm; float64 sums in torch's order, not the pinned one."""
    weight = weight.float()
    col_norms = (weight.double().square().sum(0).sqrt() + EPS).float()
    columns = weight / col_norms
    row_norms = (columns.double().square().sum(1).sqrt() + EPS).float()
    return columns / row_norms[:, None], row_norms, col_norms
