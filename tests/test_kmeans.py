"""kmeans.h against its oracle: assignments bit for bit, sums exactly, seeds the same everywhere."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from compare import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nowag_ext import ops, reference

pytestmark = pytest.mark.kernel

# rows, cols, d, code_bits: single points, tails of rows and columns, every d, K below and above
# a vector, K that is not resident in the first-level cache.
CASES = [
    (1, 1, 1, 1),
    (3, 5, 1, 4),
    (33, 20, 2, 6),
    (17, 31, 3, 6),
    (129, 24, 4, 8),
    (65, 33, 5, 5),
    (300, 14, 6, 12),
    (40, 30, 7, 7),
    (70, 40, 8, 12),
    (90, 31, 5, 11),
    (2100, 6, 4, 8),
]


def problem(rows: int, cols: int, d: int, code_bits: int, seed: int = 0) -> tuple[Tensor, ...]:
    """(w, h, codebook): normalised weights with a few outliers, importances over many octaves."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=generator) / math.sqrt(cols)
    w[0, 0] = 0.9
    padded = -(-cols // d) * d
    h = (
        torch.rand(padded, generator=generator).exp2()
        * torch.randn(padded, generator=generator).mul(2).exp()
    )
    h[cols:] = 0
    if cols > 1:
        h[cols // 2] = 0
    codebook = torch.randn(2**code_bits, d, generator=generator) / math.sqrt(cols)
    return w, h, codebook


def empty_codes(w: Tensor, d: int) -> Tensor:
    return torch.empty(w.shape[0], ops.code_positions(w.shape[1], d), dtype=torch.uint16)


def zero_sums(codebook: Tensor) -> Tensor:
    entries, d = codebook.shape
    return torch.zeros(entries, 2 * d + 1, dtype=torch.int64)


def scale_of(w: Tensor, h: Tensor) -> float:
    return ops.kmeans_scale(w.shape[0] * float(h.double().sum()), float(w.abs().max()))


def assign(w: Tensor, h: Tensor, codebook: Tensor) -> Tensor:
    codes = empty_codes(w, codebook.shape[1])
    ops.kmeans_assign([w], [h], [codebook], [codes], [], 1.0, False)
    return codes


def assign_exhaustively(w: Tensor, h: Tensor, codebook: Tensor) -> Tensor:
    codes = empty_codes(w, codebook.shape[1])
    ops.kmeans_assign_exhaustive(w, h, codebook, codes)
    return codes


def as_ints(codes: Tensor) -> Tensor:
    return codes.to(torch.int32)


@given(seed=st.integers(0, 2**31), exponent=st.integers(-60, 60))
def test_oracle_fma_rounds_once(seed: int, exponent: int) -> None:
    """Against exact rational arithmetic, with addends that cancel and that are halfway cases."""
    from fractions import Fraction

    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 64, generator=generator)
    c = (-(a * b) * 2.0**exponent).float()
    got = reference.fma(a, b, c)
    for index in range(64):
        exact = Fraction(a[index].item()) * Fraction(b[index].item()) + Fraction(c[index].item())
        near = Fraction(got[index].item())
        gap = abs(near - exact)
        for direction in (-math.inf, math.inf):
            other = torch.nextafter(got[index], torch.tensor(direction))
            assert gap <= abs(Fraction(other.item()) - exact)


# The oracle takes seconds, and does not know how many threads the kernel has.
@cache
def assigned(rows: int, cols: int, d: int, code_bits: int) -> Tensor:
    return as_ints(reference.kmeans_assign(*problem(rows, cols, d, code_bits)))


@pytest.mark.parametrize(("rows", "cols", "d", "code_bits"), CASES)
def test_assign_is_the_oracle_bit_for_bit(
    rows: int, cols: int, d: int, code_bits: int, threads: int
) -> None:
    w, h, codebook = problem(rows, cols, d, code_bits)
    want = assigned(rows, cols, d, code_bits)
    assert_same_bits(as_ints(assign(w, h, codebook)), want)
    assert_same_bits(as_ints(assign_exhaustively(w, h, codebook)), want)


@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 40),
    d=st.integers(1, 8),
    code_bits=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_assign_property(rows: int, cols: int, d: int, code_bits: int, seed: int) -> None:
    w, h, codebook = problem(rows, cols, d, code_bits, seed)
    want = reference.kmeans_assign(w, h, codebook)
    assert_same_bits(as_ints(assign(w, h, codebook)), as_ints(want))


# What becomes of a codebook, of the points or of the metric where there are many entries: their
# search compares 13-bit coordinates (kmeans_grid.h), whose range must never cost the right answer.
EXTREMES = {
    "plain": lambda w, h, c: (w, h, c),
    "entries far from 0": lambda w, h, c: (w + 300, h, c + 300),
    "points beyond the entries": lambda w, h, c: (w * 40, h, c),
    "points far within the entries": lambda w, h, c: (w / 400, h, c),
    "one entry far away": lambda w, h, c: (w, h, c.index_fill(0, torch.tensor([5]), 1e4)),
    "entries in a heap": lambda w, h, c: (w, h, torch.cat([c[:9], c[9:] * 1e-4])),
    "each entry twice": lambda w, h, c: (w, h, torch.cat([c[::2], c[::2]])),
    "all entries the same": lambda w, h, c: (w, h, c[:1].expand_as(c).contiguous()),
    "entries on a line": lambda w, h, c: (w, h, c[:, :1].expand_as(c).contiguous()),
    "points that are entries": lambda w, h, c: (c.flatten()[: w.numel()].view_as(w), h, c),
    "huge weights": lambda w, h, c: (w, h * 1e30, c),
    "tiny weights": lambda w, h, c: (w, h * 1e-35, c),
    "tiny values": lambda w, h, c: (w * 1e-18, h, c * 1e-18),
    "one coordinate counts": lambda w, h, c: (w, h * (torch.arange(len(h)) % 3 == 0), c),
    "no coordinate counts": lambda w, h, c: (w, h * 0, c),
}


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize(("d", "code_bits"), [(1, 11), (3, 10), (4, 12), (6, 12), (8, 13)])
def test_assign_among_many_entries(extreme: str, d: int, code_bits: int) -> None:
    """From nothing, and from any previous entries, all of them the wrong ones."""
    w, h, codebook = EXTREMES[extreme](*problem(25, 17, d, code_bits))
    want = as_ints(reference.kmeans_assign(w, h, codebook))
    assert_same_bits(as_ints(assign(w, h, codebook)), want)
    codes = (want * 7 + 11).remainder(len(codebook)).to(torch.uint16)
    ops.kmeans_assign([w], [h], [codebook], [codes], [], 1.0, True)
    assert_same_bits(as_ints(codes), want)


@pytest.mark.parametrize("warm", [False, True])
def test_the_lowest_of_equal_entries_wins(warm: bool) -> None:
    w, h, codebook = problem(90, 32, 4, 6)
    codebook[32:] = codebook[:32].flip(0)
    codes = torch.full((90, 8), 63, dtype=torch.uint16)
    ops.kmeans_assign([w], [h], [codebook], [codes], [], 1.0, warm)
    assert as_ints(codes).max() < 32
    assert_same_bits(as_ints(codes), as_ints(reference.kmeans_assign(w, h, codebook)))


def test_all_entries_equal_and_a_metric_of_zero_choose_entry_zero() -> None:
    w, h, codebook = problem(40, 12, 3, 5)
    zeros = torch.zeros_like(empty_codes(w, 3))
    assert_same_bits(assign(w, h, codebook[:1].expand(32, 3).contiguous()), zeros)
    assert_same_bits(assign(w, torch.zeros_like(h), codebook), zeros)


@pytest.mark.parametrize(("rows", "cols", "d", "code_bits"), CASES)
def test_sums_and_update(rows: int, cols: int, d: int, code_bits: int, threads: int) -> None:
    w, h, codebook = problem(rows, cols, d, code_bits)
    entries, scale = 2**code_bits, scale_of(w, h)
    codes, sums = empty_codes(w, d), zero_sums(codebook)
    changed = ops.kmeans_assign([w], [h], [codebook], [codes], [sums], scale, False)
    assert changed.tolist() == [codes.numel()]
    assert_same_bits(sums, reference.kmeans_sums(w, h, codes, entries, d, scale))
    moved, drop, empty = reference.kmeans_update(sums, scale, codebook)
    got_drop, got_empty = ops.kmeans_update(sums, scale, codebook)
    assert_same_bits(codebook, moved)
    assert_same_bits(got_empty, empty)
    assert got_drop.item() == pytest.approx(drop, rel=1e-12)
    error = reference.kmeans_errors(w, h, codebook, codes)
    assert reference.kmeans_energy(w, h) - drop == pytest.approx(error.sum().item(), rel=1e-6)
    got_error = ops.kmeans_errors(w, h, codebook, codes)
    torch.testing.assert_close(got_error.double(), error, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize(("rows", "cols", "d", "code_bits"), CASES)
def test_spread(rows: int, cols: int, d: int, code_bits: int, threads: int) -> None:
    w, h, codebook = problem(rows, cols, d, code_bits)
    codes, scale = assign(w, h, codebook), scale_of(w, h)
    got = ops.kmeans_spread(w, h, codebook, codes, scale)
    assert_same_bits(got, reference.kmeans_spread(w, h, codebook, codes, scale))
    total = reference.kmeans_errors(w, h, codebook, codes).sum().item()
    assert got.sum().item() / scale == pytest.approx(total, rel=1e-6, abs=w.numel() / scale)


@pytest.mark.parametrize(("rows", "cols", "d", "code_bits"), CASES)
def test_merge_costs_are_the_oracle_bit_for_bit(
    rows: int, cols: int, d: int, code_bits: int, threads: int
) -> None:
    w, h, codebook = problem(rows, cols, d, code_bits)
    sums, scale = zero_sums(codebook), scale_of(w, h)
    ops.kmeans_assign([w], [h], [codebook], [empty_codes(w, d)], [sums], scale, False)
    # More of them would show nothing else, and cost the oracle seconds.
    chosen = torch.randperm(len(codebook))[: min(200, max(1, len(codebook) // 2))]
    got = ops.kmeans_merge_costs(sums, codebook, scale, chosen)
    assert_same_bits(got, reference.kmeans_merge_costs(sums, codebook, scale, chosen))


def test_merge_cost_of_the_only_entry_is_infinite() -> None:
    sums, only = torch.ones(1, 9, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    assert ops.kmeans_merge_costs(sums, torch.ones(1, 4), 1.0, only).isinf().all()


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize(("rows", "cols", "d", "code_bits"), CASES)
def test_every_warm_iteration_is_brute_force(
    rows: int, cols: int, d: int, code_bits: int, tracked: bool, threads: int
) -> None:
    """Codes, sums and changes of every iteration, against starting from nothing; where entries are
    put elsewhere, and now and then, against brute force too."""
    w, h, codebook = problem(rows, cols, d, code_bits)
    scale = scale_of(w, h)
    codes, sums = empty_codes(w, d), zero_sums(codebook)
    gaps = [torch.empty(codes.shape)] if tracked else None
    ops.kmeans_assign([w], [h], [codebook], [codes], [sums], scale, False, None, gaps)
    for iteration in range(25):
        previous = [codebook.clone()] if tracked else None
        ops.kmeans_update(sums, scale, codebook)
        if iteration == 12:
            codebook[-1] = codebook[0] * 1.5
        if iteration == 15:
            codebook[-1] = codebook[0]
        before = as_ints(codes)
        changed = ops.kmeans_assign(
            [w], [h], [codebook], [codes], [sums], scale, True, previous, gaps
        )
        fresh, fresh_sums = empty_codes(w, d), zero_sums(codebook)
        ops.kmeans_assign([w], [h], [codebook], [fresh], [fresh_sums], scale, False)
        assert_same_bits(as_ints(codes), as_ints(fresh))
        if iteration in (0, 5, 12, 13, 15, 16, 24):
            assert_same_bits(as_ints(codes), as_ints(assign_exhaustively(w, h, codebook)))
        assert_same_bits(sums, fresh_sums)
        assert changed.item() == (as_ints(codes) != before).sum()


@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 40),
    d=st.integers(1, 8),
    code_bits=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    drift=st.floats(1e-9, 1),
)
def test_tracking_survives_any_drift(
    rows: int, cols: int, d: int, code_bits: int, seed: int, drift: float
) -> None:
    """Entries that move at random by amounts of all orders, and some not at all."""
    w, h, codebook = problem(rows, cols, d, code_bits, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    codes, gaps = empty_codes(w, d), torch.empty(rows, -(-cols // d))
    ops.kmeans_assign([w], [h], [codebook], [codes], [], 1.0, False, None, [gaps])
    for _ in range(6):
        previous = codebook.clone()
        moved = torch.rand(len(codebook), 1, generator=generator) < 0.3
        codebook += (
            moved * drift / math.sqrt(cols) * torch.randn(codebook.shape, generator=generator)
        )
        ops.kmeans_assign([w], [h], [codebook], [codes], [], 1.0, True, [previous], [gaps])
        assert_same_bits(as_ints(codes), as_ints(assign(w, h, codebook)))


def test_opposite_corners_of_the_grid_are_near() -> None:
    """Entry 5 is the nearest of all, and as far from the previous one as the grid is wide."""
    codebook = torch.ones(1024, 1)
    codebook[5] = 0
    codes = torch.full((3, 2), 7).to(torch.uint16)
    ops.kmeans_assign([torch.zeros(3, 2)], [torch.ones(2)], [codebook], [codes], [], 1.0, True)
    assert_same_bits(as_ints(codes), torch.full((3, 2), 5, dtype=torch.int32))


def test_more_rows_than_a_block_holds() -> None:
    """A key has 12 bits for a row, and many entries ask for many rows to a block."""
    w, h, codebook = problem(4500, 4, 4, 15)
    assert_same_bits(as_ints(assign(w, h, codebook)), as_ints(assign_exhaustively(w, h, codebook)))


def test_warm_takes_any_previous_codes() -> None:
    w, h, codebook = problem(200, 60, 4, 8)
    want = as_ints(assign(w, h, codebook))
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 256, (200, 15), generator=generator).to(torch.uint16)
        changed = ops.kmeans_assign([w], [h], [codebook], [codes], [], 1.0, True)
        assert_same_bits(as_ints(codes), want)
        assert 0 < changed.item() <= codes.numel()


def test_a_batch_equals_its_problems() -> None:
    shapes = [(70, 40, 0), (1, 9, 1), (300, 12, 2)]
    problems = [problem(rows, cols, 4, 6, seed) for rows, cols, seed in shapes]
    w, h, codebooks = (list(parts) for parts in zip(*problems, strict=True))
    codes, sums = [empty_codes(m, 4) for m in w], [zero_sums(c) for c in codebooks]
    scale = 2.0**40
    changed = ops.kmeans_assign(w, h, codebooks, codes, sums, scale, False)
    assert changed.tolist() == [c.numel() for c in codes]
    for index in range(len(shapes)):
        assert_same_bits(
            as_ints(codes[index]), as_ints(assign(w[index], h[index], codebooks[index]))
        )
        want = reference.kmeans_sums(w[index], h[index], codes[index], 64, 4, scale)
        assert_same_bits(sums[index], want)


def test_problems_that_share_a_codebook_share_sums() -> None:
    one, two = problem(70, 40, 4, 6, 0), problem(30, 22, 4, 6, 1)
    codebook, scale = one[2], 2.0**40
    codes, sums = [empty_codes(one[0], 4), empty_codes(two[0], 4)], zero_sums(codebook)
    ops.kmeans_assign(
        [one[0], two[0]], [one[1], two[1]], [codebook] * 2, codes, [sums] * 2, scale, False
    )
    want = sum(
        reference.kmeans_sums(w, h, c, 64, 4, scale)
        for (w, h, _), c in zip((one, two), codes, strict=True)
    )
    assert_same_bits(sums, want)


def test_energy() -> None:
    w, h, _ = problem(130, 45, 6, 1)
    want = reference.kmeans_energy(w, h)
    assert ops.kmeans_energy(w, h, 6).item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(("d", "entries"), [(4, 256), (6, 64), (1, 1), (3, 390)])
def test_random_seed_is_the_oracle(d: int, entries: int, threads: int) -> None:
    w = [problem(20, 40, d, 1)[0], problem(13, 31, d, 1)[0]]
    h = [torch.ones(ops.code_positions(m.shape[1], d) * d) for m in w]
    for seed in (0, 1, 2**63 - 1):
        got = ops.kmeans_seed(w, h, entries, d, "random", seed)
        assert_same_bits(got, reference.kmeans_seed(w, entries, d, seed))


@cache
def plus_plus(rows: int, d: int, entries: int, seed: int) -> Tensor:
    one, two = problem(rows, 53, d, 1), problem(13, 31, d, 1)
    return reference.kmeans_plus_plus([one[0], two[0]], [one[1], two[1]], entries, d, seed)


# All points are the sample, or it is drawn.
@pytest.mark.parametrize("rows", [40, 900])
@pytest.mark.parametrize(("d", "entries"), [(1, 9), (2, 1), (3, 20), (4, 64), (6, 30), (8, 7)])
def test_plus_plus_is_the_oracle(rows: int, d: int, entries: int, threads: int) -> None:
    one, two = problem(rows, 53, d, 1), problem(13, 31, d, 1)
    w, h = [one[0], two[0]], [one[1], two[1]]
    for seed in (0, 2**63 - 1):
        got = ops.kmeans_seed(w, h, entries, d, "kmeans++", seed)
        assert_same_bits(got, plus_plus(rows, d, entries, seed))


@pytest.mark.parametrize(
    "kind", ["one point", "coarse", "equal points", "zeros", "no metric", "subnormal"]
)
def test_plus_plus_of_extremes_is_the_oracle(kind: str) -> None:
    """A point with all the energy (the others' q is 0 or small), no energy, one below 2^-126."""
    w, h, _ = problem(900, 24, 4, 1)
    if kind == "one point":
        w[450, :4] = 1e9
    elif kind == "coarse":
        w[450, :4] = 3e5
    elif kind == "equal points":
        w = torch.full_like(w, 0.5)
    elif kind == "zeros":
        w = torch.zeros_like(w)
    elif kind == "no metric":
        h = torch.zeros_like(h)
    elif kind == "subnormal":
        w *= 1e-20
    got = ops.kmeans_seed([w], [h], 12, 4, "kmeans++", 1)
    assert_same_bits(got, reference.kmeans_plus_plus([w], [h], 12, 4, 1))


@pytest.mark.parametrize(("d", "entries"), [(4, 256), (6, 64), (1, 1), (3, 390)])
def test_plus_plus_chooses_distinct_points(d: int, entries: int) -> None:
    w, h, _ = problem(60, 41, d, 1)
    h = h + (torch.arange(h.numel()) < 41) * 0.1
    codebook = ops.kmeans_seed([w], [h], entries, d, "kmeans++", 3)
    points = {tuple(x) for x in reference.kmeans_points(w, d).reshape(-1, d).tolist()}
    chosen = {tuple(x) for x in codebook.tolist()}
    assert chosen <= points
    assert len(chosen) == entries


def test_plus_plus_same_bits_at_any_thread_count() -> None:
    w, h, _ = problem(700, 80, 4, 1)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(ops.kmeans_seed([w], [h], 256, 4, "kmeans++", 11))
    torch.set_num_threads(before)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])
    assert not torch.equal(results[0], ops.kmeans_seed([w], [h], 256, 4, "kmeans++", 12))


def test_plus_plus_starts_lower_than_random() -> None:
    w, h, _ = problem(500, 80, 4, 1)
    potentials = {}
    for init in ("kmeans++", "random"):
        codebooks = [ops.kmeans_seed([w], [h], 256, 4, init, seed) for seed in range(3)]
        errors = [ops.kmeans_errors(w, h, c, assign(w, h, c)).double().sum() for c in codebooks]
        potentials[init] = sum(errors).item()
    assert potentials["kmeans++"] < potentials["random"]


def test_plus_plus_with_fewer_distinct_points_than_entries() -> None:
    w = torch.tensor([0.25, -0.5]).repeat(40, 4)
    codebook = ops.kmeans_seed([w], [torch.ones(8)], 16, 2, "kmeans++", 0)
    assert_same_bits(codebook, torch.tensor([0.25, -0.5]).expand(16, 2))


def test_refusals() -> None:
    w, h, codebook = problem(20, 12, 4, 3)
    codes = empty_codes(w, 4)
    with pytest.raises(ValueError, match=r"w and h must be lists of the same length"):
        ops.kmeans_assign([w], [], [codebook], [codes], [], 1.0, False)
    with pytest.raises(TypeError, match=r"codes must be torch\.uint16, not torch\.int32"):
        ops.kmeans_assign([w], [h], [codebook], [codes.to(torch.int32)], [], 1.0, False)
    with pytest.raises(ValueError, match=r"h must have shape \(12,\), not \(11,\)"):
        ops.kmeans_assign([w], [h[:11]], [codebook], [codes], [], 1.0, False)
    with pytest.raises(ValueError, match="needs at least as many sub-vectors, but there are 60"):
        ops.kmeans_seed([w], [h], 61, 4, "random", 0)
    with pytest.raises(ValueError, match="init must be one of"):
        ops.kmeans_seed([w], [h], 6, 4, "best", 0)
