"""K-means as vq_compress runs it, against FAISS, a torch expression and our own brute force.

    python benchmarks/bench_kmeans.py --json benchmarks/results/cpu/kmeans.json

Every case is one run of the library's own loop from random seeds: assignment, sums, update,
reseeding, relocation. Iterations 2-21 are compared with FAISS's IndexFlatL2 (brute force, without
weights: an easier problem) on the same points, timed before and after the run in the same process
with the same threads, and with the usual torch expression (a GEMM and an argmin). "Every entry" is
the library's own kernel made to look at every entry for every point.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import harness
import torch
from real_layers import add_data_option, real_layers
from torch import Tensor

from nowag_ext import ops, reference
from nowag_ext.kmeans import Points
from nowag_ext.normalize import normalize_weight

REAL = ("5.mlp.down_proj", "5.self_attn.q_proj", "15.mlp.gate_proj")
TORCH_POINTS = 16384  # of which the torch expression holds all scores at once,
TORCH_SCORES = 2**27  # if they are not more than this many (a temporary is half a GiB)
FAISS_PAIRS = 2e10  # points times entries that FAISS is timed on


@dataclass
class Case:
    """A weight, how it is cut, and how long the run is."""

    name: str
    weight: Tensor
    act_norms: Tensor
    d: int
    code_bits: int
    iters: int

    @property
    def entries(self) -> int:
        return 1 << self.code_bits


def cases(options: Any) -> list[Case]:
    """A 4096x4096 layer in four forms, three real layers in two."""
    torch.manual_seed(0)
    # Channels of very different size, as calibration finds them.
    norms = torch.randn(4096).mul(0.7).exp()
    weight = torch.randn(4096, 4096) * torch.randn(4096).mul(0.3).exp()
    forms = [(6, 12, 100), (4, 8, 100), (2, 6, 100), (8, 16, 21)]
    found = [Case("4096x4096", weight, norms, *form) for form in forms]
    for layer in real_layers(options.data, REAL):
        for form in [(6, 12, 100), (4, 8, 100)]:
            found.append(Case(layer.name, layer.weight, layer.act_norms, *form))
    return found


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def flat_points(w: Tensor, d: int) -> Tensor:
    padded = torch.nn.functional.pad(w, (0, -w.shape[1] % d))
    return padded.view(-1, d).contiguous()


def faiss_search(points: Tensor, codebook: Tensor) -> Callable[[], Any] | None:
    """Unweighted nearest neighbours of the points; None where faiss is not installed."""
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())
    array = points.numpy()
    return lambda: index.search(array, 1)


def torch_search(w: Tensor, h: Tensor, codebook: Tensor) -> Tensor:
    """sum_j h (x - c)^2 without its constant as two GEMMs, then the argmin over n x K."""
    d = codebook.shape[1]
    weight = h.view(-1, d)
    x = w.view(w.shape[0], -1, d) * weight
    return (weight @ codebook.square().T - 2 * (x @ codebook.T)).argmin(-1)


def validate(points: Points, codebook: Tensor) -> None:
    """A cold assignment of the first rows equals the oracle's."""
    rows = max(1, min(points.w[0].shape[0], 20_000_000 // (codebook.shape[0] * 700)))
    w = points.w[0][:rows].contiguous()
    codes = torch.empty(rows, points.codes[0].shape[1], dtype=torch.uint16)
    ops.kmeans_assign([w], points.h, [codebook], [codes], [], 1.0, False)
    want = reference.kmeans_assign(w, points.h[0], codebook)
    if not torch.equal(codes.int(), want.int()):
        raise SystemExit("assignments differ from the oracle's")


def assignment_seconds(points: Points, codebook: Tensor, sums: Sequence[Tensor]) -> float:
    """One assignment that knows nothing from before."""
    codes = [torch.empty_like(codes) for codes in points.codes]
    return min(
        seconds_of(
            lambda: ops.kmeans_assign(
                points.w, points.h, [codebook], codes, sums, points.scale, False
            )
        )
        for _ in range(3)
    )


def exhaustive_seconds(points: Points, codebook: Tensor) -> float:
    """One assignment that looks at every entry."""
    operands = (points.w[0], points.h[0], codebook, torch.empty_like(points.codes[0]))
    return min(seconds_of(lambda: ops.kmeans_assign_exhaustive(*operands)) for _ in range(2))


def bench(case: Case) -> dict[str, Any]:
    parts = normalize_weight(case.weight, case.act_norms)
    points = Points([parts.normalized], [parts.importance], case.d)
    seed = ops.kmeans_seed(points.w, points.h, case.entries, case.d, "random", 0)
    validate(points, seed)
    sums = torch.zeros(case.entries, 2 * case.d + 1, dtype=torch.int64)
    with_sums = assignment_seconds(points, seed, [sums])
    without = assignment_seconds(points, seed, [])
    exhaustive = exhaustive_seconds(points, seed) / points.count
    update = min(
        seconds_of(lambda: ops.kmeans_update(sums, points.scale, seed.clone())) for _ in range(5)
    )
    seeding = seconds_of(
        lambda: ops.kmeans_seed(points.w, points.h, case.entries, case.d, "kmeans++", 0)
    )

    flat = flat_points(points.w[0], case.d)
    some = flat[:: max(1, round(flat.shape[0] * case.entries / FAISS_PAIRS))].contiguous()
    search = faiss_search(some, seed)
    few_points = min(TORCH_POINTS, TORCH_SCORES // case.entries)
    few_rows = max(1, few_points // points.codes[0].shape[1])
    few = torch.nn.functional.pad(points.w[0][:few_rows], (0, -case.weight.shape[1] % case.d))

    def peers() -> tuple[float, float]:
        """Seconds a point of FAISS and of the torch expression."""
        of_torch = seconds_of(lambda: torch_search(few, points.h[0], seed)) / (few.numel() / case.d)
        return (seconds_of(search) / some.shape[0] if search else float("nan")), of_torch

    peers()  # the first calls of both set up threads and buffers
    before = [peers() for _ in range(2)]
    stamps = [time.perf_counter()]
    result = points.run(seed.clone(), case.iters, lambda *_: stamps.append(time.perf_counter()))
    after = [peers() for _ in range(2)]
    of_faiss, of_torch = (
        sorted(values)[1] for values in zip(*before, *after, strict=True)
    )  # the second fastest of four

    iterations = [end - begin for begin, end in itertools.pairwise(stamps)]
    early = iterations[1:21]
    a_point = sum(early) / len(early) / points.count
    mean = sum(iterations) / len(iterations) / points.count
    return {
        "case": case.name, "d": case.d, "entries": case.entries, "points": points.count,
        "relative_objective": result.relative_objective,
        "iteration_seconds": iterations,
        "us_a_point": {
            "iterations 2-21": 1e6 * a_point,
            "iterations 22 on": 1e6 * sum(iterations[21:]) / max(1, len(iterations) - 21)
            / points.count,
            "first iteration": 1e6 * iterations[0] / points.count,
            "assignment from nothing": 1e6 * without / points.count,
            "every entry": 1e6 * exhaustive, "faiss": 1e6 * of_faiss, "torch": 1e6 * of_torch,
        },
        "ratios": {
            "faiss / iterations 2-21": of_faiss / a_point,
            "torch / iterations 2-21": of_torch / a_point,
            "every entry / mean of the run": exhaustive / mean,
            "faiss / mean of the run": of_faiss / mean,
        },
        "seeding_over_assignment": seeding / without,
        "update_over_brute_force": (max(0.0, with_sums - without) + update)
        / (of_faiss * points.count),
    }  # fmt: skip


def show(row: dict[str, Any]) -> None:
    us, ratios = row["us_a_point"], row["ratios"]
    print(
        f"{row['case']:>20} d={row['d']} K={row['entries']:<6} us a point: 2-21 "
        f"{us['iterations 2-21']:.4f}, later {us['iterations 22 on']:.4f}, first "
        f"{us['first iteration']:.3f}, FAISS {us['faiss']:.3f}, torch {us['torch']:.2f}, "
        f"every entry {us['every entry']:.3f}\n{'':>22}"
        + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
        + f"; seeding {row['seeding_over_assignment']:.1f} assignments, "
        f"sums and update {row['update_over_brute_force']:.1%} of FAISS",
        flush=True,
    )


def main() -> None:
    parser = harness.arguments(__doc__)
    add_data_option(parser)
    parser.add_argument(
        "--only", nargs="+", default=[""], help="only cases whose 'name d=4' holds one of these"
    )
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    report = harness.Report("kmeans")
    for case in cases(options):
        if any(part in f"{case.name} d={case.d}" for part in options.only):
            report.rows.append(bench(case))
            show(report.rows[-1])
    if options.json:
        report.write(options.json)


if __name__ == "__main__":
    main()
