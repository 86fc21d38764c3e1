"""Vector quantisation of a weight matrix: NoWag-VQ, weighted k-means on normalised weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nowag_ext import ops
from nowag_ext.codebook import Codebook
from nowag_ext.feedback import EntrySums, FeedbackPoints, check_device
from nowag_ext.grad_mode import ordinary_tensors
from nowag_ext.hessian import as_hessian, corrected
from nowag_ext.kmeans import Clustering, Points, half_entries
from nowag_ext.normalize import as_tensor, as_weight, half_norms, normalize_weight, normalized_by

Progress = Callable[[int, int, float], None]

# Rows whose gradients are looked at together: what that takes stays small beside the weight.
_GRADIENT_ROWS = 512

# Between the seeds of restarts, so that restarts of neighbouring seeds have none in common.
_SEED_STRIDE = 0x9E3779B97F4A7C15


@dataclass(frozen=True, eq=False, repr=False)
class VQWeight:
    """A weight [out_features, in_features] as codes into a codebook, with its norms.

    The tensors are in the canonical form of ``csrc/include/nowag/format.h``.

    Attributes:
        codes: packed codes, uint8 [ceil(out_features / 32), ceil(in_features / d), 4 * code_bits].
        codebook: fp16 [2^code_bits, d].
        row_norms: fp16 [out_features].
        col_norms: fp16 [in_features].
        shape: (out_features, in_features).
        relative_objective: sum h (Wn - Q)^2 / sum h Wn^2 of these codes and this codebook; under a
            Hessian sum e H' e^T / sum w H' w^T over rows w of Wn and e of Wn - Q, with
            H' = diag(c) H diag(c), c the column norms. None where it is not known.
        history: the same before rounding to fp16, after each iteration.
        codebook_name: the name of the ``Codebook`` that it shares with others, None for its own.
        damping, effective_rank: of H' (``hessian.Factor``); None without a Hessian.
    """

    codes: Tensor
    codebook: Tensor
    row_norms: Tensor
    col_norms: Tensor
    shape: tuple[int, int]
    relative_objective: float | None = None
    history: list[float] = field(default_factory=list)
    codebook_name: str | None = None
    damping: float | None = None
    effective_rank: float | None = None

    @property
    def d(self) -> int:
        """Length of a sub-vector."""
        return self.codebook.shape[1]

    @property
    def code_bits(self) -> int:
        """Bits of one code; the codebook has 2^code_bits entries."""
        return self.codes.shape[2] // 4

    @property
    def bits(self) -> float:
        """Bits a weight in the codes alone, an int where it is one."""
        return bits_of(self.d, self.code_bits)

    @property
    def nbytes(self) -> int:
        """Bytes stored for this weight alone: all its tensors but a shared codebook."""
        return sum(t.nbytes for name, t in self.tensors().items() if name not in self.shared)

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight of ``nbytes``: codes and their padding, both norms, its own codebook.

        A shared codebook counts once, for the model that owns it (``ModelReport``).
        """
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    @property
    def shared(self) -> dict[str, str]:
        """Which of the tensors is not its own, and the name of what it belongs to."""
        return {} if self.codebook_name is None else {"codebook": self.codebook_name}

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors under their canonical names."""
        return {
            "codes": self.codes,
            "codebook": self.codebook,
            "row_norms": self.row_norms,
            "col_norms": self.col_norms,
        }

    def facts(self) -> dict[str, Any]:
        """What there is to store beside the tensors and the shape, for ``VQWeight(...)``."""
        return {
            "relative_objective": self.relative_objective,
            "codebook_name": self.codebook_name,
            "damping": self.damping,
            "effective_rank": self.effective_rank,
        }

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [out_features, in_features] in fp32, fp16 or bf16."""
        return ops.vq_dequantize(self.codes, self.codebook, self.row_norms, self.col_norms, dtype)

    def step_sizes(self) -> dict[str, Tensor]:
        """What of it is continuous, and how far a step of 1 moves that: fp32, that broadcasts.

        Norms move relative to themselves, entries to their root mean square.
        """
        return {
            "codebook": self.codebook.float().square().mean().sqrt(),
            "row_norms": self.row_norms.float(),
            "col_norms": self.col_norms.float(),
        }

    def gradients(self, weight_grad: Tensor) -> dict[str, Tensor]:
        """The gradients, fp32, of what is continuous, from that of the dense weight.

        Args:
            weight_grad: fp32 [out_features, in_features].
        """
        entries, rows, cols = (t.float() for t in (self.codebook, self.row_norms, self.col_norms))
        codes = ops.unpack_codes(self.codes, self.shape[0]).to(torch.int32)
        pad = codes.shape[1] * self.d - self.shape[1]
        found = {
            name: torch.zeros_like(t)
            for name, t in (("codebook", entries), ("row_norms", rows), ("col_norms", cols))
        }
        for first in range(0, self.shape[0], _GRADIENT_ROWS):
            part = slice(first, first + _GRADIENT_ROWS)
            grad, indices = weight_grad[part], codes[part].flatten()
            moved = functional.embedding(indices, entries).view(len(grad), -1)[:, : self.shape[1]]
            moved.mul_(grad)
            found["row_norms"][part] = moved @ cols
            found["col_norms"].addmv_(moved.T, rows[part])
            scaled = functional.pad(rows[part, None] * cols * grad, (0, pad)).view(-1, self.d)
            for element, column in enumerate(scaled.unbind(1)):  # faster than rows at once
                counted = torch.bincount(indices, column, len(entries))
                found["codebook"][:, element] += counted
        return found

    def to(self, device: torch.device | str) -> VQWeight:
        """The same weight on another device."""
        moved: Any = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return replace(self, **moved)

    def __repr__(self) -> str:
        shared = "".join(f", {tensor} {name!r}" for tensor, name in self.shared.items())
        known = self.relative_objective is not None
        error = f", relative objective {self.relative_objective:.4g}" if known else ""
        return (
            f"VQWeight({self.shape[0]} x {self.shape[1]}, d={self.d}, bits={self.bits}{shared}"
            f"{error})"
        )


@ordinary_tensors
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
    hessian: Any = None,
    extra: Any = None,
    progress: Progress | None = None,
) -> VQWeight:
    """Compresses a weight to codes into a codebook of 2^(d * bits) sub-vectors (NoWag-VQ).

    Minimises sum_ij h_j (Wn_ij - Q_ij)^2 over the codebook and the codes by k-means, Wn the
    normalised weight and h = act_norms^2 over its mean. Same inputs and seed give the same bits at
    any number of threads.

    With a Hessian, codes are assigned by error feedback instead: position by position, the most
    important first, each making up for the errors before it (GPTQ, Frantar et al., 2022; for
    sub-vectors GPTVQ, van Baalen et al., 2024). A codebook of its own comes from the same k-means,
    re-estimated once by least squares under the feedback, if that is better. This goes through
    torch's matrix products, whose bits may depend on the number of threads.

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
        codebook: use this codebook and only assign; iters, n_init, init and seed then do nothing.
            A ``Codebook`` of 2^(d * bits) entries of d is shared: the weight keeps its very tensor,
            and its name. Torch or NumPy [2^(d * bits), d], in units of Wn, is rounded to fp16 and
            the weight's own.
        hessian: E[x x^T] of the layer's inputs on calibration text, torch or NumPy fp32 (or fp64)
            [in_features, in_features] on W's device; symmetric, positive semi-definite.
        extra: with a Hessian only: what to add to W for the target, fp32 [out_features,
            in_features], such as a correction for the errors of layers before this one.
        progress: called before each run's starting codebook is drawn, which takes as long as some
            iterations (of 65536 entries minutes), and after every iteration, with the number of
            iterations done in all runs, the most there can be, and the relative objective; before a
            run has one it is infinite.

    Raises:
        TypeError: a wrong type or dtype of W, act_norms, codebook, hessian or extra.
        ValueError: a wrong shape, device or setting; NaN or infinities; all-zero or negative
            act_norms; fewer sub-vectors than codebook entries; norms beyond fp16; a Hessian that is
            not symmetric or not positive semi-definite; ``extra`` without a Hessian.
    """
    code_bits = check_code(d, bits)
    check_iterations(iters, n_init, init, seed)
    weight = as_weight(W)
    if hessian is not None:
        check_device(weight.device)
        hessian = as_hessian(hessian, weight.shape[1], weight.device)
        weight = corrected(weight, extra)
    elif extra is not None:
        raise ValueError("extra corrects W under a Hessian: give hessian too.")
    normalized = normalize_weight(weight, act_norms)
    shared = isinstance(codebook, Codebook)
    if shared:
        _check_shared(codebook, d, code_bits, weight.device)
    unit = math.sqrt(weight.shape[1]) if shared else 1.0
    norms = half_norms(normalized.row_norms / unit, normalized.col_norms)
    given: Tensor | None = None
    if shared:
        given = codebook.entries.float()
    elif codebook is not None:
        given = _given_codebook(codebook, 1 << code_bits, d, weight.device)

    importance, wn = floored(normalized.importance), normalized.normalized

    def search(w: Tensor) -> Clustering:
        points = Points([w], [importance], d)
        if given is not None:
            return points.finish(given, [])
        _check_count(points, 1 << code_bits, w.shape)
        return _best_of(points, 1 << code_bits, iters, n_init, init, seed, progress)

    shape = weight.shape[0], weight.shape[1]
    if hessian is None:
        found = search(wn if unit == 1 else wn * unit)
    else:
        held = [weight]
        del normalized, wn, weight  # as large as W each, and not needed for what follows
        found = _feed_back(normalized_by(held.pop(), norms), hessian, norms[1], d, given, search)
    return VQWeight(
        ops.pack_codes(found.codes[0], code_bits),
        codebook.entries if shared else found.codebook,
        *norms,
        shape=shape,
        relative_objective=found.relative_objective,
        history=found.history,
        codebook_name=codebook.name if shared else None,
        damping=found.damping,
        effective_rank=found.effective_rank,
    )


def _check_shared(codebook: Codebook, d: int, code_bits: int, device: torch.device) -> None:
    if (codebook.d, codebook.code_bits) != (d, code_bits):
        raise ValueError(
            f"{codebook!r} does not fit d={d} and codes of {code_bits} bits: "
            f"those need {1 << code_bits} entries of {d}."
        )
    if codebook.entries.device != device:
        raise ValueError(
            f"codebook must be on W's device {device}, not on {codebook.entries.device}."
        )


def _check_count(points: Points, entries: int, shape: torch.Size) -> None:
    if points.count < entries:
        raise ValueError(
            f"a codebook of {entries} entries needs at least as many sub-vectors, but a "
            f"{shape[0]} x {shape[1]} weight cut into sub-vectors of {points.d} has only "
            f"{points.count} sub-vectors: use fewer bits."
        )


def _feed_back(
    points: Tensor,
    hessian: Tensor,
    col_norms: Tensor,
    d: int,
    given: Tensor | None,
    search: Callable[[Tensor], Clustering],
) -> Clustering:
    """Codes by error feedback, for a given codebook or for the better of two.

    That of the diagonal metric, and what least squares make of it under the feedback.
    """
    layer = FeedbackPoints(points, hessian, col_norms.float(), d)
    facts = (layer.damping, layer.effective_rank)
    if given is not None:
        del points
        half = half_entries(given)
        assigned = layer.assign(half.float(), last=True)
        return Clustering([assigned.codes], half, assigned.relative_objective, [], *facts)
    first = search(points)
    sums = EntrySums(len(first.codebook), d, points.numel(), points.device)
    candidates = [(first.codebook, layer.assign(first.codebook.float(), sums))]
    again = sums.solve(first.codebook.float()).half()
    if torch.isfinite(again).all():
        candidates.append((again, layer.assign(again.float(), last=True)))
    codebook, best = min(candidates, key=lambda candidate: candidate[1].relative_objective)
    return Clustering([best.codes], codebook, best.relative_objective, first.history, *facts)


# What an input that calibration never saw counts for, where 1 is the mean: too little to change
# what the others get, enough to choose among the entries that suit them alike.
_DEAD_IMPORTANCE = 1e-6


def floored(importance: Tensor) -> Tensor:
    """The importances, with dead inputs counting for something.

    At 0 any entry would do for a sub-vector of dead inputs, and on other text, where they are
    alive, it would be far worse than none.
    """
    return torch.where(importance == 0, _DEAD_IMPORTANCE, importance)


def check_code(d: Any, bits: Any) -> int:
    """Bits of one code, d * bits; raises ValueError unless both are within the format."""
    if type(d) is not int or not 1 <= d <= ops.MAX_SUBVECTOR:
        raise ValueError(f"d must be an integer from 1 to {ops.MAX_SUBVECTOR}, not {d!r}.")
    if not isinstance(bits, int | float) or isinstance(bits, bool):
        raise ValueError(f"bits must be a number, not {bits!r}.")
    code_bits = d * bits
    if not math.isfinite(code_bits) or not math.isclose(code_bits, round(code_bits)):
        raise ValueError(f"d * bits must be an integer, not {d} * {bits} = {code_bits}.")
    if not 1 <= round(code_bits) <= ops.MAX_CODE_BITS:
        raise ValueError(
            f"d * bits must be from 1 to {ops.MAX_CODE_BITS}, not {d} * {bits} = {code_bits}."
        )
    return round(code_bits)


def bits_of(d: int, code_bits: int) -> float:
    """Bits a weight in codes of ``code_bits`` for d weights, an int where it is one."""
    return code_bits // d if code_bits % d == 0 else code_bits / d


def check_iterations(iters: int, n_init: int, init: str, seed: int) -> None:
    """Raises ValueError for settings of the search that are out of range."""
    for name, value in (("iters", iters), ("n_init", n_init)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, not {value!r}.")
    if init not in ("kmeans++", "random"):
        raise ValueError(f'init must be "kmeans++" or "random", not {init!r}.')
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an integer from 0 to 2^63 - 1, not {seed!r}.")


def _given_codebook(codebook: Any, entries: int, d: int, device: torch.device) -> Tensor:
    """A user's codebook as fp32 [entries, d]; raises if it is unfit."""
    codebook = as_tensor(codebook, "codebook")
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

        report(0, math.inf)
        start_seed = (seed + start * _SEED_STRIDE) % 2**63
        codebook = ops.kmeans_seed(points.w, points.h, entries, points.d, init, start_seed)
        result = points.run(codebook, iters, report)
        if best is None or result.relative_objective < best.relative_objective:
            best = result
    assert best is not None
    return best
