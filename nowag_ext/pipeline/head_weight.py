"""The weight of a model's head, compressed under what the compressed layers have it read."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from nowag_ext.codebook_training import train_codebook
from nowag_ext.methods import Given, LayerProgress, VQSettings
from nowag_ext.pipeline.codebooks import TRAINING_ITERATIONS, TRAINING_WEIGHTS
from nowag_ext.pipeline.head import Head
from nowag_ext.pipeline.statistics import GroupStatistics
from nowag_ext.plan import Unit
from nowag_ext.vq import VQWeight


def head_statistics(
    head: Head, dense: Tensor, compressed: Tensor, in_features: int
) -> GroupStatistics:
    """Of what the head reads, where the last layer of each stream returns these states."""
    statistics = GroupStatistics(in_features, compressed.device)
    for window in zip(dense.split(1), compressed.split(1), strict=True):
        wanted, given = (head.inputs(states).reshape(-1, in_features) for states in window)
        statistics.add_pair(wanted, given, {}, {}, all_summed=False)
    return statistics


def compress_head(unit: Unit, statistics: GroupStatistics, progress: LayerProgress) -> VQWeight:
    """The packed head, with a codebook of its own, by error feedback.

    It is corrected towards the dense model's logits, as the linears before it are towards what the
    dense stream has. An embedding that is tied to it takes what comes of that: what its own errors
    cost is not asked. (On SmolLM2 the correction takes 1.5 % of the KL away all the same.)
    """
    settings = unit.settings
    assert isinstance(settings, VQSettings)
    hessian = statistics.hessian()
    extra = statistics.corrections({"head": unit.weight}).get("head")
    norms = hessian.diagonal().clamp(min=0).sqrt()
    iters = min(settings.iters, TRAINING_ITERATIONS)
    codebook = train_codebook(
        [(unit.weight, norms)], d=settings.d, bits=settings.bits, name="head",
        share=min(1.0, TRAINING_WEIGHTS / unit.size), iters=iters, init=settings.init,
        seed=settings.seed, progress=lambda done, most, _objective: progress(0.5 * done / most),
    )  # fmt: skip
    weight = settings.compress(unit.weight, norms, progress, Given(hessian, extra, codebook))
    assert isinstance(weight, VQWeight)
    progress(1.0)
    return replace(weight, codebook_name=None)
