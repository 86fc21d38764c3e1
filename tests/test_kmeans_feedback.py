"""kmeans_feedback.h against its oracle, bit for bit, and against what feedback is for."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same_bits, assert_within
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nowag_ext import ops, reference

pytestmark = pytest.mark.kernel

SCALE = 2.0**30

# rows, positions, d, code_bits: one point, tails of vectors, every d, few leaves and many.
CASES = [
    (1, 1, 1, 1),
    (5, 3, 2, 2),
    (17, 4, 3, 6),
    (40, 5, 4, 8),
    (33, 3, 5, 5),
    (70, 4, 6, 12),
    (24, 3, 7, 7),
    (19, 2, 8, 11),
]


def problem(
    rows: int, positions: int, d: int, code_bits: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, carried, V, codebook), V of correlated inputs whose sizes differ by orders."""
    generator = torch.Generator().manual_seed(seed)
    n = positions * d
    x, carried = (torch.randn(rows, n, generator=generator) for _ in range(2))
    size = torch.randn(n, generator=generator).exp()
    factor = torch.randn(n, n, generator=generator).triu() * size / n**0.5
    factor.diagonal().copy_(size)
    codebook = torch.randn(2**code_bits, d, generator=generator)
    return x, 0.1 * carried * size, factor, codebook


def run(
    x: Tensor, carried: Tensor, factor: Tensor, codebook: Tensor, scale: float = SCALE
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes, errors, carried and sums of the kernel, whose operands are left as they are."""
    entries, d = codebook.shape
    x, carried = x.clone(), carried.clone()
    codes = torch.empty(len(x), x.shape[1] // d, dtype=torch.uint16)
    sums = torch.zeros(entries, ops.feedback_sums_columns(d), dtype=torch.int64)
    ops.kmeans_feedback(x, carried, factor, codebook, codes, scale, sums)
    return codes, x, carried, sums


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_are_those_of_the_oracle(case: tuple[int, ...], threads: int) -> None:
    operands = problem(*case)
    wanted = reference.kmeans_feedback(*operands, SCALE)
    for name, got, want in zip(
        ("codes", "errors", "carried", "sums"), run(*operands), wanted, strict=True
    ):
        assert_same_bits(got, want, name)


@given(
    st.integers(1, 600), st.integers(1, 6), st.integers(1, 8), st.integers(1, 8), st.integers(0, 99)
)
def test_any_shape(rows: int, positions: int, d: int, code_bits: int, seed: int) -> None:
    operands = problem(rows, positions, d, code_bits, seed)
    wanted = reference.kmeans_feedback(*operands, SCALE)
    for got, want in zip(run(*operands), wanted, strict=True):
        assert_same_bits(got, want)


def test_rows_do_not_depend_on_each_other() -> None:
    x, carried, factor, codebook = problem(1100, 4, 6, 9)
    codes, errors, rest, sums = run(x, carried, factor, codebook)
    parts = [
        run(x[part], carried[part], factor, codebook) for part in (slice(0, 513), slice(513, 1100))
    ]
    assert_same_bits(codes, torch.cat([part[0] for part in parts]))
    assert_same_bits(errors, torch.cat([part[1] for part in parts]))
    assert_same_bits(rest, torch.cat([part[2] for part in parts]))
    assert_same_bits(sums, parts[0][3] + parts[1][3])


def test_operands_may_be_parts_of_larger_ones() -> None:
    x, carried, factor, codebook = problem(50, 6, 4, 5)
    here = slice(4, 16)
    wide = x.clone()
    codes = torch.empty(50, 3, dtype=torch.uint16)
    mine = carried[:, here].clone()
    ops.kmeans_feedback(wide[:, here], mine, factor[here, here], codebook, codes)
    alone = run(x[:, here].clone(), carried[:, here].clone(), factor[here, here].clone(), codebook)
    assert_same_bits(codes, alone[0])
    assert_same_bits(wide[:, here], alone[1])
    assert_same_bits(mine, alone[2])
    outside = [c for c in range(24) if not 4 <= c < 16]
    assert_same_bits(wide[:, outside], x[:, outside], "what the call was not given")


def test_blocks_one_after_another_are_one_block() -> None:
    """What earlier errors carry to later columns is a matrix product."""
    x, carried, factor, codebook = problem(64, 6, 4, 6)
    whole = run(x, carried, factor, codebook)
    first, second = slice(0, 12), slice(12, 24)
    a = run(x[:, first].clone(), carried[:, first].clone(), factor[first, first].clone(), codebook)
    passed_on = carried[:, second] + a[1] @ factor[first, second]
    b = run(x[:, second].clone(), passed_on, factor[second, second].clone(), codebook)
    same = (torch.cat([a[0], b[0]], 1).to(torch.int32) == whole[0].to(torch.int32)).float().mean()
    assert same > 0.99, f"only {same:.3f} of the codes are the same"


def test_carried_squares_are_the_objective() -> None:
    x, _, factor, codebook = problem(64, 5, 4, 6)
    _, errors, carried, _ = run(x, torch.zeros_like(x), factor, codebook)
    exact = (errors.double() @ factor.double()).square().sum(1)
    assert_within(carried.double().square().sum(1), exact, 1e-4 * exact)


def test_feedback_lowers_the_objective_that_nearest_entries_leave() -> None:
    x, _, factor, codebook = problem(400, 16, 4, 8)
    _, errors, _, _ = run(x, torch.zeros_like(x), factor, codebook)
    codes = torch.empty(400, 16, dtype=torch.uint16)
    h = (factor @ factor.T).diagonal().contiguous()
    ops.kmeans_assign([x], [h], [codebook], [codes], [], 1.0, False)
    plain = x - codebook[codes.to(torch.int64)].view_as(x)
    with_feedback, without = ((e @ factor).square().sum() for e in (errors, plain))
    assert with_feedback < 0.7 * without


def test_sums_give_the_entries_that_suit_best() -> None:
    """(sum M) c = sum M x~ is least squares for the points as feedback has moved them."""
    x, carried, factor, codebook = problem(3000, 2, 3, 3)
    codes, _, rest, sums = run(x, carried, factor, codebook)
    d = 3
    moments, triangle = sums[:, :d].double() / SCALE, sums[:, d:-1].double() / SCALE
    metric = torch.zeros(len(sums), d, d, dtype=torch.float64)
    rows, columns = torch.triu_indices(d, d)
    metric[:, rows, columns] = triangle
    metric[:, columns, rows] = triangle
    best = torch.linalg.solve(metric, moments)
    for k in range(len(codebook)):
        system, wanted = [], []
        for p in range(2):
            v = factor[p * d : p * d + d, p * d : p * d + d].double()
            chosen = codes[:, p].to(torch.int64) == k
            y = rest[chosen, p * d : p * d + d].double() + codebook[k].double() @ v
            system.append(v.T.repeat(int(chosen.sum()), 1))
            wanted.append(y.reshape(-1))
        least = torch.linalg.lstsq(torch.cat(system), torch.cat(wanted)[:, None]).solution[:, 0]
        assert_within(best[k], least, 1e-4, f"entry {k}")


def test_padding_is_of_no_account() -> None:
    """Columns that stand for nothing have rows and columns of zeros in V."""
    x, carried, factor, codebook = problem(30, 3, 4, 5)
    carried[:, 10:] = 0
    factor[10:], factor[:, 10:] = 0, 0
    one = run(x, carried, factor, codebook)
    other = run(torch.cat([x[:, :10], torch.full((30, 2), 7.0)], 1), carried, factor, codebook)
    assert_same_bits(one[0], other[0])
    assert_same_bits(one[2], other[2])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": torch.zeros(4, 5)}, "x must be float32 of shape"),
        ({"factor": torch.zeros(6, 6, dtype=torch.float64)}, "factor must be float32"),
        ({"carried": torch.zeros(6, 4).T}, "carried must be contiguous"),
        ({"sums": torch.zeros(4, 3, dtype=torch.int64)}, "sums must have shape"),
        ({"x": torch.zeros(6, 4).T}, "the rows of x must be contiguous"),
        ({"x": torch.zeros(4, 6, device="meta")}, "carried must be on meta, not on cpu"),
        (
            {"codes": torch.zeros(4, 2, device="meta").to(torch.uint16)},
            "codes must be on cpu, not on meta",
        ),
    ],
)
def test_refusals(change: dict[str, Tensor], sentence: str) -> None:
    operands: dict[str, Tensor] = {
        "x": torch.zeros(4, 6),
        "carried": torch.zeros(4, 6),
        "factor": torch.eye(6),
        "codebook": torch.zeros(4, 3),
        "codes": torch.zeros(4, 2, dtype=torch.uint16),
        **change,
    }
    with pytest.raises((ValueError, TypeError), match=sentence):
        ops.kmeans_feedback(**operands)


def test_is_an_operation_of_torch() -> None:
    """It writes to what its schema says, and nothing else."""
    x, carried, factor, codebook = problem(7, 3, 2, 3)
    codes = torch.zeros(7, 3, dtype=torch.uint16)
    sums = torch.zeros(8, ops.feedback_sums_columns(2), dtype=torch.int64)
    torch.library.opcheck(
        ops.kmeans_feedback, (x, carried, factor, codebook, codes, SCALE, sums),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
