"""Oracles of prune.h."""

from __future__ import annotations

import torch
from torch import Tensor

from nowag_ext.reference.sparse_pack import from_bitmap, to_bitmap


def saliency(w: Tensor, h: Tensor) -> Tensor:
    """h * (w * w) in float32, two roundings."""
    return h * (w * w)


def prune_select(w: Tensor, h: Tensor, n_prune: int) -> Tensor:
    """Bitmap of what a stable ascending sort of all saliencies leaves after the first n_prune."""
    order = torch.sort(saliency(w, h).flatten(), stable=True).indices
    keep = torch.ones(w.numel(), dtype=torch.bool)
    keep[order[:n_prune]] = False
    return to_bitmap(keep.view(w.shape))


def prune_select_nm(w: Tensor, h: Tensor, n: int, m: int) -> Tensor:
    """The same within each group of m inputs: the first m - n go."""
    groups = saliency(w, h).view(w.shape[0], -1, m)
    order = torch.sort(groups, dim=-1, stable=True).indices
    keep = torch.ones(groups.shape, dtype=torch.bool)
    keep.scatter_(-1, order[..., : m - n], False)
    return to_bitmap(keep.view(w.shape))


def prune_objective(w: Tensor, h: Tensor, bitmap: Tensor) -> Tensor:
    """Sums of the pruned saliencies and of all of them, in float64 throughout."""
    saliencies = h.double() * w.double().square()
    pruned = saliencies[~from_bitmap(bitmap, w.shape[1])].sum()
    return torch.stack([pruned, saliencies.sum()])
