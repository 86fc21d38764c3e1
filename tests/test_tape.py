"""Tapes do what torch's operations do, on the same tensors: every operation, layout and type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import assert_same_bits
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from nowag_ext import _cpu
from nowag_ext.ops.tape import tape, tape_steps

pytestmark = pytest.mark.kernel

aten = torch.ops.aten
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Of results near 1, beside what rounding to the type loses.
CLOSE = 2e-6


def drawn(shape: Any, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).mul(3).to(dtype)


def strided(tensor: Tensor, order: tuple[int, ...], step: int) -> Tensor:
    """The same content, its dimensions in memory in this order, elements ``step`` apart."""
    moved = tensor.permute(order)
    room = torch.full((*moved.shape, step), 77, dtype=tensor.dtype)
    room[..., 0] = moved
    return room[..., 0].permute([order.index(dim) for dim in range(len(order))])


def poisoned(like: Tensor) -> Tensor:
    """Memory of this layout, which holds nothing that an operation could return."""
    filling = 99 if like.dtype == torch.int64 else float("nan")
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype).fill_(filling)


def again(func: Any, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
    """What torch returns, and what a tape writes to where that was."""
    want = func(*args, **kwargs)
    first = want[0] if isinstance(want, tuple) else want
    got = poisoned(first)
    steps = tape_steps(func, args, kwargs, (got, *want[1:]) if isinstance(want, tuple) else got)
    assert steps is not None
    tape(steps)()
    return first, got


def assert_close(want: Tensor, got: Tensor) -> None:
    # Half a unit more or less before rounding can be a whole unit after it.
    one = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[want.dtype]
    torch.testing.assert_close(got, want, rtol=one, atol=CLOSE)


EXACT: dict[str, tuple[Any, int]] = {
    "neg": (aten.neg.default, 1),
    "clone": (aten.clone.default, 1),
    "add": (aten.add.Tensor, 2),
    "sub": (aten.sub.Tensor, 2),
    "mul": (aten.mul.Tensor, 2),
    "div": (aten.div.Tensor, 2),
}
SMOOTH = {
    "silu": aten.silu.default,
    "sigmoid": aten.sigmoid.default,
    "tanh": aten.tanh.default,
}


@given(
    name=st.sampled_from(list(EXACT)),
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=4),
    last=st.sampled_from([1, 3, 16, 255, 256, 257, 600]),
    dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from([*FLOATS, torch.int64, torch.bool])),
    broadcast=st.lists(st.booleans(), min_size=5, max_size=5),
    order=st.permutations(range(5)),
    step=st.sampled_from([1, 2]),
)
def test_arithmetic_has_torchs_bits(
    name: str, shape: list[int], last: int, dtypes: Any, broadcast: Any, order: Any, step: int
) -> None:
    func, operands = EXACT[name]
    whole = [*shape, last]
    x = drawn(whole, dtypes[0])
    x = strided(x, tuple(dim for dim in order if dim < len(whole)), step)
    args: list[Any] = [x]
    if operands == 2:
        small = [1 if one else size for one, size in zip(broadcast, whole, strict=False)]
        y = drawn(small, torch.float32, 1)
        assume(name != "sub" or dtypes[1] != torch.bool)  # which torch refuses
        args.append((y > 0) if dtypes[1] == torch.bool else y.to(dtypes[1]))
    want = func(*args)
    got = poisoned(want)
    steps = tape_steps(func, args, {}, got)
    if steps is None:  # too many dimensions that cannot be walked through as one
        assert len(shape) == 4
        return
    tape(steps)()
    assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("number", [2, 0.1, -1e-6])
def test_numbers(number: Any, dtype: torch.dtype) -> None:
    x = drawn((3, 70), dtype)
    for func in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor):
        assert_same_bits(*again(func, x, number))


@pytest.mark.parametrize("dtype", FLOATS)
def test_squares_and_roots(dtype: torch.dtype) -> None:
    x = drawn((2, 300), dtype)
    assert_same_bits(*again(aten.pow.Tensor_Scalar, x, 2))
    assert_close(*again(aten.rsqrt.default, x.abs() + 0.01))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", SMOOTH)
def test_activations(name: str, dtype: torch.dtype) -> None:
    x = torch.cat([drawn(5000, dtype), torch.linspace(-30, 30, 4001).to(dtype)])
    assert_close(*again(SMOOTH[name], x))
    assert_close(*again(SMOOTH[name], (x * 1e-3).to(dtype)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_gelu_by_tanh(dtype: torch.dtype) -> None:
    x = torch.cat([drawn(5000, dtype), torch.linspace(-30, 30, 4001).to(dtype)])
    want, got = again(aten.gelu.default, x, approximate="tanh")
    torch.testing.assert_close(got, want, rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=1e-6)
    assert tape_steps(aten.gelu.default, (x,), {}, x) is None  # by erf


def test_float32_activations_are_within_a_few_units() -> None:
    x = torch.linspace(-20, 20, 100_001)
    exact = x.double() / (1 + torch.exp(-x.double()))
    _, got = again(aten.silu.default, x)
    assert float(((got - exact) / exact).abs().nan_to_num().max()) < 4e-7


def test_infinities_and_nan() -> None:
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1e-40, 3e38] * 5)
    for func in (aten.add.Tensor, aten.mul.Tensor):
        want, got = again(func, x, x.flip(0))
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    for func in SMOOTH.values():
        _, got = again(func, x)
        assert torch.equal(got.isnan(), x.isnan()) or func is aten.silu.default
        assert bool(got[2].isnan())
    for dtype in (torch.float16, torch.bfloat16):
        want, got = again(aten._to_copy.default, x, dtype=dtype)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("given_dtype", [*FLOATS, torch.int64, torch.bool])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64])
def test_conversions(given_dtype: torch.dtype, dtype: torch.dtype) -> None:
    x = drawn((5, 130), torch.float32)
    x = x > 0 if given_dtype == torch.bool else x.to(given_dtype)
    if dtype == torch.int64 and given_dtype.is_floating_point:
        assert tape_steps(aten._to_copy.default, (x,), {"dtype": dtype}, x.long()) is None
    else:
        assert_same_bits(*again(aten._to_copy.default, x, dtype=dtype))


def test_integers_stay_exact() -> None:
    x = torch.tensor([2**53 + 1, -5, 2**24 + 1])
    assert_same_bits(*again(aten.add.Tensor, x, torch.tensor(7)))
    assert_same_bits(*again(aten.add.Tensor, x, 3))
    assert tape_steps(aten.mul.Tensor, (x, x), {}, x) is None


def test_in_place() -> None:
    count = torch.tensor(41)
    (step,) = tape_steps(aten.add_.Tensor, (count, 1), {}, count) or []
    counting = tape([step])
    for _ in range(3):
        counting()
    assert int(count) == 44
    x, y = drawn((4, 33), torch.bfloat16), drawn((33,), torch.bfloat16, 1)
    for func in (aten.add_.Tensor, aten.mul_.Tensor, aten.copy_.default):
        got = x.clone()
        tape(tape_steps(func, (got, y), {}, got) or [])()
        assert_same_bits(got, func(x.clone(), y))


@pytest.mark.parametrize("dtype", FLOATS)
def test_selection(dtype: torch.dtype) -> None:
    chosen = drawn((2, 1, 300), torch.float32) > 0
    x, y = drawn((2, 4, 300), dtype), torch.tensor(float("-inf"), dtype=dtype)
    assert_same_bits(*again(aten.where.self, chosen, x, y))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("last", [1, 5, 16, 64, 257, 2048, 5000])
def test_means(last: int, dtype: torch.dtype) -> None:
    x = drawn((2, 3, last), dtype) + 1
    for dim, keepdim in (([-1], True), ([2], False)):
        assert_close(*again(aten.mean.dim, x, dim, keepdim))
    assert_close(*again(aten.mean.dim, x.transpose(0, 1), [-1], True))
    assert tape_steps(aten.mean.dim, (x, [0]), {}, x.mean(0)) is None


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_concatenations(dim: int) -> None:
    parts = [drawn((3, 4, 20), torch.bfloat16, seed) for seed in range(3)]
    parts[1] = parts[1].transpose(0, 1).contiguous().transpose(0, 1)
    assert_same_bits(*again(aten.cat.default, parts, dim))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_rows_by_index(dim: int, dtype: torch.dtype) -> None:
    cache = drawn((6, 7, 8), dtype)
    index = torch.tensor([5, 0])
    source = drawn([2 if d == dim else n for d, n in enumerate(cache.shape)], dtype, 1)
    source = source.transpose(0, 1).contiguous().transpose(0, 1)
    want = cache.clone().index_copy_(dim, index, source)
    (step,) = tape_steps(aten.index_copy_.default, (cache, dim, index, source), {}, cache) or []
    copying = tape([step])
    copying()
    assert_same_bits(cache, want)
    for bad in (-1, cache.shape[dim]):
        index[1] = bad
        with pytest.raises(ValueError, match="tape_run: an argument is outside the contract"):
            copying()
        assert_same_bits(cache, want)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys", "features"),
    [
        (1, 1, 1, 1, 8),
        (1, 8, 4, 33, 64),
        (2, 3, 3, 200, 64),
        (1, 2, 32, 65, 100),
        (1, 1, 7, 300, 256),
    ],
)
@pytest.mark.parametrize("mask", ["none", "shared", "own"])
def test_attention(
    batch: int, heads: int, queries: int, keys: int, features: int, mask: str, dtype: torch.dtype,
    threads: int,
) -> None:  # fmt: skip
    query = drawn((batch, heads, queries, features), dtype) / 3
    key, value = (
        drawn((batch, keys + 9, heads, features), dtype, seed).transpose(1, 2)[:, :, :keys]
        for seed in (1, 2)
    )
    added = None
    if mask != "none":
        shape = (1, 1, 1, keys) if mask == "shared" else (batch, heads, queries, keys)
        added = drawn(shape, dtype, 3).clamp(-2, 2)
        added[..., 0 if keys == 1 else keys // 2 + 1 :].fill_(float("-inf"))
        added[..., :1] = 0.0
    func = aten._scaled_dot_product_flash_attention_for_cpu.default
    for scale in (None, 0.2):
        options = {"attn_mask": added, "scale": scale}
        want = func(query.float(), key.float(), value.float(), **{
            **options, "attn_mask": None if added is None else added.float()
        })[0]  # fmt: skip
        _, got = again(func, query, key, value, **options)
        torch.testing.assert_close(got, want.to(dtype), rtol=1e-2, atol=3e-6)
    torch.set_num_threads(1)
    _, alone = again(func, query, key, value, **options)
    torch.set_num_threads(threads)
    assert_same_bits(got, alone)


def test_what_no_key_is_visible_to() -> None:
    """As torch: it attends to nothing."""
    query, key = drawn((1, 1, 2, 8), torch.float32), drawn((1, 1, 5, 8), torch.float32, 1)
    mask = torch.zeros(1, 1, 2, 5)
    mask[0, 0, 0] = float("-inf")
    func = aten._scaled_dot_product_flash_attention_for_cpu.default
    want, got = again(func, query, key, key, attn_mask=mask)
    torch.testing.assert_close(got, want)
    assert not got[..., 0, :].any()


def test_what_tapes_do_not_have() -> None:
    x = drawn((1, 2, 3, 8), torch.float32)
    func = aten._scaled_dot_product_flash_attention_for_cpu.default
    out = func(x, x, x)
    for args, kwargs in (
        ((x, x, x, 0.0, True), {}),
        ((x, x, x, 0.5), {}),
        ((x, x[:, :1], x[:, :1]), {}),
    ):
        assert tape_steps(func, args, kwargs, out) is None
    assert tape_steps(aten.mul.Tensor, (x.double(), x), {}, x.double()) is None
    assert tape_steps(aten.add.Tensor, (x, x), {"alpha": 2}, x) is None
    assert tape_steps(aten.pow.Tensor_Scalar, (x, 3), {}, x) is None
    half = torch.tensor(0.1)
    for func in (aten.add.Tensor, aten.mul.Tensor):  # which torch rounds first
        assert tape_steps(func, (half, x.half()), {}, x.half()) is None
    number = torch.tensor(1.0)
    assert tape_steps(aten.mean.dim, (number, [-1]), {}, number) is None
    assert tape_steps(aten.exp.default, (x,), {}, x) is None
    assert tape_steps(aten.neg.default, (x[..., :0],), {}, x[..., :0]) is None
    many = drawn((2, 2, 2, 2, 2), torch.float32)
    assert tape_steps(aten.neg.default, (many.permute(4, 3, 2, 1, 0),), {}, many) is None
    odd = torch.frombuffer(bytearray(17), dtype=torch.float32, count=2, offset=1)
    assert tape_steps(aten.neg.default, (odd,), {}, torch.empty(2)) is None


@pytest.mark.parametrize("word", [0, 1, 5, 6, 12])
def test_words_that_are_no_step(word: int) -> None:
    """An operation, a size, an address or a type that there is none of."""
    x, out = drawn(4, torch.float32), torch.zeros(4)
    (step,) = tape_steps(aten.neg.default, (x,), {}, out) or []
    for value in {0: (-1, 99), 1: (-1, 0), 5: (0,), 6: (-1, 99), 12: (-1, 99)}[word]:
        words = torch.tensor([[*step.words[:word], value, *step.words[word + 1 :]]])
        with pytest.raises(ValueError, match="tape_run: an argument is outside the contract"):
            _cpu.tape_run(words.data_ptr(), 1, 1)
    assert not out.any()


def test_order() -> None:
    x, y = drawn(50, torch.float32), torch.empty(50)
    z = torch.empty(50)
    steps: list[Any] = []
    calls: list[tuple[Callable[..., Any], Any, Tensor]] = [
        (aten.neg.default, (x,), y),
        (aten.mul.Tensor, (y, 3.0), z),
        (aten.add.Tensor, (z, y), z),
    ]
    for func, args, out in calls:
        steps += tape_steps(func, args, {}, out) or []
    tape(steps)()
    torch.testing.assert_close(z, -4 * x)
