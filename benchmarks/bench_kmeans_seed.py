"""Where k-means ends from each kind of seeds, on real layers, and what the seeds cost.

    python benchmarks/bench_kmeans_seed.py --json benchmarks/results/cpu/kmeans_seed.json

Three seeds (`--seeds`) a layer and codebook size, then 100 iterations, each of the library's own
loop and of plain Lloyd iterations (assignment, update, reseeding of empty entries; no relocation),
so that the seeds are judged alone too. The peer is k-means++ as the published reference draws it:
at every step K random candidates, one of them drawn with probability proportional to
min(distance, 1).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import harness
import torch
from real_layers import RealLayer, add_data_option, real_layers
from torch import Tensor

from nowag_ext import ops
from nowag_ext.kmeans import Points
from nowag_ext.normalize import normalize_weight

LAYERS = ("5.mlp.down_proj", "5.self_attn.q_proj", "15.mlp.gate_proj")
FORMS = ((4, 8), (6, 12))


def candidate_seeds(points: Points, entries: int, seed: int) -> Tensor:
    """K random candidates a step, their weighted distance to the nearest entry cut off at 1."""
    d, w = points.d, points.w[0]
    flat = torch.nn.functional.pad(w, (0, -w.shape[1] % d)).view(w.shape[0], -1, d)
    positions = flat.shape[1]
    metric = points.h[0].view(-1, d)
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        index = torch.randint(points.count, (count,), generator=generator)
        return flat[index // positions, index % positions], metric[index % positions]

    codebook = torch.empty(entries, d)
    codebook[0] = draw(1)[0][0]
    for k in range(1, entries):
        x, h = draw(entries)
        scores = h @ codebook[:k].square().T - 2 * ((h * x) @ codebook[:k].T)
        distance = scores.amin(1) + (h * x * x).sum(1)
        chances = distance.clamp(0, 1)
        chosen = torch.multinomial(chances, 1, generator=generator) if chances.any() else 0
        codebook[k] = x[chosen]
    return codebook


def seeds_by(name: str, points: Points, entries: int, seed: int) -> Tensor:
    if name == "reference's k-means++":
        return candidate_seeds(points, entries, seed)
    return ops.kmeans_seed(points.w, points.h, entries, points.d, name, seed)


def seconds_of(call: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call(*arguments)
    return time.perf_counter() - start, result


def assignment_seconds(points: Points, codebook: Tensor) -> float:
    """One assignment that knows nothing from before."""
    codes = [torch.empty_like(codes) for codes in points.codes]
    operands = (points.w, points.h, [codebook], codes, [], points.scale, False)
    return min(seconds_of(ops.kmeans_assign, *operands)[0] for _ in range(3))


def objective(points: Points, codebook: Tensor, relocating: bool) -> float:
    """Relative objective after 100 iterations."""
    if relocating:
        return points.run(codebook.clone(), 100, lambda *_: None).relative_objective
    with mock.patch.object(Points, "_relocate", return_value=False):
        return points.run(codebook.clone(), 100, lambda *_: None).relative_objective


def bench(layer: RealLayer, d: int, code_bits: int, seeds: int) -> list[dict[str, Any]]:
    parts = normalize_weight(layer.weight, layer.act_norms)
    points = Points([parts.normalized], [parts.importance], d)
    entries = 1 << code_bits
    rows = []
    for name in ("kmeans++", "random", "reference's k-means++"):
        drawn = [seconds_of(seeds_by, name, points, entries, seed) for seed in range(seeds)]
        seconds = statistics.median(taken for taken, _ in drawn)
        row = {
            "layer": layer.name,
            "d": d,
            "entries": entries,
            "seeding": name,
            "seconds": seconds,
            "assignments": seconds / assignment_seconds(points, drawn[0][1]),
            "objective": [objective(points, codebook, True) for _, codebook in drawn],
            "objective_lloyd": [objective(points, codebook, False) for _, codebook in drawn],
        }
        rows.append(row)
    return rows


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['layer']:>20} d={row['d']} K={row['entries']:<5} {row['seeding']:<22} "
        f"objective {statistics.mean(row['objective']):.5f}, Lloyd alone "
        f"{statistics.mean(row['objective_lloyd']):.5f}; {row['seconds']:.3f} s, "
        f"{row['assignments']:.1f} assignments",
        flush=True,
    )


def main() -> None:
    parser = harness.arguments(__doc__)
    add_data_option(parser)
    parser.add_argument("--only", default="", help="only cases whose 'name d=4' holds this")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each case")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    report = harness.Report("kmeans_seed")
    for layer in real_layers(options.data, LAYERS):
        for form in FORMS:
            if options.only not in f"{layer.name} d={form[0]}":
                continue
            for row in bench(layer, *form, options.seeds):
                report.rows.append(row)
                show(row)
    if options.json:
        report.write(options.json)


if __name__ == "__main__":
    main()
