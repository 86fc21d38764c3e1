"""Error feedback's kernel on the host SIMT executor (simt_cases.py)."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same_bits
from simt_cases import SEEDS, first_is_quick, needs_compiler, poisoned
from simt_host import Driver
from test_kmeans_feedback import CASES, SCALE, problem
from torch import Tensor

from nowag_ext import ops, reference

pytestmark = needs_compiler


def run(
    driver: Driver,
    operands: tuple[Tensor, Tensor, Tensor, Tensor],
    seed: int,
    *,
    apart: int = 0,
    with_sums: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes, errors, carried, sums; rows of x and of the factor `apart` floats further apart."""
    x, carried, factor, codebook = operands
    (rows, columns), (entries, d) = x.shape, codebook.shape
    wide_x, wide_factor = poisoned(rows, columns + apart), poisoned(columns, columns + apart)
    wide_x[:, :columns], wide_factor[:, :columns] = x, factor
    carried = carried.clone()
    codes = poisoned(rows, columns // d, dtype=torch.uint16)
    sums = torch.ones(entries, ops.feedback_sums_columns(d), dtype=torch.int64)
    arguments = [
        wide_x, columns + apart, carried, wide_factor, columns + apart, codebook, rows,
        columns // d, entries, d, codes, SCALE, sums if with_sums else None,
    ]  # fmt: skip
    assert driver.run("kmeans_feedback", *arguments, seed=seed) == 0
    assert wide_x[:, columns:].isnan().all()
    return codes, wide_x[:, :columns].contiguous(), carried, sums - 1


def assert_agrees(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for name, one, other in zip(("codes", "errors", "carried", "sums"), got, want, strict=False):
        assert_same_bits(one, other, name)


# Several blocks; fewer entries than threads; chunks that are and that are not all of them.
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "case", [*CASES, *first_is_quick((150, 2, 4, 3), (100, 2, 6, 12), (9, 2, 8, 13))], ids=str
)
def test_bits_are_those_of_the_oracle(driver: Driver, case: tuple[int, ...], seed: int) -> None:
    operands = problem(*case)
    assert_agrees(run(driver, operands, seed), reference.kmeans_feedback(*operands, SCALE))


def test_strides_and_no_sums(driver: Driver) -> None:
    operands = problem(37, 4, 3, 6)
    want = reference.kmeans_feedback(*operands, SCALE)
    assert_agrees(run(driver, operands, 2, apart=5), want)
    *got, sums = run(driver, operands, 1, with_sums=False)
    assert_agrees(tuple(got), want[:3])
    assert not sums.any()


def test_equal_scores_give_the_lowest_entry(driver: Driver) -> None:
    """Entries of which each is there many times, in several threads and groups."""
    x, carried, factor, codebook = problem(40, 3, 2, 9)
    codebook = codebook[:5].repeat(103, 1)[:512].contiguous()
    want = reference.kmeans_feedback(x, carried, factor, codebook, SCALE)
    assert int(want[0].to(torch.int32).max()) < 5
    assert_agrees(run(driver, (x, carried, factor, codebook), 2), want)


def test_padding_and_zeros(driver: Driver) -> None:
    """Columns that stand for nothing, and a metric of zeros, where every entry is as good."""
    x, carried, factor, codebook = problem(20, 3, 4, 5)
    factor[5] = factor[:, 5] = 0.0
    factor[8:, 8:] = 0.0
    carried[:, 8:] = 0.0
    x[:, 5] = carried[:, 5] = 0.0
    operands = (x, carried, factor, codebook)
    assert_agrees(run(driver, operands, 2), reference.kmeans_feedback(*operands, SCALE))


def test_refusals(driver: Driver) -> None:
    x, carried, factor, codebook = problem(4, 2, 3, 4)
    codes = poisoned(4, 2, dtype=torch.uint16)
    for x_stride, factor_stride, rows, positions, entries, d in (
        (5, 6, 4, 2, 16, 3), (6, 5, 4, 2, 16, 3), (6, 6, 0, 2, 16, 3), (6, 6, 4, 0, 16, 3),
        (6, 6, 4, 2, 0, 3), (6, 6, 4, 2, 65537, 3), (18, 18, 4, 2, 16, 9), (6, 6, 4, 2, 16, 0),
    ):  # fmt: skip
        arguments = [
            x, x_stride, carried, factor, factor_stride, codebook, rows, positions, entries, d,
            codes, SCALE, None,
        ]  # fmt: skip
        assert driver.run("kmeans_feedback", *arguments) != 0
    assert (codes.view(torch.int16) == 113).all()
