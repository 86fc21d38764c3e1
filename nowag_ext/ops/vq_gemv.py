"""vq_gemv.h: vq_gemv for few tokens, vq_linear for any number of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nowag_ext import _cpu
from nowag_ext.gemm import gemm_dtype
from nowag_ext.ops.checks import (
    DTYPES,
    check_aligned,
    check_features,
    dtype_code,
    require,
    same_device,
)
from nowag_ext.ops.linear import (
    GEMV_MAX_TOKENS,
    VQ_MAX_MEMBERS,
    check_linear,
    tiled_linear,
    tiled_linear_grad,
)
from nowag_ext.ops.linear_autograd import register_linear_autograd
from nowag_ext.ops.registry import KernelCall, backend_for, operation
from nowag_ext.ops.vq_pack import VqSizes, check_vq_aligned, dequantize_vq_rows, vq_sizes

_WEIGHT = "Tensor codes, Tensor codebook, Tensor row_norms, Tensor col_norms"


def _vq_linear_fake(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    row_norms: Tensor,
    col_norms: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    check_features(x, "x", col_norms.shape[0])
    same_device(codes.device, x=x, bias=bias)
    return x.new_empty((*x.shape[:-1], row_norms.shape[0]))


def _launch(
    x: Tensor,
    tokens: int,
    vq: tuple[Tensor, Tensor, Tensor, Tensor],
    sizes: VqSizes,
    bias: Tensor | None,
) -> Tensor:
    rows, cols, d, code_bits = sizes
    y = x.new_empty((*x.shape[:-1], rows))
    backend, queue = backend_for(x)
    size, x_at, y_at, dtype = x.element_size(), x.data_ptr(), y.data_ptr(), DTYPES[x.dtype]
    bias_at = 0 if bias is None else bias.data_ptr()
    codes, codebook, row_norms, col_norms = vq
    codes_at, codebook_at = codes.data_ptr(), codebook.data_ptr()
    rows_at, cols_at = row_norms.data_ptr(), col_norms.data_ptr()
    if x_at % size or (codebook_at | rows_at | cols_at) & 1:
        check_aligned(x, "x")
        check_vq_aligned(*vq)
    at_once = GEMV_MAX_TOKENS if tokens <= GEMV_MAX_TOKENS else _tokens_at_once(d, code_bits, x)
    while tokens > 0:
        few = min(tokens, at_once)
        backend.vq_gemv(
            x_at, dtype, few, codes_at, codebook_at, rows_at, cols_at, bias_at,
            rows, cols, d, code_bits, y_at, queue,
        )  # fmt: skip
        tokens -= few
        x_at += few * cols * size
        y_at += few * rows * size
    return y


def _tokens_at_once(d: int, code_bits: int, x: Tensor) -> int:
    if x.is_cpu:
        return GEMV_MAX_TOKENS
    return _cpu.vq_gemv_device_tokens(DTYPES[x.dtype], d, code_bits)


def run_vq_gemv(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    row_norms: Tensor,
    col_norms: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """x W^T + bias by the few-token kernel: x [..., in_features], at most 16 tokens."""
    vq = (codes, codebook, row_norms, col_norms)
    sizes = vq_sizes(*vq)
    x, tokens, bias = check_linear(x, bias, sizes[0], sizes[1], codes)
    require(
        tokens <= GEMV_MAX_TOKENS, f"vq_gemv takes at most {GEMV_MAX_TOKENS} tokens, not {tokens}."
    )
    return _launch(x, tokens, vq, sizes, bias)


def _member(
    y: Tensor,
    codes: Tensor,
    codebook: Tensor,
    row_norms: Tensor,
    col_norms: Tensor,
    bias: Tensor | None = None,
) -> list[int]:
    """The words of a VqMember of vq_gemv.h."""
    rows, _, d, code_bits = vq_sizes(codes, codebook, row_norms, col_norms)
    weight_at = (one.data_ptr() for one in (codes, codebook, row_norms, col_norms))
    return [*weight_at, 0 if bias is None else bias.data_ptr(), rows, d, code_bits, y.data_ptr()]


def vq_linears_call(calls: Sequence[tuple[Tensor, Sequence[Any]]]) -> KernelCall | None:
    """What does some calls of vq_linear with one x again, on a CPU, and checks nothing again.

    None where that is not one call of the kernel.

    Args:
        calls: for each what it returned, which is written to, and its arguments.
    """
    x = calls[0][1][0]
    tokens = x.numel() // x.shape[-1]
    words, tensors = [], [x]
    for y, (_, *weight) in calls:
        words.append(_member(y, *weight))
        tensors += [y, *(one for one in weight if one is not None)]
    if not 0 < tokens <= GEMV_MAX_TOKENS or not all(one.is_contiguous() for one in tensors):
        return None
    members = torch.tensor(words, dtype=torch.int64, device="cpu")
    arguments = (
        x.data_ptr(), DTYPES[x.dtype], tokens, x.shape[-1], members.data_ptr(), len(words)
    )  # fmt: skip
    return KernelCall(_cpu.vq_gemv_group, arguments, [*tensors, members])


def _vq_gemv_group_fake(x: Tensor, *lists: Sequence[Any]) -> list[Tensor]:
    return [_vq_linear_fake(x, *vq, bias) for vq, bias in _members(*lists)]


_Vq = tuple[Tensor, Tensor, Tensor, Tensor]


def _members(*lists: Sequence[Any]) -> list[tuple[_Vq, Tensor | None]]:
    """Lists of codes, codebooks, norms and biases as a list of (weight, bias)."""
    counts = sorted({len(one) for one in lists})
    require(
        len(counts) == 1 and 0 < counts[0] <= VQ_MAX_MEMBERS,
        f"codes, codebooks, row_norms, col_norms and biases must have one length from 1 to "
        f"{VQ_MAX_MEMBERS}, not {' and '.join(map(str, counts))}.",
    )
    return [((c, b, r, n), bias) for c, b, r, n, bias in zip(*lists, strict=True)]


@operation(
    "vq_gemv_group(Tensor x, Tensor[] codes, Tensor[] codebooks, Tensor[] row_norms, "
    "Tensor[] col_norms, Tensor?[] biases) -> Tensor[]",
    _vq_gemv_group_fake,
)
def vq_gemv_group(
    x: Tensor,
    codes: Sequence[Tensor],
    codebooks: Sequence[Tensor],
    row_norms: Sequence[Tensor],
    col_norms: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> list[Tensor]:
    """[x W^T + bias] of some W: x [..., in_features], at most 16 tokens."""
    words, outputs, kept = [], [], []
    for vq, bias in _members(codes, codebooks, row_norms, col_norms, biases):
        rows, cols, _, _ = vq_sizes(*vq)
        x, tokens, whole = check_linear(x, bias, rows, cols, vq[0])
        require(
            tokens <= GEMV_MAX_TOKENS,
            f"vq_gemv_group takes at most {GEMV_MAX_TOKENS} tokens, not {tokens}.",
        )
        check_vq_aligned(*vq)
        outputs.append(x.new_empty((*x.shape[:-1], rows)))
        words.append(_member(outputs[-1], *vq, whole))
        kept.append(whole)  # a copy, perhaps
    check_aligned(x, "x")
    if tokens > 0:
        members = torch.tensor(words, dtype=torch.int64, device="cpu")
        backend, queue = backend_for(x)
        backend.vq_gemv_group(
            x.data_ptr(), DTYPES[x.dtype], tokens, cols, members.data_ptr(), len(words), queue
        )
    return outputs


vq_gemv = operation(f"vq_gemv(Tensor x, {_WEIGHT}, Tensor? bias=None) -> Tensor", _vq_linear_fake)(
    run_vq_gemv
)


def vq_gemv_tokens(d: int, code_bits: int, x: Tensor) -> int:
    """Up to how many tokens the kernel, run for as many at a time as it takes, beats dense tiles.

    Measured on CPUs (benchmarks/bench_vq_gemv.py), for GPUs predicted from an H100's kernels (two
    runs of 64 tokens 50 us at 11008x4096, d=6, where dense tiles take 74). The kernel's time is
    proportional to tokens and codes; torch's GEMM is several times faster in bf16 where the CPU has
    instructions for that.
    """
    if not x.is_cpu:
        at_once = _tokens_at_once(d, code_bits, x)
        if at_once > GEMV_MAX_TOKENS:
            return 2 * at_once
        return 4 * GEMV_MAX_TOKENS if x.dtype == torch.float32 else GEMV_MAX_TOKENS
    narrow = code_bits <= 8
    if gemm_dtype(x.dtype, x.device) != torch.float32:
        return 2 * GEMV_MAX_TOKENS if narrow else GEMV_MAX_TOKENS
    avx2 = _cpu.simd_level() == "avx2"
    nibbles = code_bits == 4
    if (narrow and d > 4) or (nibbles and d > 1):  # AVX2 looks up faster than it multiplies
        return sys.maxsize if avx2 else 16 * GEMV_MAX_TOKENS
    if narrow and d == 4:
        return (6 if avx2 else 16) * GEMV_MAX_TOKENS
    if nibbles and avx2:
        return 8 * GEMV_MAX_TOKENS
    if narrow or "avx512" in _cpu.simd_level() or (avx2 and d > 4):
        return 4 * GEMV_MAX_TOKENS
    return 2 * GEMV_MAX_TOKENS


@operation(f"vq_linear(Tensor x, {_WEIGHT}, Tensor? bias=None) -> Tensor", _vq_linear_fake)
def vq_linear(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    row_norms: Tensor,
    col_norms: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """x W^T + bias for x [..., in_features], any number of tokens; with gradients."""
    vq = (codes, codebook, row_norms, col_norms)
    sizes = vq_sizes(*vq)
    x, tokens, bias = check_linear(x, bias, sizes[0], sizes[1], codes)
    if tokens <= vq_gemv_tokens(*sizes[2:], x):
        return _launch(x, tokens, vq, sizes, bias)
    return tiled_linear(
        x,
        bias,
        sizes[0],
        lambda begin, end, out: dequantize_vq_rows(vq, sizes, begin, end, out),
    )


def _vq_linear_grad_fake(
    grad_y: Tensor, codes: Tensor, codebook: Tensor, row_norms: Tensor, col_norms: Tensor
) -> Tensor:
    return grad_y.new_empty((*grad_y.shape[:-1], col_norms.shape[0]))


@operation(f"vq_linear_grad(Tensor grad_y, {_WEIGHT}) -> Tensor", _vq_linear_grad_fake)
def vq_linear_grad(
    grad_y: Tensor, codes: Tensor, codebook: Tensor, row_norms: Tensor, col_norms: Tensor
) -> Tensor:
    """grad_y W, the gradient of vq_linear's x: grad_y [..., out_features]."""
    vq = (codes, codebook, row_norms, col_norms)
    sizes = vq_sizes(*vq)
    rows, cols = sizes[:2]
    dtype_code(grad_y, "grad_y")
    check_features(grad_y, "grad_y", rows)
    same_device(codes.device, grad_y=grad_y)
    return tiled_linear_grad(
        grad_y,
        cols,
        lambda begin, end, out: dequantize_vq_rows(vq, sizes, begin, end, out),
    )


register_linear_autograd(vq_linear, vq_linear_grad, lambda x: ())
