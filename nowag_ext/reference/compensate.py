"""Oracle of nowag_ext/compensate.py: SparseGPT as published, through the inverse, in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Which of a group's weights are kept, bool [rows, columns], from their scores and first column.
Choose = Callable[[Tensor, int], Tensor]


def whole_layer(n_prune: int, in_features: int) -> Choose:
    """Of each block of columns go the lowest scores, up to the layer's share."""

    def choose(scores: Tensor, first: int) -> Tensor:
        last = first + scores.shape[1]
        share = n_prune * last // in_features - n_prune * first // in_features
        keep = torch.ones(scores.numel(), dtype=torch.bool)
        keep[torch.sort(scores.flatten(), stable=True).indices[:share]] = False
        return keep.view(scores.shape)

    return choose


def n_of_m(n: int, m: int) -> Choose:
    """Of each row of a group the m - n lowest scores go."""

    def choose(scores: Tensor, _first: int) -> Tensor:
        lowest = torch.sort(scores, dim=1, stable=True).indices[:, : m - n]
        return torch.ones(scores.shape, dtype=torch.bool).scatter_(1, lowest, False)

    return choose


def feed_back(
    target: Tensor,
    row_norms: Tensor,
    col_norms: Tensor,
    metric: Tensor,
    columns: int,
    choose: Choose,
) -> tuple[Tensor, Tensor]:
    """Values and which are kept: every column's error goes to all later columns at once.

    Args:
        metric: the damped Hessian, [n, n].
        columns: of a group, whose weights are chosen together when its first column is reached.
    """
    w = target.double()
    norms = row_norms.double()[:, None] * col_norms.double()
    upper = torch.linalg.cholesky(torch.linalg.inv(metric.double()), upper=True)
    kept = torch.empty(w.shape, dtype=torch.bool)
    for j in range(w.shape[1]):
        if j % columns == 0:
            group = slice(j, j + columns)
            scores = (w[:, group] / norms[:, group] / upper.diagonal()[group]).square()
            kept[:, group] = choose(scores, j)
        q = w[:, j] * kept[:, j]
        w = w - torch.outer((w[:, j] - q) / upper[j, j], upper[j])
        w[:, j] = q
    return w, kept


def refit(target: Tensor, kept: Tensor, metric: Tensor) -> Tensor:
    """The kept values at which each row's (w - q) metric (w - q)^T is least, by elimination."""
    values = torch.zeros(target.shape, dtype=torch.float64)
    metric = metric.double()
    for w, mask, q in zip(target.double(), kept, values, strict=True):
        lost = metric[mask][:, ~mask] @ w[~mask]
        q[mask] = w[mask] + torch.linalg.solve(metric[mask][:, mask], lost)
    return values
