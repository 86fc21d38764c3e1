"""Compression on a GPU: assignment and update over a real run, seeding, selection, normalisation.

    python benchmarks/bench_gpu_compress.py --json out.json

Peers, in the same run: for the assignment the torch expression that materialises distances, and
flash-kmeans where it is installed; torch.argsort and torch.kthvalue for the selection.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import gpu
import gpu_peers
import torch
from torch import Tensor

from nowag_ext import Codebook, ops, prune, vq_compress
from nowag_ext.feedback import shared_points

ROWS, COLS = 4096, 4096
LLAMA_2_7B = {(4096, 4096): 4 * 32, (11008, 4096): 2 * 32, (4096, 11008): 32}


def points(d: int) -> tuple[Tensor, Tensor]:
    """A normalised weight and importances with outlier channels."""
    weight = ops.normalize(torch.randn(ROWS, COLS, device="cuda"))[0] * COLS**0.5
    h = torch.zeros(ops.code_positions(COLS, d) * d, device="cuda")
    h[:COLS] = torch.randn(COLS, device="cuda").square()
    h[: COLS // 100] *= 50
    return weight, h


def torch_assign(w: Tensor, h: Tensor, codebook: Tensor, rows: int) -> None:
    """The reference's expression, a block of rows at a time: n x K distances in memory."""
    d = codebook.shape[1]
    x = torch.nn.functional.pad(w[:rows], (0, -COLS % d)).view(rows, -1, 1, d)
    weights = h.view(1, -1, 1, d)
    (weights * (x - codebook).square()).sum(-1).argmin(-1)


def flash_seconds(w: Tensor, codebook: Tensor, iterations: int = 10) -> float | None:
    """Seconds an iteration of flash-kmeans, without weights, on the same points."""
    d = codebook.shape[1]
    flat = torch.nn.functional.pad(w, (0, -COLS % d)).view(-1, d)
    run = gpu_peers.flash_kmeans(flat, codebook, iterations)
    return None if run is None else gpu.seconds(run) / iterations


def bench_kmeans(d: int, code_bits: int, iterations: int) -> list[gpu.Line]:
    """Every iteration of one run from k-means++ seeds, update included."""
    (w, h), shape = points(d), f"{ROWS}x{COLS} d={d} K={2**code_bits}"
    entries = 2**code_bits
    scale = ops.kmeans_scale(float(ROWS * h.double().sum()), float(w.abs().max()))
    ops.kmeans_seed([w], [h], entries, d, "kmeans++", 0)
    seeding = gpu.seconds(lambda: ops.kmeans_seed([w], [h], entries, d, "kmeans++", 0))
    codebook = ops.kmeans_seed([w], [h], entries, d, "kmeans++", 0)
    codes = torch.zeros(ROWS, len(h) // d, dtype=torch.uint16, device="cuda")
    sums = torch.zeros(entries, 2 * d + 1, dtype=torch.int64, device="cuda")

    def iterate(warm: bool) -> None:
        ops.kmeans_assign([w], [h], [codebook], [codes], [sums], scale, warm)
        ops.kmeans_update(sums, scale, codebook)

    marks = [torch.cuda.Event(enable_timing=True) for _ in range(iterations + 1)]
    torch.cuda._sleep(gpu.HEAD_START)
    marks[0].record()
    for iteration in range(iterations):
        iterate(iteration > 0)
        marks[iteration + 1].record()
    torch.cuda.synchronize()
    times = [begin.elapsed_time(end) / 1e3 for begin, end in itertools.pairwise(marks)]
    rows = max(1, min(ROWS, 2**30 // (len(h) // d * entries * 4 * 8)))
    torch_assign(w, h, codebook, rows)
    peer = gpu.seconds(lambda: torch_assign(w, h, codebook, rows)) * ROWS / rows
    mean = statistics.fmean(times)
    flash = flash_seconds(w, codebook)
    ordered = sorted(time * 1e6 for time in times)
    line = gpu.Line(
        "assign+update", shape, f"mean of {iterations}", mean * 1e6,
        ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10],
        times_peer=peer / mean, peer="torch expression",
        notes={"first_us": times[0] * 1e6, "last_us": times[-1] * 1e6},
    )  # fmt: skip
    if flash is not None:
        line.notes["times_flash_kmeans"] = flash / mean
    seed = gpu.Line(
        "seed", shape, "k-means++", seeding * 1e6, 0, 0, notes={"assignments": seeding / mean}
    )
    return [line, seed]


def bench_selection(bandwidth: float) -> list[gpu.Line]:
    """Half of a layer's weights, from given normalised weights and importances."""
    count = gpu.copies(ROWS * COLS * 4)
    weights = [torch.randn(ROWS, COLS, device="cuda") for _ in range(count)]
    h = torch.rand(COLS, device="cuda")
    saliency = [h * w.square() for w in weights[:2]]
    half = ROWS * COLS // 2
    zeros = [w * (w > 0) for w in weights]
    ties, ones = [w.round() for w in weights], torch.ones_like(h)
    bitmap = ops.prune_select(weights[0], h, half)
    timings = gpu.compare(
        {
            "50 %": [lambda w=w: ops.prune_select(w, h, half) for w in weights],
            "50 %, half zeros": [lambda w=w: ops.prune_select(w, h, half) for w in zeros],
            "50 %, ties": [lambda w=w: ops.prune_select(w, ones, half) for w in ties],
            "objective": [lambda w=w: ops.prune_objective(w, h, bitmap) for w in weights],
            "2:4": [lambda w=w: ops.prune_select_nm(w, h, 2, 4) for w in weights],
            "normalize": [lambda w=w: ops.normalize(w) for w in weights],
            "read once": [lambda w=w: w.sum() for w in weights],
        }
    )
    slow = gpu.compare(
        {
            "torch.argsort": [lambda s=s: s.view(-1).argsort(stable=True) for s in saliency],
            "torch.kthvalue": [lambda s=s: s.view(-1).kthvalue(half) for s in saliency],
        },
        graphs=False,
        rounds=5,
    )
    once = ROWS * COLS * 4
    size = {name: once * (3 if name == "normalize" else 1) for name in timings}
    return gpu.lines("select", f"{ROWS}x{COLS}", {**timings, **slow}, size, "read once", bandwidth)


def bench_feedback() -> list[gpu.Line]:
    """One layer under a Hessian, with a codebook that is shared: its codes alone, and all of it."""
    d, entries, tokens = 6, 4096, 8192
    w = torch.randn(ROWS, COLS, device="cuda") / COLS**0.5
    inputs = torch.randn(tokens, COLS, device="cuda") * torch.rand(COLS, device="cuda").exp()
    hessian = inputs.T @ inputs / tokens
    act_norms = hessian.diagonal().sqrt()
    codebook = Codebook((torch.randn(entries, d, device="cuda") * 0.8).half(), "model")
    found = shared_points(w, hessian, d, 1.0)
    jobs: dict[str, Callable[[], object]] = {
        "codes": lambda: found.assign(codebook.entries.float()),
        "vq_compress": lambda: vq_compress(
            w, act_norms, d=d, bits=2, hessian=hessian, codebook=codebook
        ),
    }
    shape = f"{ROWS}x{COLS} d={d} K={entries}"
    lines = []
    for name, job in jobs.items():
        job()
        lines.append(gpu.Line("feedback", shape, name, gpu.seconds(job, 5) * 1e6, 0, 0))
    return lines


def bench_model(quick: bool) -> list[gpu.Line]:
    """Llama-2-7B's linears one after another, from random weights."""
    jobs: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "pruned 50 %": lambda w, a: prune(w, a, sparsity=0.5),
        "pruned 2:4": lambda w, a: prune(w, a, pattern="2:4"),
    }
    iterations = 10 if quick else 100
    jobs[f"vq d=6, {iterations} iterations"] = lambda w, a: vq_compress(w, a, iters=iterations)
    results = []
    for name, job in jobs.items():
        total = 0.0
        for (rows, cols), count in LLAMA_2_7B.items():
            w = torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16)
            act_norms = torch.rand(cols, device="cuda") + 0.1
            job(w, act_norms)
            total += count * gpu.seconds(functools.partial(job, w, act_norms))
        results.append(gpu.Line("Llama-2-7B", "all linears", name, total * 1e6, 0, 0))
    return results


def main() -> None:
    options = gpu.arguments(__doc__ or "")
    bandwidth = gpu.copy_bandwidth()
    iterations = 20 if options.quick else 100
    parts: list[Callable[[], list[gpu.Line]]] = [
        lambda: bench_selection(bandwidth),
        lambda: bench_kmeans(6, 12, iterations),
        lambda: bench_kmeans(4, 8, iterations),
        bench_feedback,
        lambda: bench_model(options.quick),
    ]
    results: list[gpu.Line] = []
    for part in parts:
        found = part()
        gpu.print_lines(found)
        results += found
        gpu.write(options.json, results, copy_bandwidth=bandwidth)


if __name__ == "__main__":
    main()
