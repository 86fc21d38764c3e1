"""prune.h: which weights to keep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nowag_ext.ops.checks import check, require, same_device
from nowag_ext.ops.format import MAX_GROUP, bitmap_shape
from nowag_ext.ops.registry import backend_of, operation


def _check_saliency(w: Tensor, h: Tensor) -> None:
    require(
        w.dim() == 2 and w.numel() > 0,
        f"w must be a non-empty matrix, not of shape {tuple(w.shape)}.",
    )
    check(w, "w", torch.float32, tuple(w.shape))
    check(h, "h", torch.float32, (w.shape[1],))
    same_device(w.device, h=h)


def _bitmap_fake(w: Tensor, *_: Any) -> Tensor:
    return w.new_empty(bitmap_shape(*w.shape), dtype=torch.uint8)


@operation("prune_select(Tensor w, Tensor h, int n_prune) -> Tensor", _bitmap_fake)
def prune_select(w: Tensor, h: Tensor, n_prune: int) -> Tensor:
    """Bitmap of the weights kept when the n_prune smallest saliencies of the layer go."""
    _check_saliency(w, h)
    require(0 <= n_prune <= w.numel(), f"n_prune must be from 0 to {w.numel()}, not {n_prune}.")
    bitmap = _bitmap_fake(w)
    backend, queue = backend_of(w.device)
    rows, cols = w.shape
    try:
        backend.prune_select(
            w.data_ptr(), h.data_ptr(), rows, cols, n_prune, bitmap.data_ptr(), queue
        )
    except ValueError as error:
        raise ValueError("w and h must not hold NaN, and h nothing negative.") from error
    return bitmap


@operation("prune_select_nm(Tensor w, Tensor h, int n, int m) -> Tensor", _bitmap_fake)
def prune_select_nm(w: Tensor, h: Tensor, n: int, m: int) -> Tensor:
    """Bitmap of the n weights kept of every m consecutive inputs."""
    _check_saliency(w, h)
    require(
        1 <= n <= m <= MAX_GROUP,
        f"an N:M pattern needs 1 <= N <= M <= {MAX_GROUP}, not {n}:{m}.",
    )
    rows, cols = w.shape
    require(cols % m == 0, f"in_features {cols} is not a multiple of M = {m}.")
    bitmap = _bitmap_fake(w)
    backend, queue = backend_of(w.device)
    backend.prune_select_nm(w.data_ptr(), h.data_ptr(), rows, cols, n, m, bitmap.data_ptr(), queue)
    return bitmap


def _prune_objective_fake(w: Tensor, h: Tensor, bitmap: Tensor) -> Tensor:
    return w.new_empty(2, dtype=torch.float64)


@operation("prune_objective(Tensor w, Tensor h, Tensor bitmap) -> Tensor", _prune_objective_fake)
def prune_objective(w: Tensor, h: Tensor, bitmap: Tensor) -> Tensor:
    """Sums of the pruned saliencies and of all of them, fp64 [2]."""
    _check_saliency(w, h)
    check(bitmap, "bitmap", torch.uint8, bitmap_shape(*w.shape))
    same_device(w.device, bitmap=bitmap)
    sums = _prune_objective_fake(w, h, bitmap)
    backend, queue = backend_of(w.device)
    rows, cols = w.shape
    backend.prune_objective(
        w.data_ptr(), h.data_ptr(), bitmap.data_ptr(), rows, cols, sums.data_ptr(), queue
    )
    return sums
