"""The VQ GEMV on the host SIMT executor (simt_cases.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import assert_same_bits
from simt_cases import (
    CODES,
    DTYPES,
    VQ_SHAPES,
    assert_within_bound,
    needs_compiler,
    poisoned,
    randn,
    vq_weight,
)
from simt_host import Driver
from torch import Tensor

from nowag_ext import reference

pytestmark = needs_compiler


def lost_by_split(x: Tensor, vq: tuple[Tensor, ...], positions: int, d: int) -> Tensor:
    """The term that vq_gemv.h adds to the bound for kernels that split inputs, in such runs."""
    codes, codebook, row_norms, col_norms = vq
    ones = torch.ones_like(col_norms)
    entries = (
        reference.vq_dequantize(codes, codebook, row_norms, ones, torch.float32).double().abs()
    )
    lost = torch.zeros(len(x), len(row_norms), dtype=torch.float64)
    for run in range(0, len(col_norms), positions * d):
        columns = slice(run, run + positions * d)
        largest = (x[:, columns].double() * col_norms[columns].double()).abs().amax(1)
        lost += 2.0**-39 * largest[:, None] * entries[:, columns].sum(1)
    return lost


def looks_up_pairs(x: Tensor, d: int, code_bits: int) -> bool:
    return (d, code_bits, len(x)) == (6, 12, 2) and x.dtype != torch.float32


def lost_by_pairs(
    x: Tensor, vq: tuple[Tensor, ...], weight: Tensor, d: int, code_bits: int
) -> Tensor | float:
    """What vq_gemv.h adds to the bound for lookup of float16."""
    if not looks_up_pairs(x, d, code_bits):
        return 0.0
    _, codebook, row_norms, col_norms = vq
    sums = (x.double() * col_norms.double()).abs().sum(1)
    most = codebook.double().abs().max().clamp(2.0**-24)
    floor = 2.0**-112 * -(-len(col_norms) // d)
    lost = 2.0**-38 * (sums * most + floor)[:, None] * row_norms.double()
    return 5e-4 * (x.double().abs() @ weight.abs().T) + lost


def fewest_tokens(x: Tensor, d: int, code_bits: int) -> int:
    """How few tokens give a token the bits that it has among x (vq_gemv.h)."""
    tokens = len(x)
    if tokens > 16:
        return 17
    if (d, code_bits) != (6, 12) or tokens == 1:
        return 1
    return 2 if x.dtype == torch.float32 or tokens == 2 else 3


def run_vq_gemv(
    driver: Driver,
    x: Tensor,
    vq: tuple[Tensor, Tensor, Tensor, Tensor],
    d: int,
    code_bits: int,
    bias: Tensor | None,
    seed: int,
) -> Tensor:
    rows, cols = len(vq[2]), len(vq[3])
    y = poisoned(len(x), rows, dtype=x.dtype)
    arguments = [x.contiguous(), CODES[x.dtype], len(x), *vq, bias, rows, cols, d, code_bits, y]
    assert driver.run("vq_gemv", *arguments, seed=seed) == 0
    return y


def assert_last_token_does_not_depend_on_others(
    driver: Driver,
    y: Tensor,
    x: Tensor,
    vq: tuple[Tensor, Tensor, Tensor, Tensor],
    d: int,
    code_bits: int,
    bias: Tensor | None,
) -> None:
    """It has the same bits as the first of as few tokens as can be."""
    few = x[len(x) - fewest_tokens(x, d, code_bits) :].flip(0)
    again = run_vq_gemv(driver, few, vq, d, code_bits, bias, seed=0)
    assert_same_bits(y[-1:], again[:1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols", "d", "code_bits"), VQ_SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 16])
def test_vq_gemv(
    driver: Driver, rows: int, cols: int, d: int, code_bits: int, tokens: int, dtype: torch.dtype
) -> None:
    vq = vq_weight(rows, cols, d, code_bits, seed=130)
    x = randn(16, cols, seed=131).to(dtype)
    bias = randn(rows, seed=132).to(dtype) if tokens % 2 else None
    y = run_vq_gemv(driver, x[:tokens], vq, d, code_bits, bias, seed=tokens % 4)
    weight = reference.vq_dequantize(*vq, torch.float32).double()
    lost = lost_by_pairs(x[:tokens], vq, weight, d, code_bits)
    assert_within_bound(y, x[:tokens], weight, bias, lost)
    assert_last_token_does_not_depend_on_others(driver, y, x[:tokens], vq, d, code_bits, bias)


FAST = [(6, 12), (4, 8), (4, 12)]
TWO_QUICK = [*FAST[:2], pytest.param(*FAST[2], marks=pytest.mark.slow)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "code_bits"), TWO_QUICK)
# One row; one chunk and two chunks of rows; a band's tail; one and several segments, and a tail of
# positions; more items than blocks, the last of one segment shorter.
@pytest.mark.parametrize(
    ("rows", "cols"),
    [
        (1, 50),
        pytest.param(4130, 100, marks=pytest.mark.slow),
        (300, 203),
        (192, 401),
        (70, 1601),
    ],
)
def test_vq_gemv_fast_paths(
    driver: Driver, rows: int, cols: int, d: int, code_bits: int, dtype: torch.dtype
) -> None:
    if (rows > 4096 or cols > 1000) and dtype != torch.float16:
        pytest.skip("the large cases in one dtype are enough")
    vq = vq_weight(rows, cols, d, code_bits, seed=160)
    x, bias = randn(16, cols, seed=161).to(dtype), randn(rows, seed=162).to(dtype)
    weight = reference.vq_dequantize(*vq, torch.float32).double()
    first: dict[int, Tensor] = {}
    for tokens in (1, 2, 3, 8, 11, 16):
        y = run_vq_gemv(driver, x[:tokens], vq, d, code_bits, bias, seed=tokens % 4)
        lost = lost_by_pairs(x[:tokens], vq, weight, d, code_bits)
        assert_within_bound(y, x[:tokens], weight, bias, lost)
        assert_same_bits(y[:1], first.setdefault(fewest_tokens(x[:tokens], d, code_bits), y[:1]))


# Clusters of what size takes least; of three alone, of eight alone, some of whose blocks have no
# step.
CLUSTERS = pytest.mark.parametrize(
    "clustered_driver",
    ["3,1,1", "0,0,2", pytest.param("0,0,0,0,0,0,0,1", marks=pytest.mark.slow)],
    indirect=True,
)


# One item; more items than clusters, a tail of rows; a segment of several turns.
@CLUSTERS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "code_bits"), FAST)
@pytest.mark.parametrize(
    ("rows", "cols"),
    [(1, 5), (300, 203), (70, 1601), pytest.param(1100, 803, marks=pytest.mark.slow)],
)
def test_vq_gemv_in_clusters(
    clustered_driver: Driver, rows: int, cols: int, d: int, code_bits: int, dtype: torch.dtype
) -> None:
    if (rows > 300 or cols > 1000) and dtype != torch.float16:
        pytest.skip("the large cases in one dtype are enough")
    vq = vq_weight(rows, cols, d, code_bits, seed=160)
    x, bias = randn(8, cols, seed=161).to(dtype), randn(rows, seed=162).to(dtype)
    weight = reference.vq_dequantize(*vq, torch.float32).double()
    first: dict[int, Tensor] = {}
    for tokens in (1, 2, 3, 8):
        y = run_vq_gemv(clustered_driver, x[:tokens], vq, d, code_bits, bias, seed=tokens % 4)
        lost = lost_by_pairs(x[:tokens], vq, weight, d, code_bits)
        assert_within_bound(y, x[:tokens], weight, bias, lost)
        assert_same_bits(y[:1], first.setdefault(fewest_tokens(x[:tokens], d, code_bits), y[:1]))


# Both numbers of sets; fewer positions than stages, a stage's tail, stages used again and again.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "cols"),
    [(1, 5), (70, 50), (300, 1601), pytest.param(4130, 500, marks=pytest.mark.slow)],
)
def test_vq_gemv_looks_up_in_many_stages(
    driver: Driver, roomy_driver: Driver, rows: int, cols: int, dtype: torch.dtype
) -> None:
    vq = vq_weight(rows, cols, 6, 12, seed=165)
    x, bias = randn(1, cols, seed=166).to(dtype), randn(rows, seed=167).to(dtype)
    y = run_vq_gemv(roomy_driver, x, vq, 6, 12, bias, seed=1)
    assert_within_bound(y, x, reference.vq_dequantize(*vq, torch.float32).double(), bias)
    assert_same_bits(y, run_vq_gemv(driver, x, vq, 6, 12, bias, seed=2))


# One and two sets of sums, several chunks; as above.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "cols"),
    [(1, 5), (70, 50), (300, 1601), *(pytest.param(n, 200, marks=pytest.mark.slow)
                                      for n in (4130, 8230))],
)  # fmt: skip
def test_vq_gemv_looks_up_pairs(
    driver: Driver, roomy_driver: Driver, rows: int, cols: int, dtype: torch.dtype
) -> None:
    vq = vq_weight(rows, cols, 6, 12, seed=165)
    x, bias = randn(2, cols, seed=166).to(dtype), randn(rows, seed=167).to(dtype)
    y = run_vq_gemv(roomy_driver, x, vq, 6, 12, bias, seed=1)
    weight = reference.vq_dequantize(*vq, torch.float32).double()
    assert_within_bound(y, x, weight, bias, lost_by_pairs(x, vq, weight, 6, 12))
    for seed in (2, 3):
        swapped = run_vq_gemv(driver, x.flip(0), vq, 6, 12, bias, seed=seed)
        assert_same_bits(y, swapped.flip(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [2.0**-20, 1.0, 2.0**12, 0.0], ids=str)
@pytest.mark.parametrize("kind", ["1", "outliers", "1e-6", "one zero", "all sizes", "1e30"])
def test_vq_gemv_pairs_of_extreme_inputs(
    driver: Driver, kind: str, size: float, dtype: torch.dtype
) -> None:
    codes, codebook, *norms = vq_weight(70, 205, 6, 12, seed=172)
    vq = (codes, (codebook.float() * size).half(), *norms)
    x = randn(2, 205, seed=173)
    if kind == "outliers":
        x[:, 7::40] *= 3e3
    elif kind == "one zero":
        x[1] = 0.0
    elif kind == "all sizes":
        x *= 10.0 ** (8 * torch.rand(205, generator=torch.Generator().manual_seed(174)) - 5)
    elif kind != "1":
        x[1] *= min(float(kind), torch.finfo(dtype).max / 8)
    x = x.to(dtype)
    y = run_vq_gemv(driver, x, vq, 6, 12, None, seed=2)
    weight = reference.vq_dequantize(*vq, torch.float32).double()
    inside = (x.double() @ weight.T).abs() < torch.finfo(dtype).max / 2
    lost = lost_by_pairs(x, vq, weight, 6, 12)
    assert_within_bound(
        y.where(inside, 0.0), x, weight, None, lost + (~inside) * (x.double() @ weight.T).abs()
    )
    alone = x.clone()
    alone[1] = randn(205, seed=175).to(dtype)
    assert_same_bits(y[:1], run_vq_gemv(driver, alone, vq, 6, 12, None, seed=3)[:1])
    assert_same_bits(y, run_vq_gemv(driver, x.flip(0), vq, 6, 12, None, seed=4).flip(0))
    if kind == "one zero":
        assert not y[1].any()


# Which warp holds it: all must know it, or its products overflow.
@pytest.mark.parametrize("entry", [0, 37, 4095])
def test_vq_gemv_pairs_of_a_codebook_with_one_large_entry(driver: Driver, entry: int) -> None:
    codes, codebook, *norms = vq_weight(70, 205, 6, 12, seed=176)
    codebook[entry] = 6e4
    codes[0, 3] = 0xFF if entry == 4095 else 0  # 32 codes of the last entry, or the first
    vq = (codes, codebook, *norms)
    x = (1e-2 * randn(2, 205, seed=177)).bfloat16()
    y = run_vq_gemv(driver, x, vq, 6, 12, None, seed=2)
    weight = reference.vq_dequantize(*vq, torch.float32).double()
    assert_within_bound(y, x, weight, None, lost_by_pairs(x, vq, weight, 6, 12))


@pytest.mark.parametrize(("d", "code_bits"), TWO_QUICK)
@pytest.mark.parametrize("tokens", [1, 2, 3, 11])
@pytest.mark.parametrize("kind", ["1e30", "1e-30", "subnormal", "zero", "outliers", "all sizes"])
def test_vq_gemv_of_extreme_inputs(
    driver: Driver, d: int, code_bits: int, tokens: int, kind: str
) -> None:
    check_extreme_inputs(driver, d, code_bits, tokens, kind)


@CLUSTERS
@pytest.mark.parametrize(("d", "code_bits"), TWO_QUICK)
@pytest.mark.parametrize("kind", ["1e30", "1e-30", "subnormal", "zero", "outliers", "all sizes"])
def test_vq_gemv_in_clusters_of_extreme_inputs(
    clustered_driver: Driver, d: int, code_bits: int, kind: str
) -> None:
    check_extreme_inputs(clustered_driver, d, code_bits, 3, kind)


def check_extreme_inputs(driver: Driver, d: int, code_bits: int, tokens: int, kind: str) -> None:
    rows, cols = 70, 205
    vq = vq_weight(rows, cols, d, code_bits, seed=170)
    x = randn(tokens, cols, seed=171)
    if kind == "outliers":
        x[:, 7::40] *= 1e4
    elif kind == "all sizes":
        x *= 10.0 ** (20 * torch.rand(cols, generator=torch.Generator().manual_seed(172)) - 10)
    else:
        x *= {"1e30": 1e30, "1e-30": 1e-30, "subnormal": 1e-39, "zero": 0.0}[kind]
    y = run_vq_gemv(driver, x, vq, d, code_bits, None, seed=2)
    weight = reference.vq_dequantize(*vq, torch.float32).double()
    # float32 itself loses 2^-150 of a subnormal input times its norm.
    below = 2.0**-149 * weight.abs().sum(1) / vq[3].double().min()
    assert_within_bound(y, x, weight, None, lost_by_split(x, vq, 8, d) + below)
    if kind == "outliers":  # of a model: nothing is lost that counts
        assert_within_bound(y, x, weight, None)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "code_bits"), [(6, 12), (4, 8), (3, 9)])
@pytest.mark.parametrize("tokens", [2, 11])
def test_vq_gemv_of_inputs_that_are_not_finite(
    driver: Driver, d: int, code_bits: int, tokens: int, dtype: torch.dtype, bad: float
) -> None:
    check_not_finite(driver, d, code_bits, tokens, dtype, bad)


@CLUSTERS
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize(("d", "code_bits"), FAST)
def test_vq_gemv_in_clusters_of_inputs_that_are_not_finite(
    clustered_driver: Driver, d: int, code_bits: int, bad: float
) -> None:
    check_not_finite(clustered_driver, d, code_bits, 5, torch.bfloat16, bad)


def check_not_finite(
    driver: Driver, d: int, code_bits: int, tokens: int, dtype: torch.dtype, bad: float
) -> None:
    vq = vq_weight(40, 97, d, code_bits, seed=180)
    x = randn(tokens, 97, seed=181).to(dtype)
    want = run_vq_gemv(driver, x, vq, d, code_bits, None, seed=2)
    x[1, 60] = bad
    y = run_vq_gemv(driver, x, vq, d, code_bits, None, seed=2)
    assert not y[1].isfinite().any()
    others = torch.arange(tokens) != 1
    assert_same_bits(y[others], want[others])


# One launch's: rows that differ in tiles, chunks and sets of sums, more items than blocks, one row;
# where codebooks may differ, and where they must not.
TOGETHER = [
    (6, 12, 1, [300, 33, 1], False),
    (6, 12, 1, [128] * 8, True),
    pytest.param(6, 12, 1, [4130, 70], False, marks=pytest.mark.slow),
    (4, 8, 1, [300, 33, 1, 192], True),
    (4, 8, 8, [64, 300], True),
    (6, 12, 2, [300, 33, 1], True),
    (6, 12, 2, [130, 33, 1], False),
    (6, 12, 3, [300, 33, 1], True),
    pytest.param(6, 12, 2, [4130, 70], True, marks=pytest.mark.slow),
    (6, 12, 3, [300, 33, 1], True),
    (4, 12, 7, [70, 130], True),
]
# Not: other codebooks, more than an octet, no tensor cores; two forms.
APART = [
    (4, 8, 2, [70, 33], False),
    (6, 12, 11, [70, 33], True),
    (3, 9, 2, [70, 33, 40], True),
]


def run_group(
    driver: Driver, x: Tensor, members: list[tuple[Any, ...]], seed: int
) -> tuple[int, list[Tensor]]:
    """(status, outputs) for members of (vq, bias, d, code_bits)."""
    words: list[Any] = []
    outputs = []
    for vq, bias, d, code_bits in members:
        outputs.append(poisoned(len(x), len(vq[2]), dtype=x.dtype))
        words += [*vq, bias, len(vq[2]), d, code_bits, outputs[-1]]
    arguments = [x, CODES[x.dtype], len(x), x.shape[1], words, len(members)]
    return driver.run("vq_gemv_group", *arguments, seed=seed), outputs


def members_of(
    rows: list[int], cols: int, d: int, code_bits: int, shared: bool, dtype: torch.dtype
) -> list[tuple[Any, ...]]:
    members = []
    for index, height in enumerate(rows):
        codes, codebook, *norms = vq_weight(height, cols, d, code_bits, seed=230 + index)
        if shared and members:
            codebook = members[0][0][1]
        bias = randn(height, seed=240 + index).to(dtype) if index % 2 else None
        members.append(((codes, codebook, *norms), bias, d, code_bits))
    return members


def check_group(
    driver: Driver,
    d: int,
    code_bits: int,
    tokens: int,
    rows: list[int],
    shared: bool,
    cols: int,
    dtype: torch.dtype,
) -> None:
    """Bounds, and the same bits whatever the order of threads."""
    if sum(rows) > 600 and cols > 100 and dtype != torch.float16:
        pytest.skip("the large cases in one dtype are enough")
    members = members_of(rows, cols, d, code_bits, shared, dtype)
    x = randn(tokens, cols, seed=250).to(dtype)
    status, outputs = run_group(driver, x, members, seed=1)
    assert status == 0
    for y, (vq, bias, *_) in zip(outputs, members, strict=True):
        weight = reference.vq_dequantize(*vq, torch.float32).double()
        assert_within_bound(y, x, weight, bias, lost_by_pairs(x, vq, weight, d, code_bits))
    _, again = run_group(driver, x, members, seed=2)
    for one, other in zip(outputs, again, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("cols", [50, 803])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "code_bits", "tokens", "rows", "shared"), TOGETHER)
def test_vq_gemv_group(
    roomy_driver: Driver,
    d: int,
    code_bits: int,
    tokens: int,
    rows: list[int],
    shared: bool,
    cols: int,
    dtype: torch.dtype,
) -> None:
    check_group(roomy_driver, d, code_bits, tokens, rows, shared, cols, dtype)


# Clusters go from one member to the next, whose inputs are others.
@CLUSTERS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "code_bits", "tokens", "rows", "shared"), TOGETHER[3:])
def test_vq_gemv_group_in_clusters(
    clustered_driver: Driver,
    d: int,
    code_bits: int,
    tokens: int,
    rows: list[int],
    shared: bool,
    dtype: torch.dtype,
) -> None:
    check_group(clustered_driver, d, code_bits, tokens, rows, shared, 403, dtype)


@pytest.mark.parametrize(("d", "code_bits", "tokens", "rows", "shared"), APART)
def test_vq_gemv_group_of_launches_of_their_own(
    driver: Driver, d: int, code_bits: int, tokens: int, rows: list[int], shared: bool
) -> None:
    members = members_of(rows, 205, d, code_bits, shared, torch.float16)
    members.append(members_of([45], 205, 2, 6, False, torch.float16)[0])
    x = randn(tokens, 205, seed=260).half()
    status, outputs = run_group(driver, x, members, seed=1)
    assert status == 0
    for y, (vq, bias, *form) in zip(outputs, members, strict=True):
        assert_same_bits(y, run_vq_gemv(driver, x, vq, *form, bias, seed=2))


def test_vq_gemv_group_outside_the_contract(driver: Driver) -> None:
    members = members_of([33, 40], 50, 4, 8, True, torch.float16)
    x = randn(2, 50, seed=270).half()
    wrong = [(*members[0][:2], 9, 8), members[1]]
    for group, tokens in ((wrong, x), ([], x), (members * 5, x), (members, x.repeat(9, 1))):
        status, outputs = run_group(driver, tokens, group, seed=1)
        assert status != 0
        assert all(y.isnan().all() for y in outputs)


def lost_by_batch(x: Tensor, vq: tuple[Tensor, ...], weight: Tensor, d: int) -> Tensor:
    """What vq_gemv.h adds to the bound for 17 tokens and more."""
    rounding = 5.7e-4 * (x.double().abs() @ weight.abs().T)
    return rounding + lost_by_split(x, vq, len(vq[3]), d)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("d", "code_bits"), TWO_QUICK)
# One row; a band's tail; several segments, more items than blocks, an odd number of rows.
@pytest.mark.parametrize(
    ("rows", "cols", "tokens"),
    [
        (1, 50, 17),
        (70, 401, 33),
        (300, 203, 64),
        pytest.param(71, 1601, 32, marks=pytest.mark.slow),
        pytest.param(192, 97, 48, marks=pytest.mark.slow),
    ],
)
def test_vq_gemv_batch(
    driver: Driver, rows: int, cols: int, tokens: int, d: int, code_bits: int, dtype: torch.dtype
) -> None:
    vq = vq_weight(rows, cols, d, code_bits, seed=190)
    x, bias = randn(64, cols, seed=191).to(dtype), randn(rows, seed=192).to(dtype)
    weight = reference.vq_dequantize(*vq, torch.float32).double()
    y = run_vq_gemv(driver, x[:tokens], vq, d, code_bits, bias, seed=tokens % 3)
    assert_within_bound(y, x[:tokens], weight, bias, lost_by_batch(x[:tokens], vq, weight, d))
    assert_last_token_does_not_depend_on_others(driver, y, x[:tokens], vq, d, code_bits, bias)


@pytest.mark.parametrize(("d", "code_bits"), TWO_QUICK)
@pytest.mark.parametrize("kind", ["large", "small", "outliers", "all sizes", "a zero token"])
def test_vq_gemv_batch_of_extreme_inputs(driver: Driver, d: int, code_bits: int, kind: str) -> None:
    rows, cols, tokens = 70, 205, 18
    vq = vq_weight(rows, cols, d, code_bits, seed=200)
    x = randn(tokens, cols, seed=201)
    if kind == "outliers":
        x[:, 7::40] *= 1e4
    elif kind == "all sizes":
        x *= 10.0 ** (20 * torch.rand(cols, generator=torch.Generator().manual_seed(202)) - 10)
    elif kind == "a zero token":
        x[5] = 0.0
    else:
        x *= {"large": 1e30, "small": 1e-36}[kind]
    x = x.bfloat16()
    y = run_vq_gemv(driver, x, vq, d, code_bits, None, seed=2)
    weight = reference.vq_dequantize(*vq, torch.float32).double()
    # float32 itself loses 2^-150 of a subnormal input times its norm.
    below = 2.0**-149 * weight.abs().sum(1) / vq[3].double().min()
    assert_within_bound(y, x, weight, None, lost_by_batch(x, vq, weight, d) + below)
    if kind == "a zero token":
        assert not y[5].any()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize(("d", "code_bits"), FAST)
def test_vq_gemv_batch_of_inputs_that_are_not_finite(
    driver: Driver, d: int, code_bits: int, bad: float
) -> None:
    vq = vq_weight(40, 97, d, code_bits, seed=210)
    x = randn(20, 97, seed=211).half()
    want = run_vq_gemv(driver, x, vq, d, code_bits, None, seed=2)
    x[9, 60] = bad
    y = run_vq_gemv(driver, x, vq, d, code_bits, None, seed=2)
    assert not y[9].isfinite().any()
    others = torch.arange(20) != 9
    assert_same_bits(y[others], want[others])


def test_vq_gemv_takes_more_tokens_of_16_bits_where_tensor_cores_decode(driver: Driver) -> None:
    for d, code_bits, dtype, most in (
        (6, 12, torch.bfloat16, 64),
        (4, 8, torch.float16, 64),
        (6, 12, torch.float32, 16),
        (6, 11, torch.bfloat16, 16),
        (3, 12, torch.bfloat16, 16),
    ):
        vq = vq_weight(33, 20, d, code_bits, seed=220)
        for tokens, taken in ((most, True), (most + 1, False)):
            x, y = randn(tokens, 20, seed=221).to(dtype), poisoned(tokens, 33, dtype=dtype)
            arguments = [x, CODES[dtype], tokens, *vq, None, 33, 20, d, code_bits, y]
            assert (driver.run("vq_gemv", *arguments) == 0) == taken
            assert y.isnan().any() != taken
