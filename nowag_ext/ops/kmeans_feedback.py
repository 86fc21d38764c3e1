"""kmeans_feedback.h: assignment with error feedback, under the full Hessian of a layer's inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nowag_ext.ops.checks import check, check_aligned, require, same_device
from nowag_ext.ops.registry import backend_of, operation


def feedback_sums_columns(d: int) -> int:
    """Columns of the sums: of M x~ [d], of M's upper triangle [d (d + 1) / 2], of points."""
    return d + d * (d + 1) // 2 + 1


def _kmeans_feedback_fake(x: Tensor, *others: Any, **named: Any) -> None:
    names = ("carried", "factor", "codebook", "codes", "scale", "sums")
    operands = {**dict(zip(names, others, strict=False)), **named}
    same_device(x.device, **{name: one for name, one in operands.items() if name != "scale"})


@operation(
    "kmeans_feedback(Tensor(a!) x, Tensor(b!) carried, Tensor factor, Tensor codebook, "
    "Tensor(c!) codes, float scale=1.0, Tensor(d!)? sums=None) -> ()",
    _kmeans_feedback_fake,
)
def kmeans_feedback(
    x: Tensor,
    carried: Tensor,
    factor: Tensor,
    codebook: Tensor,
    codes: Tensor,
    scale: float = 1.0,
    sums: Tensor | None = None,
) -> None:
    """Settles a block of positions, one after another, each taking up what those before missed.

    Args:
        x: the block's points, fp32 [rows, positions * d], rows contiguous; becomes their errors.
        carried: what the errors of earlier blocks carry here, fp32 [rows, positions * d]; becomes
            the errors in the metric, whose squares add up to the objective.
        factor: the block of V on its diagonal, fp32 [positions * d, positions * d], rows
            contiguous.
        codebook: fp32 [K, d].
        codes: uint16 [rows, positions], written.
        scale: of the sums.
        sums: int64 [K, feedback_sums_columns(d)], added to; None: not wanted.
    """
    rows, positions = codes.shape
    entries, d = codebook.shape
    columns = positions * d
    for name, tensor, height in (("x", x, rows), ("factor", factor, columns)):
        require(
            tensor.dtype == torch.float32 and tuple(tensor.shape) == (height, columns),
            f"{name} must be float32 of shape {(height, columns)}, "
            f"not {tensor.dtype} of shape {tuple(tensor.shape)}.",
        )
        require(
            tensor.stride(1) == 1 and tensor.stride(0) >= columns,
            f"the rows of {name} must be contiguous, and not overlap.",
        )
        check_aligned(tensor, name)
    check(carried, "carried", torch.float32, (rows, columns))
    check(codebook, "codebook", torch.float32, (entries, d))
    check(codes, "codes", torch.uint16, (rows, positions))
    if sums is not None:
        check(sums, "sums", torch.int64, (entries, feedback_sums_columns(d)))
    same_device(x.device, carried=carried, factor=factor, codebook=codebook, codes=codes, sums=sums)
    backend, queue = backend_of(x.device)
    backend.kmeans_feedback(
        x.data_ptr(), x.stride(0), carried.data_ptr(), factor.data_ptr(), factor.stride(0),
        codebook.data_ptr(), rows, positions, entries, d, codes.data_ptr(), scale,
        0 if sums is None else sums.data_ptr(), queue,
    )  # fmt: skip
