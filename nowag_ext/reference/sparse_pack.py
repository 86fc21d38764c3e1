"""Oracles of sparse_pack.h."""

from __future__ import annotations

import torch
from torch import Tensor


def to_bitmap(keep: Tensor) -> Tensor:
    """bool [rows, cols] to the bitmap of format.h."""
    rows, cols = keep.shape
    padded = torch.zeros(rows, -(-cols // 64) * 64, dtype=torch.int64)
    padded[:, :cols] = keep
    return (padded.view(rows, -1, 8) << torch.arange(8)).sum(-1).to(torch.uint8)


def from_bitmap(bitmap: Tensor, cols: int) -> Tensor:
    """The bitmap of format.h to bool [rows, cols]."""
    bits = (bitmap[..., None].to(torch.int64) >> torch.arange(8)) & 1
    return bits.flatten(1)[:, :cols].bool()


def sparse_offsets(bitmap: Tensor, cols: int) -> Tensor:
    """Running number of kept weights, from 0."""
    offsets = torch.zeros(bitmap.shape[0] + 1, dtype=torch.int32)
    offsets[1:] = from_bitmap(bitmap, cols).sum(1).cumsum(0)
    return offsets


def sparse_pack(weight: Tensor, bitmap: Tensor, row_offsets: Tensor, kept: int) -> Tensor:
    """The kept weights, row by row."""
    return weight[from_bitmap(bitmap, weight.shape[1])]


def sparse_dequantize(
    bitmap: Tensor, values: Tensor, row_offsets: Tensor, cols: int, dtype: torch.dtype
) -> Tensor:
    """Values where bits are set, 0 elsewhere."""
    dense = torch.zeros(bitmap.shape[0], cols, dtype=dtype)
    dense[from_bitmap(bitmap, cols)] = values.to(dtype)
    return dense
