"""From a weight and activation norms to what both methods work on: (Wn, norms, importance)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nowag_ext import ops

_NUMPY_DTYPES = (np.dtype(np.float32), np.dtype(np.float16))


@dataclass(frozen=True)
class NormalizedWeight:
    """A checked weight, its normalised form and its importances, all on one device.

    Attributes:
        weight: the weight as given, [out_features, in_features], fp32, fp16 or bf16.
        normalized: Wn, fp32 [out_features, in_features]; weight = row_norms * Wn * col_norms.
        row_norms: fp32 [out_features].
        col_norms: fp32 [in_features].
        importance: h = act_norms^2 / mean(act_norms^2), fp32 [in_features].
    """

    weight: Tensor
    normalized: Tensor
    row_norms: Tensor
    col_norms: Tensor
    importance: Tensor


def as_tensor(value: Any, name: str) -> Tensor:
    """An operand that may be a NumPy array as a tensor; raises TypeError for anything else."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor or a numpy.ndarray, not {type(value).__name__}."
        )
    return value


def as_weight(weight: Any) -> Tensor:
    """A torch or NumPy matrix as a tensor, its dtype unchanged; raises if it is unfit."""
    if isinstance(weight, np.ndarray) and weight.dtype not in _NUMPY_DTYPES:
        raise TypeError(f"W must be float32 or float16 in NumPy, not {weight.dtype}.")
    weight = as_tensor(weight, "W")
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"W must be float32, float16 or bfloat16, not {weight.dtype}.")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(
            "W must be a non-empty matrix [out_features, in_features], "
            f"not of shape {tuple(weight.shape)}."
        )
    return weight.detach()


def as_importance(act_norms: Any, in_features: int, device: torch.device) -> Tensor:
    """h = act_norms^2 / mean(act_norms^2), fp32 [in_features]; raises if act_norms are unfit."""
    act_norms = as_tensor(act_norms, "act_norms")
    if not act_norms.is_floating_point():
        raise TypeError(f"act_norms must be of a floating-point dtype, not {act_norms.dtype}.")
    if tuple(act_norms.shape) != (in_features,):
        raise ValueError(
            f"act_norms must have shape ({in_features},), one norm an input of W, "
            f"not {tuple(act_norms.shape)}."
        )
    if act_norms.device != device:
        raise ValueError(f"act_norms must be on W's device {device}, not on {act_norms.device}.")
    bad = int((~torch.isfinite(act_norms)).sum())
    if bad:
        raise ValueError(
            f"act_norms must be finite, but {bad} of {in_features} are NaN or infinite."
        )
    if (act_norms < 0).any():
        bad = int((act_norms < 0).sum())
        raise ValueError(f"act_norms must not be negative, but {bad} of {in_features} are.")
    largest = float(act_norms.max())
    if largest == 0:
        raise ValueError(
            f"act_norms must not all be zero, but all {in_features} are: "
            "the calibration text never reached this layer."
        )
    # Scaled by a power of two, which changes no bit, so that no square leaves float64's range.
    scale = math.ldexp(1.0, min(math.frexp(largest)[1], 1023))
    squares = (act_norms.detach().double() / scale).square()
    return (squares / squares.mean()).float()


def normalize_weight(weight: Any, act_norms: Any) -> NormalizedWeight:
    """Checks W and act_norms and normalises W, columns first, then rows (method: NoWag).

    Args:
        weight: [out_features, in_features], torch fp32, fp16 or bf16, or NumPy fp32 or fp16.
        act_norms: [in_features], sqrt of the mean square of each input on calibration text; >= 0,
            not all 0. Any positive multiple gives the same result.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape or device, NaN or infinity, negative or all-zero norms.
    """
    weight = as_weight(weight)
    importance = as_importance(act_norms, weight.shape[1], weight.device)
    normalized, row_norms, col_norms = ops.normalize(weight)
    # The squares are summed in float64, so a norm is not finite exactly where its column is not.
    finite = torch.isfinite(col_norms)
    if not finite.all():
        column = int((~finite).nonzero()[0])
        if torch.isfinite(weight[:, column]).all():
            raise ValueError(
                f"the norm of column {column} of W is beyond float32: scale W down, its largest "
                f"value is {float(weight[:, column].abs().max()):.3g}."
            )
        raise ValueError(f"W must be finite, but column {column} holds a NaN or an infinity.")
    return NormalizedWeight(weight, normalized, row_norms, col_norms, importance)


def half_norms(row_norms: Tensor, col_norms: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column norms in the format's fp16."""
    norms = (row_norms.half(), col_norms.half())
    for name, norm in zip(("row", "column"), norms, strict=True):
        if not torch.isfinite(norm).all():
            raise ValueError(
                f"a {name} norm of W exceeds the largest fp16 value, 65504: scale W down."
            )
    return norms


def normalized_by(weight: Tensor, norms: tuple[Tensor, Tensor]) -> Tensor:
    """Wn of these very norms, so that nothing is lost to their rounding; 0 where one is 0."""
    row_norms, col_norms = (norm.float() for norm in norms)
    points = weight.float().contiguous() / col_norms
    points /= row_norms[:, None]
    return points.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def sampled(rows: Tensor, share: float) -> Tensor:
    """A share of the rows of a matrix, evenly spaced, at least one."""
    count = max(1, round(share * len(rows)))
    return rows[(torch.arange(count, device=rows.device) * len(rows)) // count]
