"""The k-means kernels on the host SIMT executor (simt_cases.py)."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same_bits
from simt_cases import SEEDS, first_is_quick, needs_compiler, poisoned, randn
from simt_host import Driver
from torch import Tensor

from nowag_ext import ops

pytestmark = needs_compiler


def problem(
    rows: int, cols: int, d: int, entries: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """w, h, codebook, codes, sums of a random problem."""
    positions = ops.code_positions(cols, d)
    w = randn(rows, cols, seed=seed) / 3
    h = torch.zeros(positions * d)
    h[:cols] = randn(cols, seed=seed + 1).square()
    codebook = randn(entries, d, seed=seed + 2) / 3
    codes = torch.randint(
        0, entries, (rows, positions), generator=torch.Generator().manual_seed(seed + 3)
    ).to(torch.uint16)
    return w, h, codebook, codes, torch.zeros(entries, 2 * d + 1, dtype=torch.int64)


def as_argument(*tensors: Tensor | None) -> list[object]:
    """The fields of a KmeansProblem."""
    w = tensors[0]
    assert w is not None
    return [*tensors, *w.shape, None, None]


def assert_assigns(
    driver: Driver, operands: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], step: float, seed: int
) -> None:
    """Cold, then warm with the codebook moved by `step`."""
    w, h, codebook, codes, sums = operands
    entries, d = codebook.shape
    scale = ops.kmeans_scale(float(len(w) * h.double().sum()), float(w.abs().max()))
    for warm in (False, True):
        expected_codes, expected_sums = codes.clone(), sums.clone()
        expected = ops.kmeans_assign(
            [w], [h], [codebook], [expected_codes], [expected_sums], scale, warm
        )
        changed = torch.full((1,), 99, dtype=torch.int64)
        arguments = [[as_argument(*operands)], 1, entries, d, scale, warm, changed]
        assert driver.run("kmeans_assign", *arguments, seed=seed) == 0
        assert_same_bits(codes, expected_codes)
        assert_same_bits(sums, expected_sums)
        assert_same_bits(changed, expected)
        codebook += step * randn(entries, d, seed=20)


ASSIGNMENTS = [
    (1, 1, 1, 1),
    (5, 7, 3, 9),
    (33, 20, 8, 70),
    (70, 13, 2, 16),
    (515, 9, 4, 256),
    (40, 11, 5, 530),
    (9, 14, 7, 300),
    (130, 13, 6, 700),
]


@pytest.mark.parametrize(("rows", "cols", "d", "entries"), ASSIGNMENTS)
@pytest.mark.parametrize("seed", SEEDS)
def test_kmeans_assign(
    driver: Driver, rows: int, cols: int, d: int, entries: int, seed: int
) -> None:
    assert_assigns(driver, problem(rows, cols, d, entries, seed=10), 0.05, seed)


# Codebooks for the kernel with tensor cores: a tail of entries, of rows, two slabs.
MMA_ASSIGNMENTS = [
    (130, 13, 6, 1100),
    (1040, 6, 6, 1024),
    (70, 6, 6, 2500),
    (64, 5, 5, 1024),
    (40, 4, 4, 1030),
]


@pytest.mark.parametrize(("rows", "cols", "d", "entries"), MMA_ASSIGNMENTS)
@pytest.mark.parametrize(
    "kind", first_is_quick("random", "outliers", "near points", "equal points")
)
def test_kmeans_assign_large_codebook(
    driver: Driver, rows: int, cols: int, d: int, entries: int, kind: str
) -> None:
    if kind != "random" and (rows > 1000 or entries > 2000):
        pytest.skip("the large cases with random points are enough")
    operands = problem(rows, cols, d, entries, seed=15)
    w, h, codebook = operands[:3]
    if kind == "outliers":
        h[0] *= 1e4
        codebook[::50] *= 30
        w[::7] *= 20
    elif kind == "near points":
        w[:, : cols // d * d] = codebook[
            torch.randint(0, entries, (rows, cols // d), generator=torch.Generator().manual_seed(3))
        ].reshape(rows, -1)
    elif kind == "equal points":
        w[:] = 0.25
        codebook[:] = codebook[torch.arange(entries) % 5]
    assert_assigns(driver, operands, 0.02, seed=2)


@pytest.mark.parametrize("seed", SEEDS)
def test_kmeans_assign_large_codebook_in_any_order(driver: Driver, seed: int) -> None:
    """Few distinct rows: many lanes of a warp find better entries for the same points at once."""
    operands = problem(80, 6, 6, 1030, seed=16)
    operands[0][:] = operands[0][torch.arange(80) % 3]
    assert_assigns(driver, operands, 0.1, seed)


@pytest.mark.parametrize("repeats", [3, 20])
def test_kmeans_assign_takes_the_lowest_of_equals(driver: Driver, repeats: int) -> None:
    w, h, codebook, codes, _ = problem(64, 12, 6, 64, seed=30)
    codebook = torch.cat([codebook[:7], *[codebook] * repeats])
    changed = torch.zeros(1, dtype=torch.int64)
    arguments = [[as_argument(w, h, codebook, codes, None)], 1, len(codebook), 6, 1.0, False]
    assert driver.run("kmeans_assign", *arguments, changed) == 0
    assert int(codes.to(torch.int32).max()) < 7 + 64
    expected = codes.clone()
    ops.kmeans_assign([w], [h], [codebook], [expected], [], 1.0, False)
    assert_same_bits(codes, expected)


def test_kmeans_assign_batches(driver: Driver) -> None:
    one, two = problem(20, 12, 4, 50, seed=40), problem(33, 7, 4, 50, seed=50)
    two = (*two[:2], one[2], two[3], one[4])
    expected_codes, expected_sums = [one[3].clone(), two[3].clone()], one[4].clone()
    expected = ops.kmeans_assign(
        [one[0], two[0]], [one[1], two[1]], [one[2]] * 2, expected_codes,
        [expected_sums] * 2, 2.0**30, False,
    )  # fmt: skip
    changed = torch.zeros(2, dtype=torch.int64)
    # The driver gives each problem its own copy of the shared sums: they add up.
    second = (*two[:4], torch.zeros_like(one[4]))
    arguments = [[as_argument(*one), as_argument(*second)], 2, 50, 4, 2.0**30, False, changed]
    assert driver.run("kmeans_assign", *arguments) == 0
    assert_same_bits(one[3], expected_codes[0])
    assert_same_bits(two[3], expected_codes[1])
    assert_same_bits(one[4] + second[4], expected_sums)
    assert_same_bits(changed, expected)


@pytest.mark.parametrize(("entries", "d"), [(1, 1), (300, 6), (700, 4)])
def test_kmeans_update(driver: Driver, entries: int, d: int) -> None:
    w, h, codebook, codes, sums = problem(64, 20, d, entries, seed=60)
    ops.kmeans_assign([w], [h], [codebook], [codes], [sums], 2.0**30, False)
    expected_codebook = codebook.clone()
    expected = ops.kmeans_update(sums, 2.0**30, expected_codebook)
    drop, empty = torch.zeros((), dtype=torch.float64), poisoned(entries, dtype=torch.uint8)
    arguments = [sums, entries, d, 2.0**30, codebook, drop, empty]
    assert driver.run("kmeans_update", *arguments) == 0
    assert_same_bits(codebook, expected_codebook)
    assert_same_bits(drop, expected[0])
    assert_same_bits(empty, expected[1].to(torch.uint8))


@pytest.mark.parametrize(("entries", "d"), [(1, 1), (2, 3), (37, 8), (300, 6)])
def test_kmeans_merge_costs(driver: Driver, entries: int, d: int) -> None:
    w, h, codebook, codes, sums = problem(64, 20, d, entries, seed=65)
    ops.kmeans_assign([w], [h], [codebook], [codes], [sums], 2.0**30, False)
    chosen = torch.randperm(entries)[: (entries + 1) // 2]
    costs = poisoned(len(chosen))
    arguments = [sums, codebook, entries, d, 2.0**30, chosen, len(chosen), costs]
    assert driver.run("kmeans_merge_costs", *arguments) == 0
    assert_same_bits(costs, ops.kmeans_merge_costs(sums, codebook, 2.0**30, chosen))


@pytest.mark.parametrize(("rows", "cols", "d"), [(1, 1, 1), (35, 41, 6), (3, 530, 1)])
def test_kmeans_errors_spread_and_energy(driver: Driver, rows: int, cols: int, d: int) -> None:
    operands = problem(rows, cols, d, 40, seed=70)
    errors = poisoned(rows, ops.code_positions(cols, d))
    assert driver.run("kmeans_errors", [as_argument(*operands)], 1, 40, d, errors) == 0
    assert_same_bits(errors, ops.kmeans_errors(*operands[:4]))
    spread = poisoned(40, d, dtype=torch.int64)
    assert driver.run("kmeans_spread", [as_argument(*operands)], 1, 40, d, 2.0**30, spread) == 0
    assert_same_bits(spread, ops.kmeans_spread(*operands[:4], 2.0**30))
    energy = torch.zeros((), dtype=torch.float64)
    assert driver.run("kmeans_energy", [as_argument(*operands)], 1, d, energy) == 0
    assert_same_bits(energy, ops.kmeans_energy(operands[0], operands[1], d))


def assert_same_seeds(
    driver: Driver, w: list[Tensor], h: list[Tensor], entries: int, d: int, init: str, seed: int
) -> None:
    codebook = poisoned(entries, d)
    problems = [as_argument(*pair, None, None, None) for pair in zip(w, h, strict=True)]
    number = {"random": 0, "kmeans++": 1}[init]
    arguments = [problems, len(problems), entries, d, number, 5, codebook]
    assert driver.run("kmeans_seed", *arguments, seed=seed) == 0
    assert_same_bits(codebook, ops.kmeans_seed(w, h, entries, d, init, 5))


# All points are the sample, or fewer are drawn (4096 + 16 * entries) from several chunks of points.
SEEDINGS = [
    (9, 7, 3, 12),
    (300, 19, 4, 60),
    (90, 260, 4, 7),
    (4400, 1, 1, 6),
    (1900, 5, 2, 5),
    (1650, 9, 3, 6),
    (1010, 21, 5, 5),
    (480, 57, 6, 6),
    (760, 40, 7, 5),
    (1100, 33, 8, 4),
]


@pytest.mark.parametrize("init", ["random", "kmeans++"])
@pytest.mark.parametrize(("rows", "cols", "d", "entries"), SEEDINGS)
@pytest.mark.parametrize("seed", SEEDS)
def test_kmeans_seed(
    driver: Driver, rows: int, cols: int, d: int, entries: int, init: str, seed: int
) -> None:
    w, h, *_ = zip(problem(rows, cols, d, 1, seed=80), problem(4, 9, d, 1, seed=90), strict=True)
    assert_same_seeds(driver, list(w), list(h), entries, d, init, seed)


EXTREMES = ["outliers", "one point", "coarse", "equal points", "zeros", "no metric", "subnormal"]


@pytest.mark.parametrize("rows", [8, 700])
@pytest.mark.parametrize("kind", EXTREMES)
@pytest.mark.parametrize("seed", SEEDS)
def test_kmeans_seed_extremes(driver: Driver, rows: int, kind: str, seed: int) -> None:
    """Few points with nearly all energy (the others' q is 0 or small), or none at all."""
    w, h, *_ = problem(rows, 26, 4, 1, seed=85)
    if kind == "outliers":
        w[::97] *= 1e3
        h[5] *= 1e4
    elif kind == "one point":
        w[rows // 2, :4] = 1e9
    elif kind == "coarse":
        w[rows // 2, :4] = 3e5
    elif kind == "equal points":
        w, h = torch.full((rows, 28), 0.5), torch.full((28,), 1.5)
    elif kind == "zeros":
        w = torch.zeros_like(w)
    elif kind == "no metric":
        h = torch.zeros_like(h)
    elif kind == "subnormal":
        w *= 1e-20
    other_w, other_h, *_ = problem(3, 14, 4, 1, seed=86)
    if kind in ("equal points", "zeros", "no metric"):
        other_w, other_h = w[:1].clone(), h.clone()
    assert_same_seeds(driver, [other_w, w], [other_h, h], 9, 4, "kmeans++", seed)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
def test_kmeans_seed_ends_whatever_the_values(driver: Driver, value: float) -> None:
    """Blocks wait for each other's messages: somebody must find each drawn point."""
    w, h, *_ = problem(500, 26, 4, 1, seed=87)
    w[::7, 3] = value
    codebook = poisoned(9, 4)
    arguments = [[as_argument(w, h, None, None, None)], 1, 9, 4, 1, 5, codebook]
    assert driver.run("kmeans_seed", *arguments) == 0


@pytest.mark.slow
def test_kmeans_seed_of_many_matrices(driver: Driver) -> None:
    """More chunks of points than a block has threads."""
    parts = [problem(3, 3, 1, 1, seed=1000 + index) for index in range(560)]
    w, h = [part[0] for part in parts], [part[1] for part in parts]
    assert_same_seeds(driver, w, h, 3, 1, "kmeans++", seed=2)
