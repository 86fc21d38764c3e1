"""vq_gemv.h against its oracle, and the ops built on it: vq_gemv, vq_linear, vq_linear_grad."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same_bits, assert_within
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from vq_cases import activations, random_vq

from nowag_ext import _cpu, gemm, ops, reference
from nowag_ext.ops import linear
from nowag_ext.ops.linear import tiled_linear
from nowag_ext.ops.vq_gemv import vq_gemv_tokens
from nowag_ext.ops.vq_pack import dequantize_vq_rows, vq_sizes

pytestmark = pytest.mark.kernel

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# out_features, in_features, d, code_bits: both fast forms, tails, every other d, odd code sizes.
LAYERS = [
    (1, 1, 1, 1),
    (1, 5, 4, 8),
    (33, 50, 3, 7),
    (70, 1, 1, 1),  # the codes of all tiles together are less than one vector
    (64, 129, 5, 10),
    (65, 7, 7, 5),
    (70, 96, 8, 16),
    (100, 257, 2, 6),
    (257, 1026, 4, 8),
    (300, 515, 6, 12),
    (576, 576, 4, 8),
    (545, 2075, 4, 8),
    (705, 131, 8, 8),
    (513, 70, 1, 8),
    (64, 4098, 6, 12),
    (96, 200, 4, 12),
    (96, 210, 6, 8),
    (128, 65, 1, 4),
    (1, 3, 1, 4),
    (290, 128, 1, 4),
    (77, 1214, 1, 4),
    (97, 1214, 2, 4),
    (64, 130, 4, 4),
    (200, 33, 8, 4),
]


def integer_error(x: Tensor, vq: tuple[Tensor, ...]) -> Tensor:
    """What vq_gemv.h allows where products are integers, [tokens, out_features]; 0 elsewhere.

    A position's group is not known here: the largest product of any group it can be in bounds it.
    """
    _, codebook, row_norms, col_norms = vq
    entries, d = codebook.shape
    scaled = (x.double() * col_norms.double()).abs()
    scaled = torch.nn.functional.pad(scaled, (0, -x.shape[1] % d)).unflatten(1, (-1, d))
    if looked_up(vq) and _cpu.simd_level() == "avx512vbmi":
        products = scaled @ codebook.double().abs().amax(0)
        group = torch.nn.functional.max_pool1d(products, 511, stride=1, padding=255)
        error = group.sum(1, keepdim=True) / 62000
    elif entries == 16 and _cpu.simd_level() != "scalar":
        products = scaled @ codebook.double().abs().T  # [tokens, positions, entries]
        runs = products.amax(2).split(16, dim=1)
        error = sum((run.amax(1) * run.shape[1] for run in runs), torch.zeros(())) / 4000
        error = error[:, None]
    elif d > 4 and _cpu.simd_level() != "scalar" and not looked_up(vq):
        largest = codebook.double().abs().max()
        runs = scaled.amax(2).split(16, dim=1)
        most = sum((run.amax(1) * run.shape[1] for run in runs), torch.zeros(()))
        error = most[:, None] * d * largest / 8000
    else:
        return torch.zeros(())
    return error * row_norms.double()


def looked_up(vq: tuple[Tensor, ...]) -> bool:
    """Whether AVX2 and AVX-512 look products up in tables."""
    return vq[1].shape[0] == 256 and vq[2].numel() >= 512


def assert_within_bound(y: Tensor, x: Tensor, vq: tuple[Tensor, ...], bias: Tensor | None) -> None:
    """The error bound that vq_gemv.h states."""
    exact = reference.vq_linear(x, *vq, bias)
    weight = reference.vq_dequantize(*vq, torch.float64)
    magnitude = x.double().abs() @ weight.abs().T
    rounding = torch.finfo(y.dtype).eps * exact.abs() + torch.finfo(y.dtype).tiny
    bound = 8e-6 * magnitude + integer_error(x, vq) + rounding
    assert_within(y, exact, bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_within_the_error_bound(layer: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    vq = random_vq(*layer)
    for tokens in (1, 2, 3, 5, 16):
        x = activations(tokens, layer[1], dtype)
        bias = torch.randn(layer[0]).to(dtype) if tokens % 2 else None
        assert_within_bound(ops.vq_gemv(x, *vq, bias), x, vq, bias)


@given(
    rows=st.integers(1, 100),
    cols=st.integers(1, 300),
    d=st.integers(1, 8),
    code_bits=st.integers(1, 12),
    tokens=st.integers(1, 16),
    seed=st.integers(0, 2**31),
)
def test_within_the_error_bound_anywhere(
    rows: int, cols: int, d: int, code_bits: int, tokens: int, seed: int
) -> None:
    vq = random_vq(rows, cols, d, code_bits, seed)
    x = activations(tokens, cols, torch.float32, seed)
    assert_within_bound(ops.vq_gemv(x, *vq, None), x, vq, None)


@pytest.mark.parametrize(
    "layer",
    [
        (576, 1300, 4, 8),
        (520, 1300, 6, 8),
        (300, 1100, 6, 12),
        (100, 400, 8, 16),
        (100, 90, 3, 7),
        (300, 1300, 1, 4),
        (300, 1300, 2, 4),
    ],
)
def test_same_bits_for_any_threads_and_company(layer: tuple[int, int, int, int]) -> None:
    vq = random_vq(*layer)
    x = activations(16, layer[1], torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    together = ops.vq_gemv(x, *vq, None)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for tokens in (2, 3, 4, 7, 8, 15):
            assert_same_bits(ops.vq_gemv(x[:tokens], *vq, None), together[:tokens])
        for token in (0, 5):
            alone = ops.vq_gemv(x[token : token + 1], *vq, None)
            assert_same_bits(alone, together[token : token + 1])
    torch.set_num_threads(before)


# Forms of siblings: rows, d, code_bits.
GROUPS = [
    [(64, 6, 12)],
    [(600, 4, 8), (513, 4, 8), (70, 4, 8)],
    [(300, 6, 12), (33, 6, 12), (1, 6, 12)],
    [(100, 1, 4), (33, 2, 4), (520, 4, 8), (70, 3, 7), (33, 6, 12)],
    [(40, 2, 4)] * ops.VQ_MAX_MEMBERS,
]


def siblings(
    forms: list[tuple[int, int, int]], cols: int, dtype: torch.dtype
) -> tuple[list[tuple[Tensor, ...]], list[Tensor | None]]:
    """(their weights, their biases); every other one has a bias."""
    vqs = [random_vq(rows, cols, d, bits, seed=i) for i, (rows, d, bits) in enumerate(forms)]
    biases = [torch.randn(form[0]).to(dtype) if i % 2 else None for i, form in enumerate(forms)]
    return vqs, biases


@pytest.mark.parametrize("cols", [7, 1301])
@pytest.mark.parametrize("forms", GROUPS)
def test_a_group_has_the_bits_of_each(forms: list[tuple[int, int, int]], cols: int) -> None:
    before = torch.get_num_threads()
    for dtype in DTYPES:
        vqs, biases = siblings(forms, cols, dtype)
        for tokens in (1, 3, 16):
            x = activations(tokens, cols, dtype)
            wanted = [ops.vq_gemv(x, *vq, bias) for vq, bias in zip(vqs, biases, strict=True)]
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                found = ops.vq_gemv_group(x, *map(list, zip(*vqs, strict=True)), biases)
                for one, other in zip(found, wanted, strict=True):
                    assert_same_bits(one, other)
            torch.set_num_threads(before)


def test_groups_that_are_none() -> None:
    vqs, biases = siblings([(70, 4, 8), (40, 6, 12)], 50, torch.float32)
    lists = [list(each) for each in zip(*vqs, strict=True)]
    x = torch.randn(2, 50)
    assert [y.shape for y in ops.vq_gemv_group(x[:0], *lists, biases)] == [(0, 70), (0, 40)]
    with pytest.raises(ValueError, match="must have one length from 1 to 8, not 1 and 2"):
        ops.vq_gemv_group(x, *lists, biases[:1])
    with pytest.raises(ValueError, match="must have one length from 1 to 8, not 9"):
        ops.vq_gemv_group(x, *([each[0]] * 9 for each in lists), [None] * 9)
    narrow = [list(each) for each in zip(vqs[0], random_vq(40, 49, 4, 8), strict=True)]
    with pytest.raises(ValueError, match="x must have 49 features"):
        ops.vq_gemv_group(x, *narrow, biases)
    with pytest.raises(ValueError, match="vq_gemv_group takes at most 16 tokens, not 17"):
        ops.vq_gemv_group(torch.randn(17, 50), *lists, biases)
    words = torch.zeros(9, dtype=torch.int64)
    for count in (0, 1, 9):
        with pytest.raises(ValueError, match="vq_gemv_group: an argument is outside the contract"):
            _cpu.vq_gemv_group(x.data_ptr(), 0, 2, 50, words.data_ptr(), count, 1)


@pytest.mark.parametrize("outlier", [1.0, 40.0, 1000.0])
@pytest.mark.parametrize(
    "layer",
    [(1000, 1536, 4, 8), (577, 2050, 2, 8), (520, 400, 6, 12), (90, 1500, 1, 4), (90, 1500, 2, 4)],
)
def test_close_on_inputs_with_outlier_channels(
    layer: tuple[int, int, int, int], outlier: float
) -> None:
    vq = random_vq(*layer)
    for tokens in (1, 4):
        x = activations(tokens, layer[1], torch.float32, outlier=outlier)
        exact = reference.vq_linear(x, *vq, None)
        error = (ops.vq_gemv(x, *vq, None).double() - exact).norm(dim=1) / exact.norm(dim=1)
        assert_within(error, 0, 2e-3)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("form", [(4, 8), (6, 12), (1, 4), (2, 4)])
@pytest.mark.parametrize("magnitude", [0.0, 1e-38, 1e-30, 1e30])
def test_inputs_of_extreme_magnitude(magnitude: float, form: tuple[int, int], tokens: int) -> None:
    vq = random_vq(600, 300, *form)
    x = activations(tokens, 300, torch.float32) * magnitude
    exact = reference.vq_linear(x, *vq, None)
    off = float(exact.abs().max()) * 4e-3
    torch.testing.assert_close(
        ops.vq_gemv(x, *vq, None).double(), exact, rtol=1e-2, atol=max(off, 1e-26)
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "layer",
    [(600, 90, 4, 8), (100, 90, 6, 12), (100, 90, 3, 7), (100, 90, 1, 4), (100, 90, 2, 4)],
)
def test_non_finite_inputs_show(layer: tuple[int, int, int, int], bad: float) -> None:
    vq = random_vq(*layer)
    x = activations(3, 90, torch.float32)
    x[1, 17] = bad
    y = ops.vq_gemv(x, *vq, None)
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()
    assert not ops.vq_gemv(x[1:2], *vq, None).isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(50,), (0, 50), (2, 0, 50), (3, 50), (2, 4, 2, 50), (40, 50)])
def test_linear_takes_any_leading_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    vq = random_vq(70, 50, 4, 8)
    x = activations(64, 50, dtype).flatten()[: torch.Size(shape).numel()].view(shape)
    y = ops.vq_linear(x, *vq, None)
    assert y.shape == (*shape[:-1], 70)
    assert y.dtype == dtype
    want = reference.vq_linear(x, *vq, None)
    assert (y.double() - want).norm() <= 4 * torch.finfo(dtype).eps * want.norm()


@pytest.mark.parametrize("tokens", [3, 40])
def test_linear_takes_inputs_that_are_not_contiguous(tokens: int) -> None:
    vq = random_vq(70, 50, 6, 12)
    bias = torch.randn(140)[::2]
    base = activations(50, tokens, torch.float32)
    got = ops.vq_linear(base.T, *vq, bias)
    assert_same_bits(got, ops.vq_linear(base.T.contiguous(), *vq, bias.contiguous()))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tokens_go_by_tiles(
    dtype: torch.dtype, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of the dtype of x where the CPU is fast in it, else of float32, rounded once."""
    monkeypatch.setattr(gemm, "cpu_has_gemm", lambda dtype: fast)
    tiles_in = dtype if fast else torch.float32
    monkeypatch.setattr(linear, "_TILE_BYTES", 64 * 90 * tiles_in.itemsize)
    vq = random_vq(200, 90, 6, 12)
    x, bias = activations(65, 90, dtype).view(5, 13, 90), torch.randn(200).to(dtype)
    tiles = []

    def dequantize(begin: int, end: int, tile: Tensor) -> None:
        tiles.append((begin, end, tile.dtype))
        dequantize_vq_rows(vq, vq_sizes(*vq), begin, end, tile)

    y = tiled_linear(x, bias, 200, dequantize)
    assert tiles == [(begin, min(begin + 64, 200), tiles_in) for begin in range(0, 200, 64)]
    assert_same_bits(y, ops.vq_linear(x, *vq, bias))
    assert y.shape == (5, 13, 200)
    assert y.dtype == dtype
    want = reference.vq_linear(x, *vq, bias)
    rounding = torch.finfo(dtype).eps * (0.5 if tiles_in != dtype else 4)
    assert (y.double() - want).norm() <= (rounding + 1e-6) * want.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "code_bits"), [(4, 8), (6, 12), (2, 8), (8, 16)])
def test_linear_is_right_on_both_sides_of_the_switch_to_tiles(
    d: int, code_bits: int, dtype: torch.dtype
) -> None:
    vq = random_vq(70, 50, d, code_bits)
    limit = vq_gemv_tokens(d, code_bits, torch.empty(1, dtype=dtype))
    assert limit >= ops.GEMV_MAX_TOKENS
    for tokens in (limit, limit + 1) if limit < 1000 else (500,):
        x = activations(tokens, 50, dtype)
        want = reference.vq_linear(x, *vq, None)
        error = (ops.vq_linear(x, *vq, None).double() - want).norm()
        rounded = 2e-3 if tokens == limit and integer_error(x, vq).any() else 0.0
        assert error <= (4 * torch.finfo(dtype).eps + rounded) * want.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [2, 40])
def test_gradients(tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_TILE_BYTES", 32 * 50 * dtype.itemsize)
    vq = random_vq(70, 50, 4, 8)
    x = activations(tokens, 50, dtype).view(2, tokens // 2, 50).requires_grad_()
    bias = torch.randn(70).to(dtype).requires_grad_()
    grad_y = torch.randn(2, tokens // 2, 70).to(dtype)
    ops.vq_linear(x, *vq, bias).backward(grad_y)
    want_x = grad_y.double() @ reference.vq_dequantize(*vq, torch.float64)
    want_bias = grad_y.double().sum((0, 1))
    for got, want in ((x.grad, want_x), (bias.grad, want_bias)):
        assert got is not None
        assert got.dtype == dtype
        assert (got.double() - want).norm() <= 4 * torch.finfo(dtype).eps * want.norm()


def test_second_derivatives() -> None:
    vq = random_vq(70, 50, 4, 8)
    x = activations(3, 50, torch.float32).requires_grad_()
    (grad_x,) = torch.autograd.grad(
        ops.vq_linear(x, *vq, None).square().sum(), x, create_graph=True
    )
    grad_x.sum().backward()
    weight = reference.vq_dequantize(*vq, torch.float32)
    want = 2 * (weight.sum(1) @ weight).expand(3, 50)
    torch.testing.assert_close(x.grad, want, rtol=1e-4, atol=1e-4)


def test_refuses_what_it_cannot_take() -> None:
    vq = random_vq(70, 50, 4, 8)
    x = torch.randn(3, 50)
    with pytest.raises(ValueError, match=r"x must have 50 features .*, not shape \(3, 49\)"):
        ops.vq_linear(x[:, :49], *vq, None)
    with pytest.raises(TypeError, match=r"x must be .*bfloat16, not torch\.float64"):
        ops.vq_linear(x.double(), *vq, None)
    with pytest.raises(TypeError, match=r"x must be .*bfloat16, not torch\.int64"):
        ops.vq_linear(x.long(), *vq, None)
    with pytest.raises(ValueError, match="x must be on cpu, not on meta"):
        torch.ops.nowag.vq_linear(x.to("meta"), *vq, None)
    with pytest.raises(TypeError, match=r"bias must be torch\.float32, not torch\.float16"):
        ops.vq_linear(x, *vq, torch.randn(70).half())
    with pytest.raises(ValueError, match=r"bias must have shape \(70,\), not \(69,\)"):
        ops.vq_linear(x, *vq, torch.randn(69))
    with pytest.raises(ValueError, match="vq_gemv takes at most 16 tokens, not 17"):
        ops.vq_gemv(torch.randn(17, 50), *vq, None)
    with pytest.raises(ValueError, match=r"grad_y must have 70 features .*, not shape \(3, 50\)"):
        ops.vq_linear_grad(x, *vq)


@pytest.mark.parametrize("tokens", [5, 20])
def test_opcheck(tokens: int) -> None:
    vq = random_vq(70, 50, 4, 8)
    x = torch.randn(tokens, 50, requires_grad=True)
    bias = torch.randn(70, requires_grad=True)
    torch.library.opcheck(ops.vq_linear, (x, *vq, bias))
    torch.library.opcheck(ops.vq_linear, (x, *vq, None))
    torch.library.opcheck(ops.vq_linear_grad, (torch.randn(tokens, 70, requires_grad=True), *vq))
    torch.library.opcheck(ops.vq_gemv, (torch.randn(5, 50), *vq, None))
    group = ([one, one] for one in vq)
    torch.library.opcheck(ops.vq_gemv_group, (torch.randn(5, 50), *group, [bias.detach(), None]))
