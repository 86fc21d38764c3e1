"""Every CUDA kernel on the host SIMT executor, under ASan and UBSan, against the CPU's kernels.

Assignments, sums, selections, packed forms and normalised weights must be the CPU's bits; the GEMVs
keep the error bound of their headers. Shapes are small but have every kind of tail, and threads run
in several orders, so that a missing barrier shows.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from simt_host import Driver, compiler
from torch import Tensor

from nowag_ext import ops, reference

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler (g++ or $CXX)")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SEEDS = [0, 1, 2]


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    driver = Driver()
    yield driver
    driver.close()


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan") if dtype.is_floating_point else 113, dtype=dtype)


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert torch.equal(got.reshape(-1).view(torch.uint8), want.reshape(-1).view(torch.uint8))


# --- normalize ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 33), (65, 31), (130, 257)])
def test_normalize(driver: Driver, rows: int, cols: int, dtype: torch.dtype) -> None:
    base = randn(rows, cols + 3, seed=1).to(dtype)
    outputs = poisoned(rows, cols), poisoned(rows), poisoned(cols)
    assert driver.run("normalize", base, CODES[dtype], rows, cols, cols + 3, *outputs) == 0
    for got, want in zip(outputs, ops.normalize(base[:, :cols]), strict=True):
        assert_same_bits(got, want)


# --- kmeans ---------------------------------------------------------------------------------------


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
    w = tensors[0]
    assert w is not None
    return [*tensors, *w.shape]


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
    operands = problem(rows, cols, d, entries, seed=10)
    w, h, codebook, codes, sums = operands
    scale = ops.kmeans_scale(float(rows * h.double().sum()), float(w.abs().max()))
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
        codebook += 0.05 * randn(entries, d, seed=20)


# Codebooks for the kernel with tensor cores: a tail of entries, of rows, two slabs.
MMA_ASSIGNMENTS = [
    (130, 13, 6, 1100),
    (1040, 6, 6, 1024),
    (70, 6, 6, 2500),
    (64, 5, 5, 1024),
    (40, 4, 4, 1030),
]


@pytest.mark.parametrize(("rows", "cols", "d", "entries"), MMA_ASSIGNMENTS)
@pytest.mark.parametrize("kind", ["random", "outliers", "near points", "equal points"])
def test_kmeans_assign_large_codebook(
    driver: Driver, rows: int, cols: int, d: int, entries: int, kind: str
) -> None:
    if kind != "random" and (rows > 1000 or entries > 2000):
        pytest.skip("the large cases with random points are enough")
    operands = problem(rows, cols, d, entries, seed=15)
    w, h, codebook, codes, sums = operands
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
    scale = ops.kmeans_scale(float(rows * h.double().sum()), float(w.abs().max()))
    for warm in (False, True):
        expected_codes, expected_sums = codes.clone(), sums.clone()
        expected = ops.kmeans_assign(
            [w], [h], [codebook], [expected_codes], [expected_sums], scale, warm
        )
        changed = torch.full((1,), 99, dtype=torch.int64)
        arguments = [[as_argument(*operands)], 1, entries, d, scale, warm, changed]
        assert driver.run("kmeans_assign", *arguments, seed=2) == 0
        assert_same_bits(codes, expected_codes)
        assert_same_bits(sums, expected_sums)
        assert_same_bits(changed, expected)
        codebook += 0.02 * randn(entries, d, seed=20)


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


def test_kmeans_seed_of_many_matrices(driver: Driver) -> None:
    """More chunks of points than a block has threads."""
    parts = [problem(3, 3, 1, 1, seed=1000 + index) for index in range(560)]
    w, h = [part[0] for part in parts], [part[1] for part in parts]
    assert_same_seeds(driver, w, h, 3, 1, "kmeans++", seed=2)


# --- prune ----------------------------------------------------------------------------------------

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


# --- vq_pack, vq_gemv -----------------------------------------------------------------------------


@pytest.mark.parametrize("code_bits", range(1, 17))
@pytest.mark.parametrize(("rows", "positions"), [(1, 1), (33, 70)])
def test_pack_and_unpack(driver: Driver, rows: int, positions: int, code_bits: int) -> None:
    generator = torch.Generator().manual_seed(110)
    codes = torch.randint(0, 2**code_bits, (rows, positions), generator=generator).to(torch.uint16)
    packed = poisoned(*ops.packed_shape(rows, positions, 1, code_bits), dtype=torch.uint8)
    assert driver.run("pack_codes", codes, rows, positions, code_bits, packed) == 0
    assert_same_bits(packed, reference.pack_codes(codes, code_bits))
    unpacked = torch.zeros_like(codes)
    assert driver.run("unpack_codes", packed, rows, positions, code_bits, unpacked) == 0
    assert_same_bits(unpacked, codes)


def vq_weight(
    rows: int, cols: int, d: int, code_bits: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes, codebook, row_norms, col_norms at random."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, ops.code_positions(cols, d))
    codes = torch.randint(0, 2**code_bits, shape, generator=generator).to(torch.uint16)
    return (
        reference.pack_codes(codes, code_bits),
        randn(2**code_bits, d, seed=seed + 1).half(),
        (randn(rows, seed=seed + 2).abs() + 0.1).half(),
        (randn(cols, seed=seed + 3).abs() + 0.1).half(),
    )


VQ_SHAPES = [(1, 1, 1, 1), (33, 20, 3, 9), (70, 131, 4, 8), (40, 97, 6, 12), (65, 33, 8, 16)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols", "d", "code_bits"), VQ_SHAPES)
def test_vq_dequantize(
    driver: Driver, rows: int, cols: int, d: int, code_bits: int, dtype: torch.dtype
) -> None:
    vq = vq_weight(rows, cols, d, code_bits, seed=120)
    want = reference.vq_dequantize(*vq, dtype)
    for begin in range(0, rows, 32):
        end = min(rows, begin + 64)
        out = poisoned(end - begin, cols + 2, dtype=dtype)
        arguments = [*vq, rows, cols, d, code_bits, begin, end, out, CODES[dtype], cols + 2]
        assert driver.run("vq_dequantize", *arguments) == 0
        assert_same_bits(out[:, :cols].contiguous(), want[begin:end])
        assert out[:, cols:].isnan().all()


def assert_within_bound(
    got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, more: Tensor | float = 0.0
) -> None:
    """The error bound of vq_gemv.h and sparse_gemv.h, with one rounding to the output's dtype."""
    want = x.double() @ weight.T
    bound = 8e-6 * (x.double().abs() @ weight.abs().T) + more
    if bias is not None:
        want = want + bias.double()
    epsilon = {torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
    smallest = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
    rounding = epsilon[got.dtype] * (want.abs() + bound) + smallest[got.dtype]
    assert ((got.double() - want).abs() <= bound + rounding).all()


def lost_by_split(x: Tensor, vq: tuple[Tensor, ...], d: int) -> Tensor:
    """The term that vq_gemv.h adds to the bound for kernels that split inputs."""
    codes, codebook, row_norms, col_norms = vq
    ones = torch.ones_like(col_norms)
    entries = (
        reference.vq_dequantize(codes, codebook, row_norms, ones, torch.float32).double().abs()
    )
    lost = torch.zeros(len(x), len(row_norms), dtype=torch.float64)
    for run in range(0, len(col_norms), 8 * d):
        columns = slice(run, run + 8 * d)
        largest = (x[:, columns].double() * col_norms[columns].double()).abs().amax(1)
        lost += 2.0**-39 * largest[:, None] * entries[:, columns].sum(1)
    return lost


def fewest_tokens(d: int, code_bits: int, tokens: int) -> int:
    """How few tokens give a token the bits that it has among `tokens` (vq_gemv.h)."""
    return 3 if (d, code_bits) == (6, 12) and tokens > 2 else 1


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
    assert_within_bound(y, x[:tokens], weight, bias)
    fewest = fewest_tokens(d, code_bits, tokens)
    others = x[tokens - fewest : tokens].flip(0)  # the last token is the first among them
    again = run_vq_gemv(driver, others, vq, d, code_bits, bias, seed=0)
    assert_same_bits(y[tokens - 1 :], again[:1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "code_bits"), [(6, 12), (4, 8)])
# One row; one chunk and two chunks of rows; a band's tail; one and several segments, and a tail of
# positions; more items than blocks, the last of one segment shorter.
@pytest.mark.parametrize(
    ("rows", "cols"), [(1, 50), (4130, 100), (300, 203), (192, 401), (70, 1601)]
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
        assert_within_bound(y, x[:tokens], weight, bias)
        assert_same_bits(y[:1], first.setdefault(fewest_tokens(d, code_bits, tokens), y[:1]))


@pytest.mark.parametrize(("d", "code_bits"), [(6, 12), (4, 8)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 11])
@pytest.mark.parametrize("kind", ["1e30", "1e-30", "subnormal", "zero", "outliers", "all sizes"])
def test_vq_gemv_of_extreme_inputs(
    driver: Driver, d: int, code_bits: int, tokens: int, kind: str
) -> None:
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
    assert_within_bound(y, x, weight, None, lost_by_split(x, vq, d) + below)
    if kind == "outliers":  # of a model: nothing is lost that counts
        assert_within_bound(y, x, weight, None)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "code_bits"), [(6, 12), (4, 8), (3, 9)])
@pytest.mark.parametrize("tokens", [2, 11])
def test_vq_gemv_of_inputs_that_are_not_finite(
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


# --- sparse_pack, sparse_gemv ---------------------------------------------------------------------

SPARSE_SHAPES = [(1, 1, 0.0), (9, 70, 0.5), (37, 64, 0.9), (1100, 3, 0.5), (10, 1090, 0.5)]


def sparse_weight(rows: int, cols: int, sparsity: float) -> tuple[Tensor, Tensor]:
    """A random dense weight and the bitmap of what is kept of it."""
    weight = randn(rows, cols, seed=140)
    return weight, ops.prune_select(weight, torch.ones(cols), int(sparsity * rows * cols))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols", "sparsity"), SPARSE_SHAPES)
def test_sparse_pack_and_dequantize(
    driver: Driver, rows: int, cols: int, sparsity: float, dtype: torch.dtype
) -> None:
    weight, bitmap = sparse_weight(rows, cols, sparsity)
    weight = weight.to(dtype)
    offsets = poisoned(rows + 1, dtype=torch.int32)
    assert driver.run("sparse_offsets", bitmap, rows, cols, offsets) == 0
    assert_same_bits(offsets, ops.sparse_offsets(bitmap, cols))
    values = poisoned(int(offsets[-1]), dtype=dtype)
    arguments = [weight, CODES[dtype], rows, cols, cols, bitmap, offsets, values]
    assert driver.run("sparse_pack", *arguments) == 0
    assert_same_bits(values, ops.sparse_pack(weight, bitmap, offsets, int(offsets[-1])))
    for out_dtype in DTYPES:
        begin, end = rows // 3, rows
        out = poisoned(end - begin, cols, dtype=out_dtype)
        arguments = [bitmap, values, CODES[dtype], offsets, rows, cols, begin, end, out]
        assert driver.run("sparse_dequantize", *arguments, CODES[out_dtype], cols) == 0
        want = ops.sparse_dequantize(bitmap, values, offsets, cols, out_dtype)
        assert_same_bits(out, want[begin:end])


def sparse_values(
    weight: Tensor, bitmap: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """values, row_offsets, and the weight that they and the bitmap make in float64."""
    cols = weight.shape[1]
    offsets = ops.sparse_offsets(bitmap, cols)
    values = ops.sparse_pack(weight.to(dtype), bitmap, offsets, int(offsets[-1]))
    dense = ops.sparse_dequantize(bitmap, values, offsets, cols, torch.float32).double()
    return values, offsets, dense


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
# One row; a tail of rows and columns; nothing and nearly all pruned; more steps than warps, which
# then go through several each.
@pytest.mark.parametrize(
    ("rows", "cols", "sparsity"),
    [(1, 8, 0.0), (33, 200, 0.5), (17, 1096, 0.0), (40, 1032, 0.97), (19, 4168, 0.5)],
)
def test_sparse_gemv_by_tensor_cores(
    driver: Driver, rows: int, cols: int, sparsity: float, dtype: torch.dtype
) -> None:
    weight, bitmap = sparse_weight(rows, cols, sparsity)
    check_sparse_by_tensor_cores(driver, weight, bitmap, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
# Columns that end within a step, a lane's share, and one (where rows do not begin at chunks).
@pytest.mark.parametrize(("rows", "cols"), [(35, 2208), (16, 64), (1, 1040), (20, 1064), (1, 72)])
def test_sparse_gemv_2_of_4_by_tensor_cores(
    driver: Driver, rows: int, cols: int, dtype: torch.dtype
) -> None:
    weight = randn(rows, cols, seed=141)
    bitmap = ops.prune_select_nm(weight, torch.ones(cols), 2, 4)
    check_sparse_by_tensor_cores(driver, weight, bitmap, dtype)


def test_sparse_gemv_of_one_row_that_is_not_2_of_4(driver: Driver) -> None:
    """Also where the number of values is the same."""
    weight = randn(32, 1088, seed=142)
    bitmap = ops.prune_select_nm(weight, torch.ones(1088), 2, 4)
    bitmap[20, 100] = 0b01110100  # 1 and 3 of 4
    check_sparse_by_tensor_cores(driver, weight, bitmap, torch.bfloat16)


def check_sparse_by_tensor_cores(
    driver: Driver, weight: Tensor, bitmap: Tensor, dtype: torch.dtype
) -> None:
    rows, cols = weight.shape
    values, offsets, dense = sparse_values(weight, bitmap, dtype)
    x, bias = randn(16, cols, seed=150).to(dtype), randn(rows, seed=151).to(dtype)
    first = None
    for tokens in (1, 7, 8, 9, 16):
        y = poisoned(tokens, rows, dtype=dtype)
        some_bias = bias if tokens % 2 else None
        arguments = [x[:tokens].contiguous(), CODES[dtype], tokens, bitmap, values]
        arguments += [CODES[dtype], offsets, some_bias, rows, cols, y]
        assert driver.run("sparse_gemv", *arguments, seed=tokens) == 0
        assert_within_bound(y, x[:tokens], dense, some_bias)
        if some_bias is not None:
            first = y[:1] if first is None else first
            assert_same_bits(y[:1], first)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_sparse_gemv_of_inputs_that_are_not_finite(driver: Driver, bad: float) -> None:
    """They reach outputs of their own token alone, and at least the rows that keep their column."""
    weight, bitmap = sparse_weight(24, 200, 0.5)
    values, offsets, dense = sparse_values(weight, bitmap, torch.float16)
    x = randn(3, 200, seed=150).half()
    outputs = []
    for _ in range(2):
        y = poisoned(3, 24, dtype=torch.float16)
        arguments = [x, CODES[x.dtype], 3, bitmap, values, CODES[x.dtype], offsets]
        assert driver.run("sparse_gemv", *arguments, None, 24, 200, y, seed=2) == 0
        outputs.append(y)
        x[1, 60] = bad
    assert_same_bits(outputs[0][::2], outputs[1][::2])
    assert not outputs[1][1, dense[:, 60] != 0].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values_dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols", "sparsity"), SPARSE_SHAPES[:3] + SPARSE_SHAPES[4:])
def test_sparse_gemv(
    driver: Driver,
    rows: int,
    cols: int,
    sparsity: float,
    dtype: torch.dtype,
    values_dtype: torch.dtype,
) -> None:
    weight, bitmap = sparse_weight(rows, cols, sparsity)
    values, offsets, dense = sparse_values(weight, bitmap, values_dtype)
    x, bias = randn(16, cols, seed=150).to(dtype), randn(rows, seed=151).to(dtype)
    results = {}
    for tokens in (1, 3, 16):
        y = poisoned(tokens, rows, dtype=dtype)
        some_bias = bias if tokens == 3 else None
        arguments = [x[:tokens].contiguous(), CODES[dtype], tokens, bitmap, values]
        arguments += [CODES[values_dtype], offsets, some_bias, rows, cols, y]
        assert driver.run("sparse_gemv", *arguments, seed=tokens % 4) == 0
        assert_within_bound(y, x[:tokens], dense, some_bias)
        results[tokens] = y
    assert_same_bits(results[16][:1], results[1])
