"""Weighted k-means on the sub-vectors of normalised weights: the search for a codebook.

Lloyd's iterations (assign, update), with two moves besides. An entry without points is reseeded at
the point of the largest error. And every few iterations entries that are hardly missed move into
clusters that are spread wide (the idea of Fritzke's LBG-U and Patane and Russo's enhanced LBG):
k-means alone ends in a local minimum that its seeds decide. A move that does not pay is undone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nowag_ext import ops

# Relocations happen at this many points of a run, evenly over its first part, so that Lloyd's
# iterations settle what they stirred up; each moves at most this share of the entries.
_RELOCATIONS = 8
_RELOCATING_PART = 0.65
_RELOCATED_SHARE = 1 / 32
# Halving a cluster along its widest coordinate takes away 64 % of a normal distribution's squared
# error there and 75 % of a uniform one's. What giving up an entry costs is overestimated (its
# points need not all go to one heir), so moves are tried somewhat beyond; one that rises is undone.
_HALVING_GAIN = 0.8
# How far from the mean, in standard deviations, the halves of a normal distribution have theirs.
_HALF_MEAN = 0.8


@dataclass(frozen=True)
class Clustering:
    """One finished run: codes uint16, one [rows, P] a matrix, and their fp16 codebook."""

    codes: list[Tensor]
    codebook: Tensor
    relative_objective: float
    history: list[float]
    damping: float | None = None  # of a Hessian, as the next
    effective_rank: float | None = None


def half_entries(codebook: Tensor) -> Tensor:
    """A codebook in the format's fp16."""
    half = codebook.half()
    if not torch.isfinite(half).all():
        raise ValueError("codebook must be finite in fp16: at most 65504 in absolute value.")
    return half


class _Relocations:
    """When entries are relocated, and what was before a move that has not yet paid."""

    def __init__(self, iters: int) -> None:
        self._period = max(3, int(_RELOCATING_PART * iters / _RELOCATIONS))
        self._end = int(_RELOCATING_PART * iters)
        self._before: tuple[Tensor, float] | None = None

    @property
    def pending(self) -> bool:
        """Whether a move waits to be judged by the next iteration's objective."""
        return self._before is not None

    def due(self, iteration: int) -> bool:
        """Whether this is an iteration to relocate in."""
        return iteration % self._period == self._period - 1 and iteration < self._end

    def await_judgement(self, codebook: Tensor, objective: float) -> None:
        """After a move: the codebook and the objective that it started from."""
        self._before = codebook, objective

    def failed(self, objective: float) -> bool:
        """Whether the objective after a move is worse than the one before it."""
        return self._before is not None and objective > self._before[1]

    def accept(self) -> None:
        """The move stays, if there was one."""
        self._before = None

    def undo(self, codebook: Tensor) -> None:
        """Puts the codebook from before the move back."""
        assert self._before is not None
        codebook.copy_(self._before[0])
        self._before = None


class Points:
    """The sub-vectors of matrices that share a codebook, and k-means on them."""

    def __init__(self, w: Sequence[Tensor], importances: Sequence[Tensor], d: int) -> None:
        self.w, self.d = list(w), d
        positions = [ops.code_positions(matrix.shape[1], d) for matrix in w]
        self.h = [
            torch.nn.functional.pad(h, (0, p * d - h.numel()))
            for h, p in zip(importances, positions, strict=True)
        ]
        self.count = sum(m.shape[0] * p for m, p in zip(w, positions, strict=True))
        self.codes = [
            torch.zeros(m.shape[0], p, dtype=torch.uint16, device=m.device)
            for m, p in zip(w, positions, strict=True)
        ]
        # Spares later iterations work on the CPU; the CUDA kernels have no use for it.
        self.gaps = (
            [codes.new_zeros(codes.shape, dtype=torch.float32) for codes in self.codes]
            if w[0].device.type == "cpu"
            else None
        )
        weight = sum(m.shape[0] * float(h.double().sum()) for m, h in zip(w, self.h, strict=True))
        largest = max(float(matrix.abs().max()) for matrix in w)
        self.scale = ops.kmeans_scale(weight, largest)
        self.energy = sum(
            float(ops.kmeans_energy(m, h, d)) for m, h in zip(self.w, self.h, strict=True)
        )

    @property
    def device(self) -> torch.device:
        return self.w[0].device

    def run(self, codebook: Tensor, iters: int, report: Callable[[int, float], None]) -> Clustering:
        """At most ``iters`` iterations from ``codebook`` (fp32, overwritten), then finish()."""
        history: list[float] = []

        def on_iteration(iteration: int, objective: float) -> None:
            history.append(objective)
            report(iteration, objective)

        sums = self._iterate(codebook, iters, on_iteration)
        return self.finish(codebook, history, sums)

    def improve(self, codebook: Tensor, iters: int, report: Callable[[int, float], None]) -> Tensor:
        """``codebook`` (fp32) after at most ``iters`` iterations in place, not rounded."""
        self._iterate(codebook, iters, report)
        return codebook

    def _iterate(
        self, codebook: Tensor, iters: int, report: Callable[[int, float], None]
    ) -> Tensor:
        """Lloyd's iterations with relocations, in place; the sums of the last codes."""
        sums = self._no_sums(codebook)
        last = math.inf
        relocations = _Relocations(iters)
        moved = True
        for iteration in range(iters):
            changed = self._assign(codebook, sums)
            # Where nothing changed, from the same sums to the same entries.
            drop, empty = ops.kmeans_update(sums, self.scale, codebook)
            # All that the host wants to know at once: a device stands still for each question.
            changes, fall, vacant = torch.stack(
                [changed.sum().double(), drop, empty.sum().double()]
            ).tolist()
            if changes == 0 and not moved:
                break
            objective = self._relative(self.energy - fall)
            if relocations.failed(objective):
                relocations.undo(codebook)
                moved, objective = True, last
            else:
                relocations.accept()
                moved = vacant > 0 and self._reseed(codebook, empty)
                if not moved and relocations.due(iteration):
                    before = codebook.clone()
                    moved = self._relocate(codebook, sums)
                    if moved:
                        relocations.await_judgement(before, objective)
            last = objective
            report(iteration + 1, objective)
        if relocations.pending:
            relocations.undo(codebook)
        return sums

    def finish(
        self, codebook: Tensor, history: list[float], sums: Tensor | None = None
    ) -> Clustering:
        """Rounds the codebook to fp16 and assigns to what is left of it.

        ``sums`` are those of the current codes; without them the codes do not count.
        """
        half = half_entries(codebook)
        rounded = half.float()
        if sums is None:
            sums = self._no_sums(codebook)
        self._assign(rounded, sums)
        error = self.energy - self._drop(rounded, sums)
        return Clustering(
            [codes.clone() for codes in self.codes], half, self._relative(error), history
        )

    def _no_sums(self, codebook: Tensor) -> Tensor:
        """Sums of no points: the next assignment starts from nothing."""
        self.assigned: Tensor | None = None
        return codebook.new_zeros(codebook.shape[0], 2 * self.d + 1, dtype=torch.int64)

    def _relative(self, error: float) -> float:
        """0 for a weight that is zero wherever h is not: there is nothing to lose."""
        return max(0.0, error / self.energy) if self.energy > 0 else 0.0

    def _assign(self, codebook: Tensor, sums: Tensor) -> Tensor:
        """Assigns, from the last assignment of this run if there is one; changes, by matrix."""
        count = len(self.w)
        warm = self.assigned is not None
        previous = None if self.assigned is None else [self.assigned] * count
        changed = ops.kmeans_assign(
            self.w, self.h, [codebook] * count, self.codes, [sums] * count, self.scale, warm,
            previous, self.gaps,
        )  # fmt: skip
        self.assigned = codebook.clone()
        return changed

    def _drop(self, codebook: Tensor, sums: Tensor) -> float:
        """energy - error of the current codes with this codebook, in a fixed order of addition."""
        c = codebook.double().cpu().numpy()
        moments, weights = np.split(sums[:, :-1].double().cpu().numpy(), 2, axis=1)
        return float(np.sum(2 * c * moments - c * c * weights)) / self.scale

    def _reseed(self, codebook: Tensor, empty: Tensor) -> bool:
        """Moves empty entries to the points of the largest error; whether any was moved."""
        vacant = empty.nonzero().flatten()
        candidates = [
            torch.topk(errors, min(vacant.numel(), errors.numel()))
            for errors in self._errors(codebook)
        ]
        errors = torch.cat([values for values, _ in candidates])
        points = torch.cat([self._take(b, indices) for b, (_, indices) in enumerate(candidates)])
        errors, order = torch.sort(errors, descending=True, stable=True)
        wanted = int((errors[: vacant.numel()] > 0).sum())
        codebook[vacant[:wanted]] = points[order[:wanted]]
        return wanted > 0

    def _relocate(self, codebook: Tensor, sums: Tensor) -> bool:
        """Moves cheap entries beside the entries of wide clusters; whether any was moved.

        Elementwise arithmetic and integer sums alone: the same at any number of threads.
        """
        most = int(codebook.shape[0] * _RELOCATED_SHARE)
        if most == 0:
            return False
        cheap, cost = self._cheapest(codebook, sums, 4 * most)
        widest = self._spread(codebook).max(1)
        wide = torch.argsort(widest.values, descending=True, stable=True)
        spread = widest.values.tolist()
        moves: dict[int, int] = {}  # from where an entry is given up to where it goes
        used: set[int] = set()
        for k, m, price in zip(cheap.tolist(), wide.tolist(), cost.tolist(), strict=False):
            if len(moves) == most or k in used or m in used:
                break
            if price >= _HALVING_GAIN * spread[m]:
                break
            moves[k] = m
            used |= {k, m}
        if not moves:
            return False
        given_up, split = torch.tensor(list(moves.items()), device=self.device).T
        coordinate = widest.indices[split]
        weights = sums[split, self.d + coordinate].tolist()
        deviations = [(spread[m] / h) ** 0.5 for m, h in zip(moves.values(), weights, strict=True)]
        half = (_HALF_MEAN * torch.tensor(deviations, dtype=torch.float64, device=self.device)).to(
            codebook
        )
        codebook[given_up] = codebook[split]
        codebook[given_up, coordinate] += half
        codebook[split, coordinate] -= half
        return True

    def _cheapest(self, codebook: Tensor, sums: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The ``count`` entries that cost least to give up, cheapest first, and what each costs.

        Only entries of small weight are looked at: 4 times as many as are wanted.
        """
        light = torch.argsort(sums[:, self.d : 2 * self.d].sum(1), stable=True)[: 4 * count]
        costs = ops.kmeans_merge_costs(sums, codebook, self.scale, light)
        cheapest, order = torch.sort(costs, stable=True)
        return light[order[:count]], cheapest[:count].double() * self.scale

    def _spread(self, codebook: Tensor) -> Tensor:
        """sum h (x - c)^2 of every cluster by coordinate, times the scale, int64 [K, d]."""
        total = torch.zeros(codebook.shape, dtype=torch.int64, device=codebook.device)
        for w, h, codes in zip(self.w, self.h, self.codes, strict=True):
            total += ops.kmeans_spread(w, h, codebook, codes, self.scale)
        return total

    def _errors(self, codebook: Tensor) -> list[Tensor]:
        """Weighted squared error of every point, one flat tensor a matrix."""
        return [
            ops.kmeans_errors(w, h, codebook, codes).flatten()
            for w, h, codes in zip(self.w, self.h, self.codes, strict=True)
        ]

    def _take(self, matrix: int, indices: Tensor) -> Tensor:
        """The points of these flat indices of one matrix, [len(indices), d], padded with 0."""
        w = self.w[matrix]
        positions = self.codes[matrix].shape[1]
        columns = (indices % positions)[:, None] * self.d + torch.arange(self.d, device=w.device)
        inside = columns < w.shape[1]
        values = w[(indices // positions)[:, None], columns.clamp(max=w.shape[1] - 1)]
        return torch.where(inside, values, 0)
