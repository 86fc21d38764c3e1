"""Oracle of error feedback on a whole layer: GPTQ's own form, through the inverse, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def feedback(
    points: Tensor, metric: Tensor, codebook: Tensor, order: Tensor, damping: float
) -> tuple[Tensor, Tensor]:
    """(codes int64 [rows, P], quantised points [rows, n]), float64 throughout.

    After position p (block B of columns) all later columns take up its error:
    X_later -= (X_B - Q_B) U_BB^-1 U_B,later, U the upper Cholesky factor of the inverse of the
    damped metric in the order of positions; the entry is the nearest under (U_BB^T U_BB)^-1.

    Args:
        points: [rows, n], n a multiple of d.
        metric: H', [n, n].
        codebook: [K, d].
        order: of positions.
        damping: relative to the mean of the metric's diagonal.
    """
    d = codebook.shape[1]
    columns = (order[:, None] * d + torch.arange(d)).flatten()
    x = points.double()[:, columns]
    damped = metric.double()[columns][:, columns]
    damped = damped + damping * damped.diagonal().mean() * torch.eye(len(damped)).double()
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    codes = torch.empty(len(x), len(order), dtype=torch.int64)
    chosen = torch.empty_like(x)
    for step, position in enumerate(order.tolist()):
        here = slice(step * d, step * d + d)
        block = torch.linalg.inv(upper[here, here])
        distances = ((x[:, None, here] - codebook.double()) @ block).square().sum(-1)
        code = distances.argmin(1)
        chosen[:, here] = codebook.double()[code]
        error = (x[:, here] - chosen[:, here]) @ block
        x[:, here.stop :] -= error @ upper[here, here.stop :]
        codes[:, position] = code
    quantised = torch.empty_like(chosen)
    quantised[:, columns] = chosen
    return codes, quantised
