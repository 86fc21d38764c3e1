"""The weight of a model's head, compressed under what the compressed layers have it read."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from nowag_ext.codebook_training import train_codebook
from nowag_ext.methods import Given, LayerProgress, VQSettings
from nowag_ext.pipeline.codebooks import TRAINING_ITERATIONS, TRAINING_WEIGHTS
from nowag_ext.pipeline.head import Head
from nowag_ext.pipeline.ranks import Ranks
from nowag_ext.pipeline.statistics import GroupStatistics
from nowag_ext.plan import Unit
from nowag_ext.vq import VQWeight


def head_hessian(head: Head, hidden: Tensor, in_features: int, ranks: Ranks) -> Tensor:
    """E[x x^T] of what the head reads where the last layer returns these states, on all ranks."""
    statistics = GroupStatistics(in_features, hidden.device)
    for window in hidden.split(1):
        statistics.add(head.inputs(window).reshape(-1, in_features))
    statistics.add_up(ranks)
    return statistics.hessian()


def compress_head(unit: Unit, hessian: Tensor, progress: LayerProgress) -> VQWeight:
    """The packed head, with a codebook of its own, by error feedback.

    An embedding that is tied to it takes what comes of that: what its own errors cost is not asked.
    """
    settings = unit.settings
    assert isinstance(settings, VQSettings)
    norms = hessian.diagonal().clamp(min=0).sqrt()
    iters = min(settings.iters, TRAINING_ITERATIONS)
    codebook = train_codebook(
        [(unit.weight, norms)], d=settings.d, bits=settings.bits, name="head",
        share=min(1.0, TRAINING_WEIGHTS / unit.size), iters=iters, init=settings.init,
        seed=settings.seed, progress=lambda done, most, _objective: progress(0.5 * done / most),
    )  # fmt: skip
    weight = settings.compress(unit.weight, norms, progress, Given(hessian, None, codebook))
    assert isinstance(weight, VQWeight)
    progress(1.0)
    return replace(weight, codebook_name=None)
