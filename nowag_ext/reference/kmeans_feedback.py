"""Oracle of kmeans_feedback.h."""

from __future__ import annotations

import torch
from torch import Tensor

from nowag_ext.reference.kmeans import fma, kmeans_assign


def kmeans_feedback(
    x: Tensor, carried: Tensor, factor: Tensor, codebook: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes uint16 [rows, P], errors and carried fp32 [rows, P * d], sums), bit for bit."""
    d = codebook.shape[1]
    errors, carried = x.clone(), carried.clone()
    sums = torch.zeros(len(codebook), d + d * (d + 1) // 2 + 1, dtype=torch.int64)
    codes = []
    for first in range(0, x.shape[1], d):
        here = slice(first, first + d)
        y = _rotated(errors[:, : first + d], factor[: first + d, here], carried[:, here])
        entries = _rotated(codebook, factor[here, here], torch.zeros_like(codebook))
        code = kmeans_assign(y, torch.ones(d), entries)
        chosen = code[:, 0].to(torch.int64)
        sums.index_add_(0, chosen, _summands(y, factor[here, here], scale))
        errors[:, here] -= codebook[chosen]
        carried[:, here] = y - entries[chosen]
        codes.append(code)
    return torch.cat(codes, 1), errors, carried, sums


def _rotated(x: Tensor, factor: Tensor, start: Tensor) -> Tensor:
    total = start
    for column, row in zip(x.T, factor, strict=True):
        total = fma(column[:, None].expand_as(total), row.expand_as(total), total)
    return total


def _summands(y: Tensor, block: Tensor, scale: float) -> Tensor:
    """What each point adds to the sums of its entry, int64 [rows, d + d (d + 1) / 2 + 1]."""
    d = y.shape[1]
    points, v = y.double(), block.double()
    moments = [_sum([points[:, j] * v[a, j] for j in range(a, d)]) for a in range(d)]
    metric = [
        _sum([v[a, j] * v[b, j] for j in range(b, d)]).expand(len(y))
        for a in range(d)
        for b in range(a, d)
    ]
    columns = [(column * scale).round() for column in (*moments, *metric)]
    return torch.stack([*columns, torch.ones(len(y), dtype=torch.float64)], 1).to(torch.int64)


def _sum(terms: list[Tensor]) -> Tensor:
    total = torch.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total
