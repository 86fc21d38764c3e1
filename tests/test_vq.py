"""vq_compress and VQWeight: what they promise to a user."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from compare import assert_same_bits
from torch import Tensor

from nowag_ext import kmeans, ops, reference
from nowag_ext.normalize import normalize_weight
from nowag_ext.vq import VQWeight, vq_compress


def layer(rows: int = 96, cols: int = 50, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    return weight, torch.randn(cols, generator=generator).mul(1.5).exp()


def objective(weight: Tensor, act_norms: Tensor, vq: VQWeight) -> float:
    """The relative objective in float64 from the stored tensors alone."""
    parts = normalize_weight(weight, act_norms)
    codes = ops.unpack_codes(vq.codes, weight.shape[0]).to(torch.int64)
    entries = vq.codebook.double()[codes].reshape(weight.shape[0], -1)[:, : weight.shape[1]]
    h, wn = parts.importance.double(), parts.normalized.double()
    return float((h * (wn - entries).square()).sum() / (h * wn.square()).sum())


@pytest.mark.parametrize("init", ["kmeans++", "random"])
@pytest.mark.parametrize(("d", "bits"), [(1, 2), (2, 3), (3, 2), (4, 2), (5, 1.2), (8, 1)])
def test_objective_falls_and_is_reported_for_what_is_stored(d: int, bits: float, init: str) -> None:
    weight, act_norms = layer()
    vq = vq_compress(weight, act_norms, d=d, bits=bits, iters=12, init=init)
    assert all(b <= a * (1 + 1e-6) for a, b in zip(vq.history, vq.history[1:], strict=False))
    assert vq.relative_objective == pytest.approx(objective(weight, act_norms, vq), rel=1e-6)
    assert vq.relative_objective == pytest.approx(vq.history[-1], rel=0.05)
    assert vq.code_bits == round(d * bits)


def test_codes_are_nearest_in_the_stored_codebook() -> None:
    weight, act_norms = layer(70, 41)
    vq = vq_compress(weight, act_norms, d=4, bits=2, iters=5)
    parts = normalize_weight(weight, act_norms)
    h = torch.nn.functional.pad(parts.importance, (0, 3))
    want = reference.kmeans_assign(parts.normalized, h, vq.codebook.float())
    assert_same_bits(ops.unpack_codes(vq.codes, 70).to(torch.int32), want.to(torch.int32))


def test_dequantize() -> None:
    weight, act_norms = layer(70, 41)
    vq = vq_compress(weight, act_norms, d=4, bits=2, iters=5)
    dense = vq.dequantize()
    entries = vq.codebook.float()[ops.unpack_codes(vq.codes, 70).to(torch.int64)]
    want = vq.row_norms.float()[:, None] * entries.reshape(70, -1)[:, :41] * vq.col_norms.float()
    assert_same_bits(dense, want)
    assert_same_bits(vq.dequantize(torch.bfloat16), want.bfloat16())
    error = ((dense - weight) * act_norms).norm() / (weight * act_norms).norm()
    assert error < 0.6


def test_bits_per_weight_counts_everything() -> None:
    weight, act_norms = layer(70, 41)
    vq = vq_compress(weight, act_norms, d=4, bits=2, iters=1)
    stored = 3 * 11 * 32 + 256 * 4 * 2 + 2 * 70 + 2 * 41
    assert vq.bits_per_weight == 8 * stored / (70 * 41)


def test_same_bits_for_a_seed_at_any_thread_count() -> None:
    weight, act_norms = layer(300, 90)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(vq_compress(weight, act_norms, d=3, bits=2, iters=8, n_init=2, seed=5))
    torch.set_num_threads(before)
    for other in results[1:]:
        for name, tensor in results[0].tensors().items():
            assert_same_bits(tensor, other.tensors()[name])
        assert other.relative_objective == results[0].relative_objective
        assert other.history == results[0].history


def test_seeds_differ_and_restarts_keep_the_best() -> None:
    weight, act_norms = layer(120, 60)
    settings = {"d": 3, "bits": 2, "iters": 6, "init": "random"}
    one = vq_compress(weight, act_norms, seed=1, **settings)
    assert not torch.equal(
        one.codebook, vq_compress(weight, act_norms, seed=2, **settings).codebook
    )
    several = [vq_compress(weight, act_norms, seed=1, n_init=n, **settings) for n in (1, 2, 4, 8)]
    objectives = [vq.relative_objective for vq in several]
    assert objectives == sorted(objectives, reverse=True)
    assert objectives[-1] < objectives[0]


def test_stops_when_nothing_changes() -> None:
    weight, act_norms = layer(20, 8)
    vq = vq_compress(weight, act_norms, d=2, bits=1, iters=1000)
    assert len(vq.history) < 200
    assert vq.history[-1] <= vq.history[0]


def test_progress_sees_seeding_and_every_iteration_and_can_stop() -> None:
    weight, act_norms = layer()
    seen: list[tuple[int, int, float]] = []
    vq = vq_compress(
        weight, act_norms, d=2, bits=2, iters=4, progress=lambda *state: seen.append(state)
    )
    assert seen == [(i, 4, value) for i, value in enumerate([math.inf, *vq.history])]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vq_compress(weight, act_norms, d=2, bits=2, progress=interrupt)


def test_progress_of_several_runs_says_when_each_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, act_norms = layer()
    seen: list[Any] = []
    seed = ops.kmeans_seed
    monkeypatch.setattr(ops, "kmeans_seed", lambda *given: (seen.append("seeded"), seed(*given))[1])
    vq_compress(
        weight, act_norms, d=2, bits=2, iters=1, n_init=2,
        progress=lambda *told: seen.append((*told[:2], told[2] == math.inf)),
    )  # fmt: skip
    assert seen == [
        (0, 2, True), "seeded", (1, 2, False), (1, 2, True), "seeded", (2, 2, False),
    ]  # fmt: skip


def test_empty_entries_are_reseeded() -> None:
    """Random seeds from rows of which half are equal leave entries empty at first."""
    weight, act_norms = layer(128, 16)
    weight[:64] = weight[0]
    vq = vq_compress(weight, act_norms, d=4, bits=2, iters=30, init="random")
    used = torch.unique(ops.unpack_codes(vq.codes, 128).to(torch.int32)).numel()
    assert used >= 250
    assert all(b <= a * (1 + 1e-6) for a, b in zip(vq.history, vq.history[1:], strict=False))


def test_fewer_distinct_points_than_entries_is_exact_and_ends() -> None:
    weight = torch.tensor([[1.0, 2.0, 1.0, 2.0], [3.0, -1.0, 3.0, -1.0]]).repeat(32, 4)
    vq = vq_compress(weight, torch.ones(16), d=2, bits=3, iters=100)
    assert len(vq.history) < 10
    assert vq.relative_objective < 1e-6


def test_scale_of_act_norms_does_not_matter() -> None:
    weight, act_norms = layer()
    one = vq_compress(weight, act_norms, d=2, bits=2, iters=3)
    two = vq_compress(weight, act_norms * 4, d=2, bits=2, iters=3)
    for name, tensor in one.tensors().items():
        assert_same_bits(tensor, two.tensors()[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    weight, act_norms = layer()
    weight = weight.to(dtype)
    one = vq_compress(weight, act_norms, d=2, bits=2, iters=3)
    two = vq_compress(weight.float(), act_norms, d=2, bits=2, iters=3)
    assert_same_bits(one.codes, two.codes)


def test_numpy() -> None:
    weight, act_norms = layer()
    one = vq_compress(weight, act_norms, d=2, bits=2, iters=3)
    two = vq_compress(weight.numpy(), act_norms.numpy(), d=2, bits=2, iters=3)
    assert_same_bits(one.codes, two.codes)


def test_given_codebook_is_only_assigned_to() -> None:
    weight, act_norms = layer()
    first = vq_compress(weight, act_norms, d=4, bits=2, iters=10)
    for codebook in (first.codebook, first.codebook.float().numpy()):
        again = vq_compress(weight, act_norms, d=4, bits=2, codebook=codebook)
        assert_same_bits(again.codes, first.codes)
        assert_same_bits(again.codebook, first.codebook)
        assert again.relative_objective == first.relative_objective
        assert again.history == []


def test_given_codebook_may_be_larger_than_the_layer() -> None:
    weight, act_norms = layer(3, 8)
    vq = vq_compress(weight, act_norms, d=2, bits=4, codebook=torch.randn(256, 2))
    assert vq.relative_objective == pytest.approx(objective(weight, act_norms, vq), rel=1e-6)


def test_to_keeps_everything() -> None:
    weight, act_norms = layer()
    vq = vq_compress(weight, act_norms, d=2, bits=2, iters=2)
    moved = vq.to("cpu")
    assert moved.history == vq.history
    assert_same_bits(moved.codes, vq.codes)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"d": 0}, "d must be an integer from 1 to 8, not 0"),
        ({"d": 9}, "d must be an integer from 1 to 8, not 9"),
        ({"d": 2.0}, r"d must be an integer from 1 to 8, not 2\.0"),
        ({"d": 3, "bits": 1.5}, r"d \* bits must be an integer, not 3 \* 1\.5 = 4\.5"),
        ({"d": 8, "bits": 3}, r"d \* bits must be from 1 to 16, not 8 \* 3 = 24"),
        ({"d": 2, "bits": 0}, r"d \* bits must be from 1 to 16, not 2 \* 0 = 0"),
        ({"bits": float("nan")}, r"d \* bits must be an integer"),
        ({"iters": 0}, "iters must be a positive integer, not 0"),
        ({"n_init": 0}, "n_init must be a positive integer, not 0"),
        ({"init": "best"}, 'init must be "kmeans\\+\\+" or "random", not \'best\''),
        ({"seed": -1}, r"seed must be an integer from 0 to 2\^63 - 1, not -1"),
        (
            {"d": 6, "bits": 2},
            "a codebook of 4096 entries needs at least as many sub-vectors, but a 96 x 50 weight "
            "cut into sub-vectors of 6 has only 864 sub-vectors",
        ),
        (
            {"d": 2, "bits": 2, "codebook": torch.zeros(16, 3)},
            r"codebook must have shape \(16, 2\), 2\^\(d \* bits\) entries of d, not \(16, 3\)",
        ),
        (
            {"d": 2, "bits": 2, "codebook": torch.full((16, 2), 1e6)},
            "codebook must be finite in fp16",
        ),
        (
            {"d": 2, "bits": 2, "codebook": torch.full((16, 2), float("nan"))},
            "codebook must be finite in fp16",
        ),
    ],
)
def test_settings_that_are_refused(settings: dict[str, object], sentence: str) -> None:
    weight, act_norms = layer()
    with pytest.raises(ValueError, match=sentence):
        vq_compress(weight, act_norms, **settings)


@pytest.mark.parametrize("codebook", [[[0.0]], torch.zeros(16, 2, dtype=torch.int32)])
def test_codebooks_of_other_types_are_refused(codebook: object) -> None:
    weight, act_norms = layer()
    with pytest.raises(TypeError, match="codebook must be"):
        vq_compress(weight, act_norms, d=2, bits=2, codebook=codebook)


def test_weights_that_are_refused() -> None:
    weight, act_norms = layer()
    bad = weight.clone()
    bad[3, 7] = float("nan")
    with pytest.raises(ValueError, match="W must be finite, but column 7 holds a NaN"):
        vq_compress(bad, act_norms, d=2, bits=2)
    with pytest.raises(ValueError, match="a column norm of W exceeds the largest fp16 value"):
        vq_compress(weight * 1e5, act_norms, d=2, bits=2)
    with pytest.raises(ValueError, match="act_norms must not all be zero"):
        vq_compress(weight, torch.zeros(50), d=2, bits=2)
    with pytest.raises(TypeError, match="W must be float32 or float16 in NumPy, not float64"):
        vq_compress(np.zeros((4, 4)), np.ones(4), d=2, bits=1)


def test_dead_inputs_and_a_zero_weight_stay_finite() -> None:
    weight, act_norms = layer()
    act_norms[10:20] = 0
    assert torch.isfinite(vq_compress(weight, act_norms, d=4, bits=1, iters=3).dequantize()).all()
    zero = vq_compress(torch.zeros(20, 8), torch.ones(8), d=2, bits=1, iters=3)
    assert zero.relative_objective == 0
    assert_same_bits(zero.dequantize(), torch.zeros(20, 8))


def test_relocation_beats_the_seeds_and_never_rises() -> None:
    """A few inputs matter far more than the rest, as in real layers: seeds misjudge them."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(256, 256, generator=generator)
    norms = torch.randn(256, generator=generator).mul(1.5).exp()
    normalized = normalize_weight(weight, norms)
    points = kmeans.Points([normalized.normalized], [normalized.importance], 4)
    codebook = ops.kmeans_seed(points.w, points.h, 256, 4, "random", 0)
    result = points.run(codebook.clone(), 60, lambda *_: None)
    sums, plain = points._no_sums(codebook), 0.0
    for _ in range(60):
        points._assign(codebook, sums)
        drop, _ = ops.kmeans_update(sums, points.scale, codebook)
        plain = 1 - float(drop) / points.energy
    assert result.history[-1] < 0.98 * plain
    for before, after in itertools.pairwise(result.history):
        assert after <= before * (1 + 1e-6)


def test_dead_inputs_are_reconstructed_as_well_as_codes_allow() -> None:
    weight, act_norms = torch.randn(256, 512), torch.rand(512) + 0.1
    act_norms[:256] = 0
    vq = vq_compress(weight, act_norms, d=4, bits=2, iters=10)
    error = (vq.dequantize() - weight).square()
    assert error[:, :256].sum() < 0.3 * weight[:, :256].square().sum()
    alive = vq_compress(weight[:, 256:], act_norms[256:], d=4, bits=2, iters=10)
    least = (alive.dequantize() - weight[:, 256:]).square().sum()
    assert error[:, 256:].sum() < 1.05 * least


@pytest.mark.parametrize("factor", [1e200, 1e-200, 2.0**-1060, 2.0**1000])
def test_any_multiple_of_the_norms_gives_the_same_codes(factor: float) -> None:
    weight, act_norms = layer()
    want = vq_compress(weight, act_norms, d=4, bits=2, iters=3)
    scaled = act_norms.double() * 2.0 ** (torch.tensor(factor, dtype=torch.float64).log2().round())
    got = vq_compress(weight, scaled, d=4, bits=2, iters=3)
    if float(scaled.min()) > 1e-300:  # all of their bits are there
        assert torch.equal(got.codes, want.codes)
        assert torch.equal(got.codebook, want.codebook)
    else:
        assert got.relative_objective == pytest.approx(want.relative_objective, rel=1e-2)


def test_norms_beyond_float32_are_named_as_such() -> None:
    weight, act_norms = torch.full((64, 64), 1e38), torch.ones(64)
    with pytest.raises(ValueError, match=r"norm of column 0 of W is beyond float32: .* is 1e\+38"):
        vq_compress(weight, act_norms, d=4, bits=1, iters=1)
    weight[3, 5] = torch.inf
    with pytest.raises(ValueError, match="column 0 of W is beyond float32"):
        vq_compress(weight, act_norms, d=4, bits=1, iters=1)
    weight = torch.randn(64, 64)
    weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match="W must be finite, but column 5 holds"):
        vq_compress(weight, act_norms, d=4, bits=1, iters=1)


def test_representation_is_a_line_and_equality_is_identity() -> None:
    weight, act_norms = layer()
    vq = vq_compress(weight, act_norms, d=4, bits=2, iters=2)
    assert re.fullmatch(r"VQWeight\(96 x 50, d=4, bits=2, relative objective 0\.\d+\)", repr(vq))
    assert vq == vq
    assert vq != vq_compress(weight, act_norms, d=4, bits=2, iters=2)
