"""Pruning by error feedback: what is kept makes up for what goes, under the full Hessian.

SparseGPT (Frantar and Alistarh, 2023) with NoWag's score. With the damped Hessian H = V V^T
(hessian.py) and the errors e = w - q of the columns before block B settled, the columns of B are at
their best, given that all later ones may still change, at w_B + (sum over i before B of e_i V_iB)
V_BB^-1: SparseGPT's updated weights. Pruning column j when only later ones are left then costs
(its value * V_jj)^2. The score is this in NoWag's units, (value / (r_i c_j))^2 V_jj^2: NoWag's
saliency of the value, with V_jj^2 in place of h_j.

In the feedback no column makes up for a later one. So each row's kept weights are refit at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nowag_ext import ops
from nowag_ext.hessian import factorise, product

# Columns settled one after another; what lies before them comes in by one matrix product.
_BLOCK_COLUMNS = 128

# Rows refit at once: enough for a matrix product, few enough for their seven copies.
_REFIT_ROWS = 1024

# Iterations of conjugate gradients at most, and what each must take off the error that is left for
# another: on real layers 6 to 9 are done, and on other text the rest would change nothing.
_REFIT_ITERATIONS = 10
_WORTHWHILE = 0.01

# A row is done once its squared residual has fallen by so much: float32 cannot tell more.
_CONVERGED = 1e-12


@dataclass(frozen=True)
class Choice:
    """Which weights are kept, decided group by group of columns as they are when it is reached.

    Attributes:
        columns: of a group; the last may be narrower.
        bitmap: that of a group's kept weights (format.h), from its values over NoWag's norms, fp32
            [rows, columns], its h, fp32 [columns], and the number of its first column.
    """

    columns: int
    bitmap: Callable[[Tensor, Tensor, int], Tensor]


def whole_layer(n_prune: int, in_features: int) -> Choice:
    """Of each block the lowest weights go, so that up to its end n_prune's share has gone."""

    def bitmap(w: Tensor, h: Tensor, first: int) -> Tensor:
        before, after = (
            n_prune * columns // in_features for columns in (first, first + w.shape[1])
        )
        return ops.prune_select(w, h, after - before)

    return Choice(_BLOCK_COLUMNS, bitmap)


def n_of_m(n: int, m: int) -> Choice:
    """Of every m columns the m - n lowest weights of a row go."""
    return Choice(m, lambda w, h, first: ops.prune_select_nm(w, h, n, m))


class Compensated(NamedTuple):
    """Values, fp32 [rows, n], 0 where pruned; which are kept, bool [rows, n]; of the Hessian what
    ``hessian.Factor`` says."""

    values: Tensor
    kept: Tensor
    damping: float
    effective_rank: float


def compensate(
    target: Tensor, row_norms: Tensor, col_norms: Tensor, hessian: Tensor, choice: Choice
) -> Compensated:
    """Prunes a target by error feedback and refits what is kept.

    Matrix products are torch's, whose bits may depend on the number of threads.

    Args:
        target: fp32 [rows, n], finite.
        row_norms, col_norms: NoWag's of the target, fp32 [rows] and [n], positive.
        hessian: E[x x^T], checked (``as_hessian``), fp32 [n, n].
        choice: ``whole_layer(...)`` or ``n_of_m(...)``.

    Raises:
        ValueError: the Hessian is far from positive semi-definite.
    """
    # Symmetric to the bit, and in units of its mean, so that a positive factor does not matter.
    metric = hessian + hessian.T
    metric /= 2 * float(hessian.diagonal().double().mean())
    inputs = torch.arange(len(metric), device=metric.device)
    factor = factorise(metric, torch.ones_like(col_norms), inputs)
    values, kept = feed_back(target, row_norms, col_norms, factor.upper, choice)
    metric.diagonal().add_(factor.added)
    refit(target, values, kept, metric)
    return Compensated(values, kept, factor.damping, factor.effective_rank)


def feed_back(
    target: Tensor, row_norms: Tensor, col_norms: Tensor, upper: Tensor, choice: Choice
) -> tuple[Tensor, Tensor]:
    """What ``compensate`` returns, before the refit; upper is V, fp32 [n, n]."""
    rows, n = target.shape
    # Transposed, so that a column of the weight is contiguous.
    errors = target.new_empty(n, rows)
    kept = torch.empty(rows, n, dtype=torch.bool, device=target.device)
    step = _BLOCK_COLUMNS // choice.columns * choice.columns
    for first in range(0, n, step):
        here = slice(first, min(first + step, n))
        block = upper[here, here]
        eye = torch.eye(len(block), dtype=block.dtype, device=block.device)
        inverse = torch.linalg.solve_triangular(block, eye, upper=True)
        carried = product(upper[:first, here].T, errors[:first])
        before = target[:, here].T.contiguous()
        now = before + inverse.T @ carried
        h = block.diagonal().square()
        kept[:, here] = _settle(now, row_norms, col_norms[here], h, inverse, choice, first)
        errors[here] = before - now
    values = target - errors.T
    return values.masked_fill_(~kept, 0), kept


def _settle(
    now: Tensor,
    row_norms: Tensor,
    col_norms: Tensor,
    h: Tensor,
    inverse: Tensor,
    choice: Choice,
    first: int,
) -> Tensor:
    """Prunes a block in place, now fp32 [columns, rows]; which are kept, bool [rows, columns]."""
    # Row k: what the later columns change by, against each unit that goes of column k.
    spread = inverse / inverse.diagonal()[:, None]
    kept = []
    for begin in range(0, len(now), choice.columns):
        group = slice(begin, min(begin + choice.columns, len(now)))
        w = now[group] / col_norms[group, None]
        w /= row_norms
        bitmap = choice.bitmap(w.T.contiguous(), h[group], first + begin)
        kept.append(_bits(bitmap, len(w)))
        gone = ~kept[-1].T.contiguous()
        for column, going in enumerate(gone, begin):
            lost = now[column] * going
            now[column] -= lost
            now[column + 1 :].addr_(spread[column, column + 1 :], lost, alpha=-1)
    return torch.cat(kept, 1)


def _bits(bitmap: Tensor, columns: int) -> Tensor:
    """The first bits of each row of a bitmap (format.h) as bool [rows, columns]."""
    used = bitmap[:, : -(-columns // 8), None]
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmap.device)
    return (used >> shifts & 1).flatten(1)[:, :columns].bool()


def refit(
    target: Tensor,
    values: Tensor,
    kept: Tensor,
    metric: Tensor,
    iterations: int = _REFIT_ITERATIONS,
    worthwhile: float = _WORTHWHILE,
) -> None:
    """Moves each row's kept values, in place, to where (w - q) metric (w - q)^T is least.

    Conjugate gradients over the kept positions, preconditioned by the metric's diagonal. A row
    whose error they do not lower stays as it was.

    Args:
        target, values: w and q, fp32 [rows, n]; q is 0 where pruned.
        kept: bool [rows, n].
        metric: the damped Hessian, symmetric, fp32 [n, n].
        iterations: at most.
        worthwhile: stop after one that took less than this part off the error that is left.
    """
    parts = (matrix.split(_REFIT_ROWS) for matrix in (target, values, kept))
    for w, q, mask in zip(*parts, strict=True):
        q += _descend(w - q, mask, metric, iterations, worthwhile)


def _descend(
    error: Tensor, mask: Tensor, metric: Tensor, iterations: int, worthwhile: float
) -> Tensor:
    """What to add to the kept values; all fp32 [rows, n]."""
    change = torch.zeros_like(error)
    residual = product(error, metric)
    left = float((residual * error).sum(dtype=torch.float64))
    residual *= mask
    start = residual.clone()
    scaled = residual / metric.diagonal()
    direction = scaled.clone()
    size = (residual * scaled).sum(1)
    enough = _CONVERGED * size
    for _ in range(iterations):
        active = size > enough
        image = product(direction, metric).mul_(mask)
        curvature = (image * direction).sum(1)
        length = torch.where(active & (curvature > 0), size / curvature, 0)
        change.addcmul_(direction, length[:, None])
        residual.addcmul_(image, length[:, None], value=-1)
        taken = float((length * size).sum(dtype=torch.float64))
        left -= taken
        if not taken > worthwhile * left:
            break
        torch.div(residual, metric.diagonal(), out=scaled)
        last, size = size, (residual * scaled).sum(1)
        direction *= torch.where(active, size / last, 0)[:, None]
        direction += scaled
    # By how much the change lowers a row's error, whatever steps it came by.
    gain = (change * (start + residual)).sum(1)
    return change.masked_fill_(~(gain > 0)[:, None], 0)
