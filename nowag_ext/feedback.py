"""VQ by error feedback: codes for a codebook under the full Hessian of a layer's inputs.

Positions are settled one after another, the most important first; each takes up in its own metric
what those before it missed (the idea of OBQ, GPTQ and GPTVQ, on NoWag's normalised weights). Codes
stay where they are stored, so the order costs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nowag_ext import ops
from nowag_ext.hessian import energy, factorise, product, sum_of_squares
from nowag_ext.normalize import half_norms, normalized_by, sampled

# Columns that one call of the kernel settles: what lies before them comes in by a matrix product.
_BLOCK_COLUMNS = 128

# Sums of a codebook's least squares have this many bits after the point, for a metric whose mean
# diagonal is 1: with points of up to 2^10, 2^33 weights fit.
_FRACTION_BITS = 18

# Towards the old entry, relative to the metric: an entry of few points stays near where it was.
_RIDGE = 1e-3


def check_device(device: torch.device) -> None:
    """Raises ValueError for a device that has no kernel for error feedback."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"VQ under a Hessian runs on the CPU and on CUDA devices, not on {device}: move the "
            "weight (or the model) there first."
        )


@dataclass(frozen=True)
class Assigned:
    """Codes uint16 [rows, P], and their error: sum e H' e^T / sum x H' x^T over rows."""

    codes: Tensor
    relative_objective: float


class FeedbackPoints:
    """A layer's sub-vectors, and the metric H' = diag(c) H diag(c) that they are settled in.

    Args:
        points: fp32 [rows, in_features], in units of the codebook.
        hessian: E[x x^T], checked, fp32 [in_features, in_features].
        col_norms: c, fp32 [in_features], as stored.
        d: length of a sub-vector.

    Raises:
        ValueError: the Hessian is far from positive semi-definite.
    """

    def __init__(self, points: Tensor, hessian: Tensor, col_norms: Tensor, d: int) -> None:
        self.d = d
        inputs = points.shape[1]
        positions = ops.code_positions(inputs, d)
        importance = hessian.diagonal().double() * col_norms.double().square()
        # By a power of two, which changes no bit, to where float32 neither vanishes nor overflows.
        mean = float(importance.mean())
        unit = 2.0 ** -round(math.log2(mean) / 2) if mean > 0 else 1.0
        col_norms, importance = col_norms * unit, importance * unit**2
        padded = torch.nn.functional.pad(importance, (0, positions * d - inputs))
        self.order = torch.argsort(padded.view(positions, d).sum(1), descending=True, stable=True)
        columns = (self.order[:, None] * d + torch.arange(d, device=points.device)).flatten()
        self._inside = columns < inputs
        factor = factorise(hessian, col_norms, columns)
        self.damping = factor.damping
        self.effective_rank = factor.effective_rank
        self.added = factor.added
        self.upper = factor.upper
        self.mean = float(importance.mean())
        self.points = points[:, columns.clamp(max=inputs - 1)]
        self.points[:, ~self._inside] = 0
        self.energy = energy(points, hessian, col_norms)

    def assign(
        self, codebook: Tensor, sums: EntrySums | None = None, *, last: bool = False
    ) -> Assigned:
        """Codes for a codebook, fp32 [K, d]; adds to ``sums`` what its next entries follow from.

        ``last`` says that the points are not needed again: it saves a copy of them.
        """
        errors = self.points if last else self.points.clone()
        rows, positions = len(errors), self.order.numel()
        codes = torch.empty(rows, positions, dtype=torch.int16, device=errors.device)
        scale = 1.0 if sums is None else sums.scale / self.mean
        total = 0.0
        step = max(1, _BLOCK_COLUMNS // self.d)
        for first in range(0, positions, step):
            here = self.order[first : first + step]
            begin, end = first * self.d, (first + len(here)) * self.d
            carried = product(errors[:, :begin], self.upper[:begin, begin:end])
            chosen = torch.empty(rows, len(here), dtype=torch.uint16, device=errors.device)
            ops.kmeans_feedback(
                errors[:, begin:end], carried, self.upper[begin:end, begin:end], codebook, chosen,
                scale, None if sums is None else sums.sums,
            )  # fmt: skip
            codes[:, here] = chosen.view(torch.int16)
            total += sum_of_squares(carried)
        # The damping belongs to the search, not to the error.
        errors[:, ~self._inside] = 0
        damped = self.added * sum_of_squares(errors)
        error = max(0.0, total - damped)
        relative = error / self.energy if self.energy > 0 else 0.0
        return Assigned(codes.view(torch.uint16), relative)


def shared_points(weight: Tensor, hessian: Tensor, d: int, share: float) -> FeedbackPoints:
    """Sub-vectors of a share of a weight's rows, as a shared codebook has them: sqrt(in) * Wn."""
    _, row_norms, col_norms = ops.normalize(weight)
    norms = half_norms(row_norms / math.sqrt(weight.shape[1]), col_norms)
    points = sampled(normalized_by(weight, norms), share)
    return FeedbackPoints(points, hessian, norms[1].float(), d)


class EntrySums:
    """What the entries of a codebook suit best: sums over the points that feedback gave them.

    Integers, so that layers and threads may add in any order (kmeans_feedback.h). Metrics count in
    units of their layer's mean diagonal, so that every layer weighs by its size.

    Args:
        entries, d: of the codebook.
        weights: of all layers that will add to it.
    """

    def __init__(self, entries: int, d: int, weights: int, device: torch.device) -> None:
        self.d = d
        excess = max(0, math.ceil(math.log2(weights)) - 33)
        self.scale = 2.0 ** (_FRACTION_BITS - excess)
        self.sums = torch.zeros(
            entries, ops.feedback_sums_columns(d), dtype=torch.int64, device=device
        )

    def solve(self, codebook: Tensor) -> Tensor:
        """The entries of the least squares, fp32 [K, d]; those without points stay."""
        d = self.d
        old = codebook.double()
        moments = self.sums[:, :d].double() / self.scale
        row, column = torch.triu_indices(d, d, device=codebook.device)
        metric = old.new_zeros(len(old), d, d)
        triangle = self.sums[:, d:-1].double() / self.scale
        metric[:, row, column] = triangle
        metric[:, column, row] = triangle
        ridge = _RIDGE * metric.diagonal(dim1=1, dim2=2).mean(1)
        metric.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
        empty = (self.sums[:, -1] == 0) | ~(ridge > 0)
        metric[empty] = torch.eye(d, dtype=old.dtype, device=old.device)
        moments = torch.where(empty[:, None], old, moments + ridge[:, None] * old)
        return torch.linalg.solve(metric, moments).float().contiguous()
