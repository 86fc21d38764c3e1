"""The Hessian of a layer's inputs, E[x x^T], and the triangular factor that error feedback needs.

With the damped Hessian H = V V^T, V upper triangular, a row's error is |(w - q) V|^2. Component
j of (w - q) V depends on the columns up to j alone, so columns are settled one after another: what
those before j have done wrong is carried to j, and V_jj^2 is what an error of column j still costs
once all later columns make up for it as well as they can. That is the feedback of OBQ and GPTQ
(Frantar et al., 2022), whose update is through H^-1 = U^T U with U = V^-1, without an inverse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nowag_ext.normalize import as_tensor

# Added to the diagonal, relative to its mean, before factorising; 0.03 to 0.3 end alike.
DAMPING = 0.1

# What a matrix that is symmetric but for rounding may differ by from its transpose, relative to its
# largest diagonal element.
_ASYMMETRY = 1e-3

# A positive semi-definite matrix needs none but the first; after so many doublings it was not one.
_MOST_DOUBLINGS = 10

# Rows, or columns, that a product takes at once: what it holds beside its operands is small.
_PART_ROWS = 512
_PART_ELEMENTS = 1 << 20
_PART_COLUMNS = 512
_PRODUCT_ROWS = 4096

# Columns of Cholesky's factor that are finished at once: as fast as LAPACK's whole where that takes
# long; up to so many columns it takes less, and a fraction of a second.
_PANEL_COLUMNS = 256
_AT_ONCE = 2048


@dataclass(frozen=True)
class Factor:
    """V with V V^T = M + damping * mean(diag M) * I, for a metric M in some order of columns.

    Attributes:
        upper: V, fp32 [n, n], 0 below the diagonal.
        damping: relative to the mean of M's diagonal.
        added: what was added to every element of M's diagonal.
        effective_rank: of M, its trace squared over its squared Frobenius norm: n where all
            directions have the same energy, 1 where one has it all.
    """

    upper: Tensor
    damping: float
    added: float
    effective_rank: float


def as_hessian(hessian: Any, in_features: int, device: torch.device) -> Tensor:
    """E[x x^T] of a layer's inputs as fp32 [in_features, in_features]; raises if it is unfit."""
    hessian = as_tensor(hessian, "hessian")
    if hessian.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"hessian must be of dtype float32 or float64, not {hessian.dtype}.")
    if tuple(hessian.shape) != (in_features, in_features):
        raise ValueError(
            f"hessian must have shape ({in_features}, {in_features}), one row and column an input "
            f"of W, not {tuple(hessian.shape)}."
        )
    if hessian.device != device:
        raise ValueError(f"hessian must be on W's device {device}, not on {hessian.device}.")
    hessian = hessian.detach().float()
    if not all(torch.isfinite(extreme) for extreme in hessian.aminmax()):  # NaN propagates
        bad = int((~torch.isfinite(hessian)).sum())
        raise ValueError(f"hessian must be finite, but {bad} of its elements are NaN or infinite.")
    diagonal = hessian.diagonal()
    if (diagonal < 0).any():
        raise ValueError(
            f"hessian must be positive semi-definite, but its diagonal holds {diagonal.min():.3g}."
        )
    largest = float(diagonal.max())
    if largest == 0:
        raise ValueError(
            "hessian must not have a diagonal of zeros: no input was ever other than 0."
        )
    asymmetry = max(
        float((rows - hessian[:, first : first + _PART_ROWS].T).abs().max())
        for first, rows in zip(
            range(0, in_features, _PART_ROWS), hessian.split(_PART_ROWS), strict=True
        )
    )
    if asymmetry > _ASYMMETRY * largest:
        raise ValueError(
            "hessian must be symmetric, but an element differs from its mirror image by "
            f"{asymmetry:.3g}, where the largest diagonal element is {largest:.3g}."
        )
    return hessian


def corrected(weight: Tensor, extra: Any) -> Tensor:
    """The target of a compression, fp32 [out, in]: the weight, plus a correction if there is one.

    Raises:
        TypeError: extra is not a floating-point tensor or array.
        ValueError: it is of another shape or device than the weight, or not finite.
    """
    if extra is None:
        return weight.float()
    if isinstance(extra, np.ndarray):
        extra = torch.from_numpy(np.ascontiguousarray(extra))
    if not isinstance(extra, Tensor) or not extra.is_floating_point():
        kind = extra.dtype if isinstance(extra, Tensor) else type(extra).__name__
        raise TypeError(f"extra must be a floating-point tensor or array, not {kind}.")
    if extra.shape != weight.shape or extra.device != weight.device:
        raise ValueError(
            f"extra must have W's shape and device, {tuple(weight.shape)} on {weight.device}, "
            f"not {tuple(extra.shape)} on {extra.device}."
        )
    if not all(torch.isfinite(extreme) for extreme in extra.aminmax()):  # NaN propagates
        bad = int((~torch.isfinite(extra)).sum())
        raise ValueError(f"extra must be finite, but {bad} of its elements are NaN or infinite.")
    return weight.float() + extra.detach().float()


def factorise(hessian: Tensor, scale: Tensor, order: Tensor, damping: float = DAMPING) -> Factor:
    """Factor of diag(scale) H diag(scale), rows and columns in the order given, damped.

    The damping is doubled until the factorisation succeeds.

    Args:
        hessian: checked (``as_hessian``), fp32 [n, n].
        scale: fp32 [n], by column of the Hessian.
        order: int64 [m], which column comes first, and so on; n and beyond are padding, for which
            the factor has rows and columns of zeros.

    Raises:
        ValueError: the matrix is far from positive semi-definite.
    """
    # Cholesky's factor of the matrix in reverse order is V in reverse.
    backwards = order.flip(0)
    padding = (backwards >= len(hessian)).nonzero().flatten()
    backwards = backwards.clamp(max=len(hessian) - 1)
    rank = 0.0
    for doublings in range(_MOST_DOUBLINGS):
        metric = _gathered(hessian, scale, backwards)
        metric[padding] = 0
        metric[:, padding] = 0
        diagonal = metric.diagonal()
        trace = float(diagonal.double().sum())
        mean = trace / len(hessian)
        if doublings == 0:
            squares = sum_of_squares(metric)
            rank = trace**2 / squares if squares > 0 else 0.0
        relative = damping * 2**doublings
        diagonal.add_(relative * mean)
        diagonal[padding] = 1
        if cholesky_(metric):
            diagonal[padding] = 0
            _reverse(metric.view(-1))
            return Factor(metric, relative, relative * mean, rank)
    raise ValueError(
        "hessian must be positive semi-definite: it could not be factorised, even with "
        f"{relative:.3g} times the mean of its diagonal added."
    )


def cholesky_(matrix: Tensor) -> bool:
    """Cholesky's factor in place of a symmetric matrix, lower triangular, 0 above the diagonal.

    Panel by panel, between which signals are answered: LAPACK alone takes half a minute for 11,000
    columns. False if the matrix is not positive definite, and of no use any more.
    """
    size = len(matrix)
    step = size if size <= _AT_ONCE else _PANEL_COLUMNS
    for first in range(0, size, step):
        end = min(first + step, size)
        matrix[first:end, end:] = 0
        panel = matrix[first:, first:end]
        panel.addmm_(matrix[first:, :first], matrix[first:end, :first].mT, alpha=-1)
        square, below = panel.split([end - first, size - end])
        factor, info = torch.linalg.cholesky_ex(square)
        if int(info) != 0:
            return False
        square.copy_(factor)
        below.copy_(torch.linalg.solve_triangular(factor, below.mT, upper=False).mT)
    return bool(torch.isfinite(matrix.diagonal()).all())


def sum_of_squares(matrix: Tensor) -> float:
    """In float64, some rows at a time."""
    return sum(float(rows.double().square().sum()) for rows in matrix.split(_PART_ROWS))


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, a part of its rows and columns at a time: signals are answered in between."""
    result = left.new_empty(left.shape[0], right.shape[1])
    for rows, out in zip(left.split(_PRODUCT_ROWS), result.split(_PRODUCT_ROWS), strict=True):
        for first in range(0, right.shape[1], _PART_COLUMNS):
            here = slice(first, first + _PART_COLUMNS)
            torch.mm(rows, right[:, here], out=out[:, here])
    return result


def _gathered(hessian: Tensor, scale: Tensor, order: Tensor) -> Tensor:
    """diag(scale) H diag(scale), rows and columns in an order, without another copy."""
    metric = hessian.new_empty(len(order), len(order))
    for rows, those in zip(metric.split(_PART_ROWS), order.split(_PART_ROWS), strict=True):
        torch.index_select(hessian[those], 1, order, out=rows)
    metric *= scale[order, None]
    metric *= scale[order]
    return metric


def _reverse(values: Tensor) -> None:
    """The last of a vector's elements first, in place."""
    count = len(values)
    for first in range(0, count // 2, _PART_ELEMENTS):
        end = min(first + _PART_ELEMENTS, count // 2)
        front, back = values[first:end], values[count - end : count - first]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)


def energy(rows: Tensor, hessian: Tensor, scale: Tensor) -> float:
    """sum over rows w of w diag(scale) H diag(scale) w^T, rows fp32 [n, in_features].

    H is symmetric: its blocks above the diagonal count twice, those below are not read.
    """
    total = 0.0
    for part in rows.split(_PART_ROWS):
        scaled = part * scale
        for first in range(0, len(hessian), _PART_COLUMNS):
            here = slice(first, first + _PART_COLUMNS)
            image = scaled[:, here] @ hessian[here, here]
            image.addmm_(scaled[:, :first], hessian[:first, here], alpha=2)
            total += float((image * scaled[:, here]).sum(1, dtype=torch.float64).sum())
    return total


def relative_error(errors: Tensor, weight: Tensor, hessian: Tensor, scale: Tensor) -> float:
    """The energy of a normalised weight's errors over its own, both fp32 [rows, in_features].

    0 where the weight has none: all its inputs were dead.
    """
    whole = energy(weight, hessian, scale)
    return max(0.0, energy(errors, hessian, scale)) / whole if whole > 0 else 0.0
