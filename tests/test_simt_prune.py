"""The selection kernels on the host SIMT executor (simt_cases.py)."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same_bits
from simt_cases import SEEDS, needs_compiler, poisoned, randn
from simt_host import Driver
from torch import Tensor

from nowag_ext import ops

pytestmark = needs_compiler


SELECTIONS = ["random", "few values", "all equal", "zeros and ones", "zeros", "one channel"]


def saliency_case(kind: str, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    w, h = randn(rows, cols, seed=100), randn(cols, seed=101).square()
    if kind == "few values":
        w, h = (w * 2).round() / 2, torch.ones(cols)
    elif kind == "all equal":
        w, h = torch.full_like(w, 0.5), torch.ones(cols)
    elif kind == "zeros and ones":
        w, h = (w > 0).float(), torch.ones(cols)
    elif kind == "zeros":
        w = torch.zeros_like(w)
    elif kind == "one channel":
        h[cols // 2] = 1e30
    return w, h


def assert_selects(driver: Driver, w: Tensor, h: Tensor, n_prune: int, seed: int) -> None:
    bitmap = poisoned(*ops.bitmap_shape(*w.shape), dtype=torch.uint8)
    assert driver.run("prune_select", w, h, *w.shape, n_prune, bitmap, seed=seed) == 0
    assert_same_bits(bitmap, ops.prune_select(w, h, n_prune))


@pytest.mark.parametrize("kind", SELECTIONS)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 70), (40, 300), (61, 64)])
def test_prune_select(driver: Driver, rows: int, cols: int, kind: str) -> None:
    w, h = saliency_case(kind, rows, cols)
    numel = rows * cols
    for n_prune in sorted({0, 1, numel // 2, numel // 3, numel - 1, numel}):
        assert_selects(driver, w, h, n_prune, seed=n_prune % 4)


@pytest.mark.parametrize("kind", SELECTIONS)
@pytest.mark.parametrize("seed", SEEDS)
def test_prune_select_in_several_blocks(driver: Driver, kind: str, seed: int) -> None:
    w, h = saliency_case(kind, 150, 129)  # more equal weights than the list of candidates holds
    assert_selects(driver, w, h, 9000, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_prune_select_of_a_crowd(driver: Driver, seed: int) -> None:
    """In one block more undecided weights than it stages, and all of them in the list."""
    w, h = randn(70, 260, seed=102) * 8, torch.ones(260)
    w[:8, :128] = 1 + torch.randperm(1024).view(8, 128) * 2.0**-20
    w[8:16, :100] = w[:8, :100] + 2.0**-21
    below = int((w.square() < 1).sum())
    for n_prune in (below + 1, below + 900):
        assert_selects(driver, w, h, n_prune, seed)


@pytest.mark.parametrize("equal", [4090, 4500])
def test_prune_select_of_many_equal(driver: Driver, equal: int) -> None:
    """Few enough to be candidates; the threshold's bin takes 4096."""
    w, h = randn(100, 260, seed=103) * 8, torch.ones(260)
    w.view(-1)[torch.randperm(w.numel(), generator=torch.Generator().manual_seed(4))[:equal]] = 1
    below = int((w.square() < 1).sum())
    for n_prune in (below, below + 1, below + 2000, below + equal):
        assert_selects(driver, w, h, n_prune, seed=2)


@pytest.mark.parametrize(("rows", "cols"), [(150, 260), (3, 9001)])
def test_prune_select_around_a_crowd(driver: Driver, rows: int, cols: int) -> None:
    """A third of the keys are one, and the threshold lies before it, in it and behind it."""
    w, h = randn(rows, cols, seed=105).abs() + 0.1, torch.ones(cols)
    crowd = torch.rand(rows, cols, generator=torch.Generator().manual_seed(106)) < 0.35
    w[crowd] = 0.75
    before, count = int((w < 0.75).sum()), int(crowd.sum())
    assert count > rows * cols // 16 + 4096  # than the list holds
    for n_prune in (
        before - 1, before, before + 1, before + count // 3, before + count // 2,
        before + count - 1, before + count, before + count + 1,
    ):  # fmt: skip
        assert_selects(driver, w, h, n_prune, seed=n_prune % 3)


@pytest.mark.parametrize("flip", [False, True])
def test_prune_select_when_the_sample_misleads(driver: Driver, flip: bool) -> None:
    """The weights that are sampled (sample_index) lie on one side of the threshold."""
    rows, cols, bits = 90, 180, 13
    k = torch.arange(2**bits)
    place = k * 2654435769 % 2**32 * (rows * cols) >> 32
    sampled = torch.zeros(rows * cols, dtype=torch.bool)
    sampled[(k * (rows * cols) + place) >> bits] = True
    w, h = randn(rows, cols, seed=104).abs() + 0.1, torch.ones(cols)
    w.view(-1)[sampled ^ flip] *= 100
    for n_prune in (2000, 14000):
        assert_selects(driver, w, h, n_prune, seed=2)


@pytest.mark.parametrize("kind", SELECTIONS)
@pytest.mark.parametrize(
    ("rows", "cols", "n", "m"),
    [(1, 4, 2, 4), (5, 300, 2, 4), (3, 72, 3, 8), (4, 66, 1, 3), (2, 320, 7, 32), (3, 90, 9, 15)],
)
def test_prune_select_nm(driver: Driver, rows: int, cols: int, n: int, m: int, kind: str) -> None:
    w, h = saliency_case(kind, rows, cols)
    bitmap = poisoned(*ops.bitmap_shape(rows, cols), dtype=torch.uint8)
    assert driver.run("prune_select_nm", w, h, rows, cols, n, m, bitmap) == 0
    assert_same_bits(bitmap, ops.prune_select_nm(w, h, n, m))


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 70), (45, 301), (4099, 3)])
def test_prune_objective(driver: Driver, rows: int, cols: int) -> None:
    w, h = saliency_case("random", rows, cols)
    bitmap = ops.prune_select(w, h, rows * cols // 2)
    sums = poisoned(2, dtype=torch.float64)
    assert driver.run("prune_objective", w, h, bitmap, rows, cols, sums) == 0
    assert_same_bits(sums, ops.prune_objective(w, h, bitmap))
