"""sparse_gemv.h against float64, and the ops on top of it: sparse_gemv, sparse_linear."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same_bits, assert_within
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nowag_ext import ops, reference
from nowag_ext.ops import linear

kernel = pytest.mark.kernel

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (1, 63), (3, 64), (5, 65), (31, 200), (37, 1000), (70, 1100), (33, 11008)]

Sparse = tuple[Tensor, Tensor, Tensor]


def sparse_weight(
    rows: int, cols: int, dtype: torch.dtype = torch.float32, share: float = 0.5, seed: int = 0
) -> Sparse:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator).to(dtype)
    bitmap = reference.to_bitmap(torch.rand(rows, cols, generator=generator) < share)
    offsets = reference.sparse_offsets(bitmap, cols)
    return bitmap, reference.sparse_pack(weight, bitmap, offsets, int(offsets[-1])), offsets


def tokens(count: int, cols: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, cols, generator=generator).to(dtype)


def assert_within_bound(y: Tensor, x: Tensor, sparse: Sparse, bias: Tensor | None = None) -> None:
    """The error bound of sparse_gemv.h: 8e-6 * sum |x W|, and the rounding to x's dtype."""
    want = reference.sparse_linear(x, *sparse, bias)
    bitmap, values, offsets = sparse
    sizes = reference.sparse_linear(x.abs(), bitmap, values.abs(), offsets)
    rounding = torch.finfo(y.dtype).eps / 2
    slack = 8e-6 * sizes + rounding * (want.abs() + 8e-6 * sizes) + torch.finfo(y.dtype).tiny
    assert_within(y, want, slack)


@kernel
@pytest.mark.parametrize("values_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_within_bound(
    shape: tuple[int, int], dtype: torch.dtype, values_dtype: torch.dtype
) -> None:
    sparse = sparse_weight(*shape, values_dtype)
    bias = tokens(1, shape[0], dtype, seed=2)[0]
    for count in (1, 3, 16):
        x = tokens(count, shape[1], dtype)
        assert_within_bound(ops.sparse_gemv(x, *sparse), x, sparse)
        assert_within_bound(ops.sparse_gemv(x, *sparse, bias), x, sparse, bias)


@kernel
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.97, 1.0])
@pytest.mark.parametrize("values_dtype", DTYPES)
def test_any_density(values_dtype: torch.dtype, share: float) -> None:
    sparse = sparse_weight(45, 777, values_dtype, share)
    x = tokens(5, 777)
    assert_within_bound(ops.sparse_gemv(x, *sparse), x, sparse)


@kernel
@given(
    rows=st.integers(1, 80),
    cols=st.integers(1, 400),
    count=st.integers(1, 16),
    dtype=st.sampled_from(DTYPES),
    values_dtype=st.sampled_from(DTYPES),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_property(
    rows: int,
    cols: int,
    count: int,
    dtype: torch.dtype,
    values_dtype: torch.dtype,
    share: float,
    seed: int,
) -> None:
    sparse = sparse_weight(rows, cols, values_dtype, share, seed)
    x = tokens(count, cols, dtype, seed)
    assert_within_bound(ops.sparse_gemv(x, *sparse), x, sparse)


@kernel
@pytest.mark.parametrize("values_dtype", DTYPES)
def test_bound_holds_when_no_error_cancels(values_dtype: torch.dtype) -> None:
    """All products positive and of one size: the sum grows and rounding errors with it."""
    bitmap, values, offsets = sparse_weight(8, 28672, values_dtype, 0.9)
    sparse = (bitmap, torch.full_like(values, 0.7), offsets)
    x = torch.full((2, 28672), 0.9)
    assert_within_bound(ops.sparse_gemv(x, *sparse), x, sparse)


@kernel
@pytest.mark.parametrize("values_dtype", DTYPES)
def test_a_token_is_independent_of_the_others(values_dtype: torch.dtype, threads: int) -> None:
    sparse = sparse_weight(75, 1337, values_dtype)
    x = tokens(16, 1337)
    together = ops.sparse_gemv(x, *sparse)
    torch.set_num_threads(1)
    for count in range(1, 16):
        assert_same_bits(ops.sparse_gemv(x[:count], *sparse), together[:count], count)
    for t in range(16):
        assert_same_bits(ops.sparse_gemv(x[t : t + 1], *sparse)[0], together[t], t)


@kernel
@pytest.mark.parametrize("values_dtype", DTYPES)
def test_nothing_is_read_past_the_values(values_dtype: torch.dtype) -> None:
    """The buffer ends with NaN: a kernel that used a value too many would show it."""
    bitmap, values, offsets = sparse_weight(9, 500, values_dtype)
    padded = torch.cat([values, torch.full((64,), float("nan"), dtype=values_dtype)])
    x = tokens(4, 500)
    one = ops.sparse_gemv(x, bitmap, values, offsets)
    other = ops.sparse_gemv(x, bitmap, padded[: values.numel()], offsets)
    assert_same_bits(one, other)


@kernel
@pytest.mark.parametrize("pattern", [(2, 4), (4, 8)])
def test_patterns(pattern: tuple[int, int]) -> None:
    weight = tokens(40, 512, torch.bfloat16, seed=3)
    bitmap = reference.prune_select_nm(weight.float(), torch.ones(512), *pattern)
    offsets = reference.sparse_offsets(bitmap, 512)
    sparse = (bitmap, reference.sparse_pack(weight, bitmap, offsets, int(offsets[-1])), offsets)
    x = tokens(2, 512, torch.bfloat16)
    assert_within_bound(ops.sparse_gemv(x, *sparse), x, sparse)


@kernel
@pytest.mark.parametrize("shape", [(600,), (1, 600), (2, 3, 600), (4, 4, 600), (2, 0, 600)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    sparse = sparse_weight(21, 600)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    y = ops.sparse_gemv(x, *sparse)
    assert y.shape == (*shape[:-1], 21)
    assert_same_bits(y, ops.sparse_linear(x, *sparse))
    if x.numel():
        flat = x.reshape(-1, 600)
        assert_same_bits(y.reshape(-1, 21), ops.sparse_gemv(flat, *sparse))


@kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [17, 40])
def test_many_tokens_go_through_tiles(
    count: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_TILE_BYTES", 1)  # tiles of 32 rows: three, the last one of 6
    sparse = sparse_weight(70, 96, dtype)
    bias = tokens(1, 70, dtype, seed=2)[0]
    x = tokens(count, 96, dtype)
    want = reference.sparse_linear(x, *sparse, bias)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-1}[dtype]
    torch.testing.assert_close(
        ops.sparse_linear(x, *sparse, bias).double(), want, rtol=tolerance / 10, atol=tolerance
    )


@kernel
@pytest.mark.parametrize("count", [3, 20])
def test_gradients(count: int) -> None:
    sparse = sparse_weight(13, 30)
    x = tokens(count, 30).requires_grad_()
    bias = tokens(1, 13, seed=2)[0].requires_grad_()
    grad_y = tokens(count, 13, seed=5)
    got = torch.autograd.grad(ops.sparse_linear(x, *sparse, bias), (x, bias), grad_y)
    weight = reference.sparse_dequantize(*sparse, 30, torch.float32)
    torch.testing.assert_close(got[0], grad_y @ weight)
    torch.testing.assert_close(got[1], grad_y.sum(0))


@kernel
def test_gradient_of_the_gradient() -> None:
    sparse = sparse_weight(13, 30)
    weight = reference.sparse_dequantize(*sparse, 30, torch.float32)
    x = tokens(4, 30).requires_grad_()

    def second_order(y: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    got, want = second_order(ops.sparse_linear(x, *sparse)), second_order(x @ weight.T)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@kernel
def test_ops_refuse() -> None:
    sparse = sparse_weight(6, 70)
    bitmap, values, offsets = sparse
    with pytest.raises(ValueError, match="sparse_gemv takes at most 16 tokens, not 17"):
        ops.sparse_gemv(tokens(17, 70), *sparse)
    with pytest.raises(ValueError, match=r"bitmap must have shape \(6, 8\), not \(6, 16\)"):
        ops.sparse_gemv(tokens(1, 64), *sparse)
    with pytest.raises(TypeError, match=r"x must be .*not torch\.float64"):
        ops.sparse_gemv(tokens(1, 70).double(), *sparse)
    with pytest.raises(ValueError, match=r"bias must have shape \(6,\), not \(5,\)"):
        ops.sparse_gemv(tokens(1, 70), *sparse, torch.ones(5))
    with pytest.raises(TypeError, match=r"values must be .*not torch\.float64"):
        ops.sparse_linear(tokens(1, 70), bitmap, values.double(), offsets)
    with pytest.raises(ValueError, match="grad_y must have 6 features"):
        ops.sparse_linear_grad(tokens(1, 5), *sparse, 70)


@kernel
@pytest.mark.parametrize("count", [2, 18])
def test_opcheck(count: int) -> None:
    sparse = sparse_weight(6, 70)
    x = tokens(count, 70).requires_grad_()
    bias = tokens(1, 6)[0].requires_grad_()
    if count <= 16:
        torch.library.opcheck(ops.sparse_gemv, (x.detach(), *sparse, bias.detach()))
    torch.library.opcheck(ops.sparse_linear, (x, *sparse, bias))
    torch.library.opcheck(ops.sparse_linear_grad, (tokens(count, 6).requires_grad_(), *sparse, 70))


@pytest.mark.parametrize("grad", [False, True])
def test_compiles_whole(grad: bool) -> None:
    sparse = sparse_weight(6, 70)

    def loss(x: Tensor) -> Tensor:
        return ops.sparse_linear(x * 2, *sparse).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x = tokens(3, 70).requires_grad_(grad)
    torch.testing.assert_close(compiled(x), loss(x))
    if grad:
        (got,) = torch.autograd.grad(compiled(x), x)
        (want,) = torch.autograd.grad(loss(x), x)
        torch.testing.assert_close(got, want)
