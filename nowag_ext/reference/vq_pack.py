"""Oracles of vq_pack.h."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_codes(codes: Tensor, code_bits: int) -> Tensor:
    """uint16 codes [rows, P] to the bit streams of format.h: bit by bit, lowest first."""
    rows, positions = codes.shape
    tiles = -(-rows // 32)
    padded = torch.zeros(tiles * 32, positions, dtype=torch.int64)
    padded[:rows] = codes.to(torch.int64)
    streams = padded.view(tiles, 32, positions).transpose(1, 2)
    bits = (streams[..., None] >> torch.arange(code_bits)) & 1
    octets = bits.reshape(tiles, positions, 4 * code_bits, 8)
    return (octets << torch.arange(8)).sum(-1).to(torch.uint8)


def unpack_codes(packed: Tensor, rows: int) -> Tensor:
    """The bit streams of format.h to uint16 codes [rows, P]."""
    tiles, positions, octets = packed.shape
    bits = (packed[..., None].to(torch.int64) >> torch.arange(8)) & 1
    bits = bits.reshape(tiles, positions, 32, octets // 4)
    codes = (bits << torch.arange(octets // 4)).sum(-1)
    return codes.transpose(1, 2).reshape(tiles * 32, positions)[:rows].to(torch.uint16)


def vq_dequantize(
    codes: Tensor, codebook: Tensor, row_norms: Tensor, col_norms: Tensor, dtype: torch.dtype
) -> Tensor:
    """(row_norm * entry) * col_norm in float32, rounded once to dtype."""
    entries = vq_entries(codes, codebook, row_norms, col_norms).float()
    return ((row_norms.float()[:, None] * entries) * col_norms.float()).to(dtype)


def vq_entries(codes: Tensor, codebook: Tensor, row_norms: Tensor, col_norms: Tensor) -> Tensor:
    """The codebook entries of all codes, fp16 [rows, cols]: the weight before its norms."""
    rows, cols = row_norms.shape[0], col_norms.shape[0]
    return codebook[unpack_codes(codes, rows).to(torch.int64)].reshape(rows, -1)[:, :cols]


def vq_gather(
    indices: Tensor,
    codes: Tensor,
    codebook: Tensor,
    row_norms: Tensor,
    col_norms: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of the dense weight, [*indices.shape, cols]."""
    dense = vq_dequantize(codes, codebook, row_norms, col_norms, dtype)
    return torch.nn.functional.embedding(indices, dense)
