"""Selection: from W and act_norms to the bitmap of kept weights, against sorting and selecting.

A peer gets the saliencies for nothing and only has to find the threshold (or the order); our own
figures are given for the same part, and for the whole way with the normalisation included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import numpy as np
import torch
from torch import Tensor

from nowag_ext import ops, reference
from nowag_ext.normalize import normalize_weight

SHAPES = [(4096, 11008), (4096, 4096), (576, 1536)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def weight_to_bitmap(weight: Tensor, norms: Tensor, n_prune: int) -> Tensor:
    problem = normalize_weight(weight, norms)
    return ops.prune_select(problem.normalized, problem.importance, n_prune)


def weight_to_pattern(weight: Tensor, norms: Tensor) -> Tensor:
    problem = normalize_weight(weight, norms)
    return ops.prune_select_nm(problem.normalized, problem.importance, 2, 4)


def validate(w: Tensor, h: Tensor, n_prune: int) -> None:
    assert torch.equal(ops.prune_select(w, h, n_prune), reference.prune_select(w, h, n_prune))
    assert torch.equal(ops.prune_select_nm(w, h, 2, 4), reference.prune_select_nm(w, h, 2, 4))


def calls(function: Callable[..., Any], *operands: list[Any]) -> list[Callable[[], Any]]:
    """One closure for each copy of the operands."""
    return [lambda items=items: function(*items) for items in zip(*operands, strict=True)]


def bench_selection(report: harness.Report, shape: tuple[int, int], seconds: float) -> None:
    numel = shape[0] * shape[1]
    n_prune = numel // 2
    count = harness.rotation_count(8 * numel, most=64)
    weights = [torch.randn(shape) for _ in range(count)]
    h = torch.rand(shape[1]).square() * 4
    saliencies = [reference.saliency(w, h).flatten() for w in weights]
    arrays = [values.numpy() for values in saliencies]
    validate(weights[0], h, n_prune)
    everywhere = [h] * count
    contenders = {
        "prune_select 50 %": calls(
            lambda w, h: ops.prune_select(w, h, n_prune), weights, everywhere
        ),
        "prune_select_nm 2:4": calls(
            lambda w, h: ops.prune_select_nm(w, h, 2, 4), weights, everywhere
        ),
        "torch.kthvalue": calls(lambda values: torch.kthvalue(values, n_prune), saliencies),
        "numpy.partition": calls(lambda values: np.partition(values, n_prune), arrays),
        "torch.argsort": calls(lambda values: torch.argsort(values), saliencies),
    }
    cost = {name: {"bytes": 4 * numel} for name in contenders}
    timings = harness.compare(contenders, seconds, least=3)
    peers = ["torch.argsort", "torch.kthvalue", "numpy.partition"]
    report.add(f"{shape[0]}x{shape[1]}", timings, peers, cost)


def bench_whole_way(
    report: harness.Report, shape: tuple[int, int], dtype: str, seconds: float
) -> None:
    numel = shape[0] * shape[1]
    size = DTYPES[dtype].itemsize
    count = harness.rotation_count(2 * size * numel, most=64)
    weights = [torch.randn(shape).to(DTYPES[dtype]) for _ in range(count)]
    targets = [torch.empty_like(weight) for weight in weights]
    norms = [torch.rand(shape[1]) + 0.1] * count
    contenders = {
        f"{dtype} W to 50 % bitmap": calls(
            lambda w, norms: weight_to_bitmap(w, norms, numel // 2), weights, norms
        ),
        f"{dtype} W to 2:4 bitmap": calls(weight_to_pattern, weights, norms),
        "torch copy_": calls(lambda to, w: to.copy_(w), targets, weights),
        "torch clone": calls(torch.clone, weights),
    }
    cost = {name: {"bytes": size * numel} for name in contenders}
    timings = harness.compare(contenders, seconds)
    report.add(f"{shape[0]}x{shape[1]}", timings, ["torch copy_", "torch clone"], cost)


def main() -> None:
    options = harness.arguments(__doc__).parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    report = harness.Report("prune")
    for shape in SHAPES:
        bench_selection(report, shape, options.seconds)
        for dtype in DTYPES:
            bench_whole_way(report, shape, dtype, options.seconds)
    if options.json:
        report.write(options.json)


if __name__ == "__main__":
    main()
