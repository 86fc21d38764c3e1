"""One codebook for many linears: joint weighted k-means on a sample of their rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from nowag_ext import ops
from nowag_ext.codebook import Codebook, check_name
from nowag_ext.grad_mode import ordinary_tensors
from nowag_ext.kmeans import Points, half_entries
from nowag_ext.normalize import normalize_weight, sampled
from nowag_ext.vq import Progress, check_code, check_iterations, floored


@ordinary_tensors
def train_codebook(
    layers: Iterable[tuple[Any, Any]],
    *,
    d: int = 6,
    bits: float = 2,
    name: str = "model",
    share: float = 1.0,
    iters: int = 40,
    init: str = "kmeans++",
    seed: int = 0,
    progress: Progress | None = None,
) -> Codebook:
    """Trains a codebook for several linears: NoWag-VQ's k-means on all of them together.

    Points are sub-vectors of sqrt(in_features) * Wn, whose size does not depend on the layer, and
    importances have mean 1 in each layer, so that every layer weighs by its size. One layer at a
    time is looked at; only the rows sampled are kept. Same inputs and seed give the same bits at
    any number of threads.

    Args:
        layers: (W, act_norms) of every linear, as for ``vq_compress``.
        d, bits: of the codes; 2^(d * bits) entries.
        name: under which a model stores the codebook.
        share: of each layer's rows to train on, evenly spaced, in (0, 1].
        iters: most iterations; stops earlier once no code changes.
        init, seed: as for ``vq_compress``.
        progress: called before the starting codebook is drawn and after every iteration with the
            number of iterations done, the most there can be, and the relative objective, at first
            infinite.

    Raises:
        TypeError, ValueError: as ``vq_compress`` for unfit layers or settings; a share outside
            (0, 1]; no layers; fewer sub-vectors in the sample than entries.
    """
    code_bits = check_code(d, bits)
    check_iterations(iters, 1, init, seed)
    check_name(name)
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], not {share!r}.")
    samples, importances = [], []
    for weight, act_norms in layers:
        layer = normalize_weight(weight, act_norms)
        cols = layer.normalized.shape[1]
        samples.append(sampled(layer.normalized, share) * math.sqrt(cols))
        importances.append(floored(layer.importance))
    if not samples:
        raise ValueError("layers is empty: a codebook is trained on at least one linear.")
    points = Points(samples, importances, d)
    entries = 1 << code_bits
    if points.count < entries:
        raise ValueError(
            f"a codebook of {entries} entries needs at least as many sub-vectors, but the sampled "
            f"rows of {len(samples)} layers have only {points.count} sub-vectors of {d}: use fewer "
            "bits, or a larger share."
        )

    def report(iteration: int, objective: float) -> None:
        if progress is not None:
            progress(iteration, iters, objective)

    report(0, math.inf)
    start = ops.kmeans_seed(points.w, points.h, entries, d, init, seed)
    return Codebook(half_entries(points.improve(start, iters, report)), name)
