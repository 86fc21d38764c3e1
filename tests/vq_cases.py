"""VQ weights for tests: realistic magnitudes, random codes, as the tensors of format.h."""

from __future__ import annotations

import torch
from torch import Tensor

from nowag_ext import ops


def random_codes(rows: int, positions: int, code_bits: int, seed: int = 0) -> Tensor:
    """uint16 codes [rows, positions] that reach both ends of their range."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**code_bits, (rows, positions), generator=generator)
    codes.view(-1)[0] = 2**code_bits - 1
    codes.view(-1)[-1] = 0
    return codes.to(torch.uint16)


def random_vq(
    rows: int, cols: int, d: int, code_bits: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes, codebook, row_norms, col_norms) of a layer of shape [rows, cols]."""
    generator = torch.Generator().manual_seed(seed)
    codes = ops.pack_codes(
        random_codes(rows, ops.code_positions(cols, d), code_bits, seed), code_bits
    )
    codebook = torch.randn(2**code_bits, d, generator=generator) / cols**0.5
    row_norms = 0.5 + torch.rand(rows, generator=generator)
    col_norms = 0.5 + torch.rand(cols, generator=generator)
    return codes, codebook.half(), row_norms.half(), col_norms.half()


def activations(
    tokens: int, cols: int, dtype: torch.dtype, seed: int = 0, outlier: float = 40.0
) -> Tensor:
    """Inputs [tokens, cols] with the few outlier channels that language models have."""
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(tokens, cols, generator=generator)
    x[:, torch.randperm(cols, generator=generator)[: max(1, cols // 200)]] *= outlier
    return x.to(dtype)
