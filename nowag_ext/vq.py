"""Vector quantisation of a weight matrix: NoWag-VQ, weighted k-means on normalised weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nowag_ext import ops
from nowag_ext.kmeans import Clustering, Points
from nowag_ext.normalize import NormalizedWeight, normalize_weight

Progress = Callable[[int, int, float], None]

# Between the seeds of restarts, so that restarts of neighbouring seeds have none in common.
_SEED_STRIDE = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class VQWeight:
    """A weight [out_features, in_features] as codes into a codebook, with its norms.

    The tensors are in the canonical form of ``csrc/include/nowag/format.h``.

    Attributes:
        codes: packed codes, uint8 [ceil(out_features / 32), ceil(in_features / d), 4 * code_bits].
        codebook: fp16 [2^code_bits, d].
        row_norms: fp16 [out_features].
        col_norms: fp16 [in_features].
        shape: (out_features, in_features).
        d: length of a sub-vector.
        bits: bits a weight in the codes alone; d * bits is an integer.
        relative_objective: sum h (Wn - Q)^2 / sum h Wn^2 of these codes and this codebook, None
            where it is not known.
        history: the same before rounding to fp16, after each iteration.
    """

    codes: Tensor
    codebook: Tensor
    row_norms: Tensor
    col_norms: Tensor
    shape: tuple[int, int]
    d: int
    bits: float
    relative_objective: float | None = None
    history: list[float] = field(default_factory=list)

    @property
    def code_bits(self) -> int:
        """Bits of one code; the codebook has 2^code_bits entries."""
        return round(self.d * self.bits)

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight with everything counted: codes and their padding, codebook, norms."""
        stored = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())
        return 8 * stored / (self.shape[0] * self.shape[1])

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors under their canonical names."""
        return {
            "codes": self.codes,
            "codebook": self.codebook,
            "row_norms": self.row_norms,
            "col_norms": self.col_norms,
        }

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [out_features, in_features] in fp32, fp16 or bf16."""
        return ops.vq_dequantize(self.codes, self.codebook, self.row_norms, self.col_norms, dtype)

    def to(self, device: torch.device | str) -> VQWeight:
        """The same weight on another device."""
        return replace(
            self,
            codes=self.codes.to(device),
            codebook=self.codebook.to(device),
            row_norms=self.row_norms.to(device),
            col_norms=self.col_norms.to(device),
        )


def vq_compress(
    W: Any,
    act_norms: Any,
    *,
    d: int = 6,
    bits: float = 2,
    iters: int = 100,
    n_init: int = 1,
    init: str = "kmeans++",
    seed: int = 0,
    codebook: Any = None,
    progress: Progress | None = None,
) -> VQWeight:
    """Compresses a weight to codes into a codebook of 2^(d * bits) sub-vectors (NoWag-VQ).

    Minimises sum_ij h_j (Wn_ij - Q_ij)^2 over the codebook and the codes by k-means, Wn the
    normalised weight and h = act_norms^2 over its mean. Same inputs and seed give the same bits at
    any number of threads.

    Args:
        W: [out_features, in_features], torch fp32, fp16 or bf16, or NumPy fp32 or fp16; finite.
        act_norms: [in_features] on W's device, sqrt of the mean square of each input on calibration
            text; not negative, not all 0.
        d: length of a sub-vector, 1 to 8; if it does not divide in_features the last is padded.
        bits: bits a weight in the codes; d * bits is an integer from 1 to 16.
        iters: most iterations; stops earlier once no code changes.
        n_init: runs from different seeds, of which the one of the lowest objective is kept.
        init: "kmeans++" or "random" (points drawn one from each of K equal strata).
        seed: of the random numbers, 0 to 2^63 - 1.
        codebook: torch or NumPy [2^(d * bits), d]: use this codebook, rounded to fp16, and only
            assign; iters, n_init, init and seed then do nothing.
        progress: called after every iteration with the number of iterations done in all runs, the
            most there can be, and the relative objective.

    Raises:
        TypeError: a wrong type or dtype of W, act_norms or codebook.
        ValueError: a wrong shape, device or setting; NaN or infinities; all-zero or negative
            act_norms; fewer sub-vectors than codebook entries; norms beyond fp16.
    """
    entries = _entries(d, bits)
    _check_settings(iters, n_init, init, seed)
    normalized = normalize_weight(W, act_norms)
    norms = _half_norms(normalized)
    rows, cols = normalized.weight.shape
    points = Points([normalized.normalized], [normalized.importance], d)
    if codebook is not None:
        best = points.finish(_given_codebook(codebook, entries, d, points.device), [])
    else:
        if points.count < entries:
            raise ValueError(
                f"a codebook of {entries} entries needs at least as many sub-vectors, but a "
                f"{rows} x {cols} weight cut into sub-vectors of {d} has only {points.count} "
                f"sub-vectors: use fewer bits."
            )
        best = _best_of(points, entries, iters, n_init, init, seed, progress)
    return VQWeight(
        ops.pack_codes(best.codes[0], round(d * bits)),
        best.codebook,
        *norms,
        shape=(rows, cols),
        d=d,
        bits=bits,
        relative_objective=best.relative_objective,
        history=best.history,
    )


def _entries(d: int, bits: float) -> int:
    """Size of the codebook; raises unless d and bits are within the format."""
    if not isinstance(d, int) or not 1 <= d <= ops.MAX_SUBVECTOR:
        raise ValueError(f"d must be an integer from 1 to {ops.MAX_SUBVECTOR}, not {d!r}.")
    code_bits = d * bits
    if not math.isfinite(code_bits) or not math.isclose(code_bits, round(code_bits)):
        raise ValueError(f"d * bits must be an integer, not {d} * {bits} = {code_bits}.")
    if not 1 <= round(code_bits) <= ops.MAX_CODE_BITS:
        raise ValueError(
            f"d * bits must be from 1 to {ops.MAX_CODE_BITS}, not {d} * {bits} = {code_bits}."
        )
    return 1 << round(code_bits)


def _check_settings(iters: int, n_init: int, init: str, seed: int) -> None:
    for name, value in (("iters", iters), ("n_init", n_init)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, not {value!r}.")
    if init not in ("kmeans++", "random"):
        raise ValueError(f'init must be "kmeans++" or "random", not {init!r}.')
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an integer from 0 to 2^63 - 1, not {seed!r}.")


def _half_norms(normalized: NormalizedWeight) -> tuple[Tensor, Tensor]:
    """Row and column norms in the format's fp16."""
    norms = (normalized.row_norms.half(), normalized.col_norms.half())
    for name, norm in zip(("row", "column"), norms, strict=True):
        if not torch.isfinite(norm).all():
            raise ValueError(
                f"a {name} norm of W exceeds the largest fp16 value, 65504: scale W down."
            )
    return norms


def _given_codebook(codebook: Any, entries: int, d: int, device: torch.device) -> Tensor:
    """A user's codebook as fp32 [entries, d]; raises if it is unfit."""
    if isinstance(codebook, np.ndarray):
        codebook = torch.from_numpy(np.ascontiguousarray(codebook))
    if not isinstance(codebook, Tensor):
        raise TypeError(
            f"codebook must be a torch.Tensor or a numpy.ndarray, not {type(codebook).__name__}."
        )
    if not codebook.is_floating_point():
        raise TypeError(f"codebook must be of a floating-point dtype, not {codebook.dtype}.")
    if tuple(codebook.shape) != (entries, d):
        raise ValueError(
            f"codebook must have shape ({entries}, {d}), 2^(d * bits) entries of d, "
            f"not {tuple(codebook.shape)}."
        )
    if codebook.device != device:
        raise ValueError(f"codebook must be on W's device {device}, not on {codebook.device}.")
    return codebook.detach().float().contiguous()


def _best_of(
    points: Points,
    entries: int,
    iters: int,
    n_init: int,
    init: str,
    seed: int,
    progress: Progress | None,
) -> Clustering:
    """The run of the lowest objective out of n_init, the first among equals."""
    best: Clustering | None = None
    for start in range(n_init):

        def report(iteration: int, objective: float, before: int = start * iters) -> None:
            if progress is not None:
                progress(before + iteration, n_init * iters, objective)

        start_seed = (seed + start * _SEED_STRIDE) % 2**63
        codebook = ops.kmeans_seed(points.w, points.h, entries, points.d, init, start_seed)
        result = points.run(codebook, iters, report)
        if best is None or result.relative_objective < best.relative_objective:
            best = result
    assert best is not None
    return best
