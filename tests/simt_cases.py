"""What the tests of CUDA kernels on the host SIMT executor share: operands and comparisons.

The kernels run under ASan and UBSan. The tests compare with the CPU's kernels: assignments, sums,
selections, packed forms and normalised weights must be the CPU's bits; the GEMVs keep the error
bound of their headers. Shapes are small but have every kind of tail, and threads run in several
orders, so that a missing barrier shows.
"""

from __future__ import annotations

import pytest
import torch
from compare import assert_within
from simt_host import compiler
from torch import Tensor

from nowag_ext import ops, reference


def first_is_quick(first: object, *others: object) -> list[object]:
    """Cases of which a plain pytest takes the first: a GPU thread by thread takes minutes."""
    return [first, *(pytest.param(other, marks=pytest.mark.slow) for other in others)]


needs_compiler = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler (g++ or $CXX)")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SEEDS = first_is_quick(2, 0, 1)  # orders in which threads run
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
VQ_SHAPES = [(1, 1, 1, 1), (33, 20, 3, 9), (70, 131, 4, 8), (40, 97, 6, 12), (65, 33, 8, 16)]
SPARSE_SHAPES = [(1, 1, 0.0), (9, 70, 0.5), (37, 64, 0.9), (1100, 3, 0.5), (10, 1090, 0.5)]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan") if dtype.is_floating_point else 113, dtype=dtype)


def assert_within_bound(
    got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, more: Tensor | float = 0.0
) -> None:
    """The error bound of vq_gemv.h and sparse_gemv.h, with one rounding to the output's dtype."""
    want = x.double() @ weight.T
    bound = 8e-6 * (x.double().abs() @ weight.abs().T) + more
    if bias is not None:
        want = want + bias.double()
    epsilon = {torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
    smallest = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
    rounding = epsilon[got.dtype] * (want.abs() + bound) + smallest[got.dtype]
    assert_within(got, want, bound + rounding)


def vq_weight(
    rows: int, cols: int, d: int, code_bits: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes, codebook, row_norms, col_norms at random."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, ops.code_positions(cols, d))
    codes = torch.randint(0, 2**code_bits, shape, generator=generator).to(torch.uint16)
    return (
        reference.pack_codes(codes, code_bits),
        randn(2**code_bits, d, seed=seed + 1).half(),
        (randn(rows, seed=seed + 2).abs() + 0.1).half(),
        (randn(cols, seed=seed + 3).abs() + 0.1).half(),
    )


def sparse_weight(rows: int, cols: int, sparsity: float) -> tuple[Tensor, Tensor]:
    """A random dense weight and the bitmap of what is kept of it."""
    weight = randn(rows, cols, seed=140)
    return weight, ops.prune_select(weight, torch.ones(cols), int(sparsity * rows * cols))
