"""NoWag-P: pruning a layer by the saliency h_j * Wn_ij^2 of its normalised weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nowag_ext import ops
from nowag_ext.compensate import compensate, n_of_m, whole_layer
from nowag_ext.grad_mode import ordinary_tensors
from nowag_ext.hessian import as_hessian, corrected, relative_error
from nowag_ext.normalize import NormalizedWeight, as_weight, normalize_weight


@dataclass(frozen=True, eq=False, repr=False)
class SparseWeight:
    """A pruned weight in the form of csrc/include/nowag/format.h, unstructured and N:M alike.

    Attributes:
        bitmap: uint8 [out_features, 8 * ceil(in_features / 64)], a bit set where a weight is kept.
        values: the kept weights, row by row, [nnz], of the original weight's dtype; its bits too
            where it was pruned without a Hessian.
        row_offsets: int32 [out_features + 1], where each row's values start.
        shape: (out_features, in_features).
        pattern: "N:M", or None if unstructured.
        relative_objective: sum h (Wn - Q)^2 / sum h Wn^2, with Q = Wn where kept; None if unknown.
            Pruned under a Hessian H, with rows e of (Wn - Q), w of Wn and H' = diag(c) H diag(c):
            sum e H' e^T / sum w H' w^T, where Wn, r and c are of the target and Q_ij is the stored
            value over r_i c_j.
        damping, effective_rank: of H (``hessian.Factor``); None without a Hessian.
    """

    bitmap: Tensor
    values: Tensor
    row_offsets: Tensor
    shape: tuple[int, int]
    pattern: str | None = None
    relative_objective: float | None = None
    damping: float | None = None
    effective_rank: float | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return {"bitmap": self.bitmap, "values": self.values, "row_offsets": self.row_offsets}

    def facts(self) -> dict[str, Any]:
        """What there is to store beside the tensors and the shape, for ``SparseWeight(...)``."""
        return {
            "relative_objective": self.relative_objective,
            "pattern": self.pattern,
            "damping": self.damping,
            "effective_rank": self.effective_rank,
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Bits of all stored tensors over the number of weights of the dense matrix."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that is pruned."""
        return 1 - self.values.numel() / (self.shape[0] * self.shape[1])

    @property
    def shared(self) -> dict[str, str]:
        """No tensor of a pruned weight is shared (``VQWeight.shared``)."""
        return {}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [out_features, in_features], zeros where pruned."""
        return ops.sparse_dequantize(
            self.bitmap, self.values, self.row_offsets, self.shape[1], dtype
        )

    def step_sizes(self) -> dict[str, Tensor]:
        """What is continuous, the values, moves in units of their root mean square."""
        return {"values": self.values.float().square().mean().sqrt()}

    def gradients(self, weight_grad: Tensor) -> dict[str, Tensor]:
        """The gradient, fp32, of the values, from that of the dense weight."""
        kept = ops.sparse_dequantize(
            self.bitmap, torch.ones_like(self.values), self.row_offsets, self.shape[1],
            torch.float32,
        )  # fmt: skip
        return {"values": weight_grad[kept.bool()]}

    def to(self, device: torch.device | str) -> SparseWeight:
        """This weight with its tensors on ``device``."""
        moved: Any = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return replace(self, **moved)

    def __repr__(self) -> str:
        kept = f"{self.sparsity:.4g} sparse" if self.pattern is None else f"{self.pattern!r}"
        known = self.relative_objective is not None
        error = f", relative objective {self.relative_objective:.4g}" if known else ""
        return f"SparseWeight({self.shape[0]} x {self.shape[1]}, {kept}{error})"


def parse_pattern(pattern: str, in_features: int) -> tuple[int, int]:
    """(N, M) of "N:M": N weights kept of every M consecutive inputs.

    Raises:
        ValueError: unless 1 <= N <= M <= ops.MAX_GROUP and M divides in_features.
    """
    kept, _, group = str(pattern).partition(":")
    if not (kept.isdecimal() and group.isdecimal() and 1 <= int(kept) <= int(group)):
        raise ValueError(f'pattern must be "N:M" with 1 <= N <= M, not {pattern!r}.')
    n, m = int(kept), int(group)
    if m > ops.MAX_GROUP:
        raise ValueError(f"M of pattern {pattern!r} must be at most {ops.MAX_GROUP}.")
    if in_features % m:
        raise ValueError(f"M = {m} of pattern {pattern!r} must divide in_features {in_features}.")
    return n, m


def kept_weights(
    in_features: int, out_features: int, sparsity: float | None, pattern: str | None
) -> int:
    """How many weights pruning keeps: numel - int(sparsity * numel), or N of every M inputs.

    Raises:
        ValueError: unless exactly one of sparsity, in [0, 1), and pattern, "N:M" with M dividing
            in_features, is given and legal.
    """
    numel = in_features * out_features
    if pattern is None and sparsity is not None:
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), not {sparsity}.")
        return numel - int(sparsity * numel)
    if pattern is None or sparsity is not None:
        raise ValueError(
            f"give either sparsity or pattern, not sparsity={sparsity} and pattern={pattern!r}."
        )
    n, m = parse_pattern(pattern, in_features)
    return numel // m * n


@ordinary_tensors
def prune(
    W: Any,
    act_norms: Any,
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    hessian: Any = None,
    extra: Any = None,
) -> SparseWeight:
    """Prunes W by NoWag-P (paper "NoWag", pruning): the smallest saliencies h_j * Wn_ij^2 go.

    Unstructured, exactly int(sparsity * W.numel()) weights of the whole layer are pruned; with a
    pattern, the M - N smallest of every M consecutive inputs. Among equal saliencies the lower
    flat index goes first. Kept weights keep their bits. The result is the same at any number of
    threads.

    With a Hessian, columns are pruned block by block instead, and the weights still to come make up
    for what went (SparseGPT, Frantar and Alistarh, 2023): a weight's saliency is that of its value
    by then, with what an error of column j still costs in place of h_j. Unstructured, of each block
    of columns goes the layer's share. At the end the kept weights are refit. Values are rounded to
    W's dtype, not beyond its range. This goes through torch's matrix products, whose bits may
    depend on the number of threads.

    Args:
        W: [out_features, in_features], torch fp32, fp16 or bf16, or NumPy fp32 or fp16.
        act_norms: [in_features], sqrt of the mean square of each input on calibration text; >= 0,
            not all 0. A positive factor does not matter. Checked but not used with a Hessian, whose
            diagonal says the same.
        sparsity: fraction to prune, in [0, 1); 0.5 if neither it nor pattern is given.
        pattern: "N:M", such as "2:4", with M at most 32 and dividing in_features.
        hessian: E[x x^T] of the layer's inputs on calibration text, torch or NumPy fp32 (or fp64)
            [in_features, in_features] on W's device; symmetric, positive semi-definite. A positive
            factor does not matter.
        extra: with a Hessian only: what to add to W for the target, fp32 [out_features,
            in_features], such as a correction for the errors of layers before this one.

    Raises:
        TypeError: wrong type or dtype of W, act_norms, hessian or extra.
        ValueError: wrong shape or device, NaN or infinity, negative or all-zero norms, sparsity or
            pattern outside what is said above, or both given; a Hessian that is not symmetric or
            not positive semi-definite; ``extra`` without a Hessian.
    """
    if sparsity is None and pattern is None:
        sparsity = 0.5
    if hessian is None:
        if extra is not None:
            raise ValueError("extra corrects W under a Hessian: give hessian too.")
        return _by_saliency(normalize_weight(W, act_norms), sparsity, pattern)
    weight = as_weight(W)
    hessian = as_hessian(hessian, weight.shape[1], weight.device)
    problem = normalize_weight(corrected(weight, extra), act_norms)
    return _by_feedback(problem, hessian, weight.dtype, sparsity, pattern)


def _by_saliency(
    problem: NormalizedWeight, sparsity: float | None, pattern: str | None
) -> SparseWeight:
    w, h = problem.normalized, problem.importance
    out_features, in_features = w.shape
    kept = kept_weights(in_features, out_features, sparsity, pattern)
    if pattern is None:
        bitmap = ops.prune_select(w, h, w.numel() - kept)
    else:
        bitmap = ops.prune_select_nm(w, h, *parse_pattern(pattern, in_features))
    pruned_sum, total = ops.prune_objective(w, h, bitmap).tolist()
    relative = pruned_sum / total if total else 0.0
    return _packed(problem.weight, bitmap, kept, pattern, relative)


def _by_feedback(
    problem: NormalizedWeight,
    hessian: Tensor,
    dtype: torch.dtype,
    sparsity: float | None,
    pattern: str | None,
) -> SparseWeight:
    target, c = problem.weight, problem.col_norms
    out_features, in_features = target.shape
    kept = kept_weights(in_features, out_features, sparsity, pattern)
    n_prune = target.numel() - kept
    if pattern is None:
        choice = whole_layer(n_prune, in_features)
    else:
        choice = n_of_m(*parse_pattern(pattern, in_features))
    values, mask, damping, rank = compensate(target, problem.row_norms, c, hessian, choice)
    largest = torch.finfo(dtype).max
    values = values.clamp_(-largest, largest).to(dtype)
    errors = (target - values).div_(c).div_(problem.row_norms[:, None])
    relative = relative_error(errors, problem.normalized, hessian, c)
    # Saliencies of 0 and 1: the zeros go.
    bitmap = ops.prune_select(mask.float(), torch.ones_like(c), n_prune)
    packed = _packed(values, bitmap, kept, pattern, relative)
    return replace(packed, damping=damping, effective_rank=rank)


def _packed(
    weight: Tensor, bitmap: Tensor, kept: int, pattern: str | None, relative_objective: float
) -> SparseWeight:
    out_features, in_features = weight.shape
    row_offsets = ops.sparse_offsets(bitmap, in_features)
    return SparseWeight(
        bitmap=bitmap,
        values=ops.sparse_pack(weight, bitmap, row_offsets, kept),
        row_offsets=row_offsets,
        shape=(out_features, in_features),
        pattern=pattern,
        relative_objective=relative_objective,
    )
