"""Oracles of kmeans.h."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """float32 fma(a, b, c), rounded once.

    The product of two float32 is exact in float64. The sum is not: TwoSum finds what it lost, and
    rounding that sum to odd instead of nearest makes the second rounding, to float32, right.
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    part = total - product
    lost = (product - (total - part)) + (addend - part)
    bits = total.view(torch.int64)
    step = torch.where((lost > 0) == (total > 0), 1, -1)
    odd = torch.where((lost != 0) & (bits % 2 == 0), bits + step, bits)
    return odd.view(torch.float64).float()


def kmeans_points(w: Tensor, d: int) -> Tensor:
    """The sub-vectors of w, [rows, P, d], the last of each row padded with zeros."""
    rows, cols = w.shape
    positions = -(-cols // d)
    return torch.nn.functional.pad(w, (0, positions * d - cols)).view(rows, positions, d)


def kmeans_scores(x: Tensor, h: Tensor, codebook: Tensor) -> Tensor:
    """The pinned score of points x [..., d] of one position against every entry, [..., K]."""
    d = codebook.shape[1]
    score = torch.zeros(codebook.shape[0])
    for j in range(d):
        score = fma(h[j] * codebook[:, j], codebook[:, j], score)
    score = score.expand(*x.shape[:-1], -1)
    for j in range(d):
        score = fma(((-2 * h[j]) * x[..., j])[..., None], codebook[:, j], score)
    return score


def kmeans_assign(w: Tensor, h: Tensor, codebook: Tensor) -> Tensor:
    """The lowest entry among those of the smallest score, uint16 [rows, P], bit for bit."""
    entries, d = codebook.shape
    points = kmeans_points(w, d)
    codes = []
    for p in range(points.shape[1]):
        score = kmeans_scores(points[:, p], h[p * d : (p + 1) * d], codebook)
        lowest = score == score.amin(1, keepdim=True)
        codes.append(torch.where(lowest, torch.arange(entries), entries).amin(1))
    return torch.stack(codes, 1).to(torch.uint16)


def kmeans_sums(w: Tensor, h: Tensor, codes: Tensor, entries: int, d: int, scale: float) -> Tensor:
    """Fixed-point sums of h x, h and 1 over the points of every entry, int64 [K, 2 d + 1]."""
    x = kmeans_points(w, d).double()
    weight = h.view(-1, d).double().expand_as(x)
    columns = [(weight * x * scale).round(), (weight * scale).round(), torch.ones_like(x[..., :1])]
    rows = torch.cat(columns, -1).to(torch.int64).view(-1, 2 * d + 1)
    sums = torch.zeros(entries, 2 * d + 1, dtype=torch.int64)
    return sums.index_add_(0, codes.to(torch.int64).flatten(), rows)


def kmeans_update(sums: Tensor, scale: float, codebook: Tensor) -> tuple[Tensor, float, Tensor]:
    """(moved codebook fp32, objective drop, empty entries), not in place."""
    d = codebook.shape[1]
    moment, weight = sums[:, :d].double(), sums[:, d : 2 * d].double()
    moved = torch.where(weight > 0, (moment / weight).float(), codebook)
    c = moved.double()
    drop = float((2 * c * moment - c * c * weight).sum()) / scale
    return moved, drop, sums[:, 2 * d] == 0


def kmeans_errors(w: Tensor, h: Tensor, codebook: Tensor, codes: Tensor) -> Tensor:
    """Weighted squared error of every point in float64, [rows, P]."""
    d = codebook.shape[1]
    offset = kmeans_points(w, d).double() - codebook[codes.to(torch.int64)].double()
    return (h.view(-1, d).double() * offset.square()).sum(-1)


def kmeans_spread(w: Tensor, h: Tensor, codebook: Tensor, codes: Tensor, scale: float) -> Tensor:
    """Weighted squared error of every entry by coordinate, in fixed point, int64 [K, d]."""
    d = codebook.shape[1]
    index = codes.to(torch.int64)
    offset = kmeans_points(w, d).double() - codebook[index].double()
    error = (h.view(-1, d).double() * offset * offset * scale).round().to(torch.int64)
    spread = torch.zeros(codebook.shape, dtype=torch.int64)
    return spread.index_add_(0, index.flatten(), error.reshape(-1, d))


def kmeans_merge_costs(sums: Tensor, codebook: Tensor, scale: float, chosen: Tensor) -> Tensor:
    """The least that moving an entry's points to another entry adds to the objective, fp32 [n]."""
    d = codebook.shape[1]
    weights = (sums[chosen, d : 2 * d].double() / scale).float()
    cost = torch.zeros(len(chosen), len(codebook))
    for j in range(d):
        t = codebook[chosen, j, None] - codebook[None, :, j]
        cost = fma(weights[:, j, None] * t, t, cost)
    cost[torch.arange(len(chosen)), chosen] = torch.inf
    return cost.amin(1)


def kmeans_energy(w: Tensor, h: Tensor) -> float:
    """sum of h w^2 in float64."""
    return float((h[: w.shape[1]].double() * w.double().square()).sum())


def kmeans_seed(w: Sequence[Tensor], entries: int, d: int, seed: int) -> Tensor:
    """init="random": one point of each of K equal strata."""
    points = torch.cat([kmeans_points(matrix, d).reshape(-1, d) for matrix in w])
    n, below, chosen = len(points), _random(seed), []
    for k in range(entries):
        low, high = k * n // entries, (k + 1) * n // entries
        chosen.append(low + below(high - low))
    return points[chosen]


def kmeans_plus_plus(
    w: Sequence[Tensor], h: Sequence[Tensor], entries: int, d: int, seed: int
) -> Tensor:
    """init="kmeans++": greedy, on a sample."""
    parts = [kmeans_points(matrix, d) for matrix in w]
    metrics = [m.view(1, -1, d).expand_as(part) for part, m in zip(parts, h, strict=True)]
    x = torch.cat([part.reshape(-1, d) for part in parts])
    metric = torch.cat([part.reshape(-1, d) for part in metrics])
    below = _random(seed)
    index, weight = _draw_sample(x, metric, min(4096 + 16 * entries, 2**18), below)
    x, metric = x[index], metric[index] * weight[:, None]

    def distances(point: int) -> Tensor:
        total = torch.zeros(len(x))
        for j in range(d):
            t = x[:, j] - x[point, j]
            total = fma(metric[:, j] * t, t, total)
        return total

    chosen = [below(len(x))]
    nearest = distances(chosen[0])
    scale = 2.0 ** (40 - math.frexp(float(nearest.max()))[1])
    while len(chosen) < entries:
        upto = _fixed_point(nearest, scale).cumsum(0)
        total = int(upto[-1])
        if total == 0:
            chosen.append(below(len(x)))
            continue
        candidates = [int(torch.searchsorted(upto, below(total), right=True)) for _ in range(4)]
        narrowed = [torch.minimum(nearest, distances(point)) for point in candidates]
        left = [int(_fixed_point(distance, scale).sum()) for distance in narrowed]
        best = left.index(min(left))
        chosen.append(candidates[best])
        nearest = narrowed[best]
    return x[chosen]


def _draw_sample(
    x: Tensor, metric: Tensor, wanted: int, below: Callable[[int], int]
) -> tuple[Tensor, Tensor]:
    """Numbers and weights of the points of k-means++'s sample."""
    n, energy = len(x), torch.zeros(len(x))
    if n <= wanted:
        return torch.arange(n), torch.ones(n)
    for j in range(x.shape[1]):
        energy = energy + metric[:, j] * x[:, j] * x[:, j]
    fixed = _fixed_point(energy, 2.0 ** (60 - math.frexp(float(energy.max()))[1] - n.bit_length()))
    mass = fixed + max(1, int(fixed.sum()) // n)
    upto = mass.cumsum(0)
    total = int(upto[-1])
    step, longer = divmod(total, wanted)
    borders = [s * step + min(s, longer) for s in range(wanted + 1)]
    targets = [low + below(high - low) for low, high in pairwise(borders)]
    index = torch.searchsorted(upto, torch.tensor(targets), right=True)
    return index, (float(total) / (mass[index].double() * wanted)).float()


def _fixed_point(values: Tensor, scale: float) -> Tensor:
    return (values.double() * scale).round().to(torch.int64)


def _random(seed: int) -> Callable[[int], int]:
    """below(n): the next number of splitmix64, from 0 to n - 1."""
    state = _mix(seed)

    def below(n: int) -> int:
        nonlocal state
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        return _mix(state) * n >> 64

    return below


def _mix(bits: int) -> int:
    """The output function of splitmix64."""
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % 2**64
    return bits ^ (bits >> 31)


def kmeans(w: Tensor, h: Tensor, codebook: Tensor, iters: int) -> tuple[Tensor, Tensor]:
    """Plain k-means from ``codebook`` as one writes it in PyTorch: (codebook, codes int64).

    Scores are plain float32 matrix products, so codes may differ from the pinned score's where two
    entries are equally near up to rounding. The measure of how much the kernels gain.
    """
    d = codebook.shape[1]
    x = kmeans_points(w, d)
    weight = h.view(-1, d)
    for _ in range(iters):
        bias = weight @ codebook.square().T
        codes = torch.cat(
            [(bias - 2 * (rows * weight) @ codebook.T).argmin(-1) for rows in x.split(64)]
        )
        flat = codes.flatten()
        moments = torch.zeros_like(codebook).index_add_(0, flat, (x * weight).view(-1, d))
        weights = torch.zeros_like(codebook).index_add_(0, flat, weight.expand_as(x).reshape(-1, d))
        codebook = torch.where(weights > 0, moments / weights, codebook)
    return codebook, codes
