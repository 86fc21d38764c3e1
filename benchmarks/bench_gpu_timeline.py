"""Each kernel of a decoder block, of compression and of selection: its start and its duration.

    python benchmarks/bench_gpu_timeline.py --json out.json

A line is a whole call, from its first kernel's start to its last one's end, of which the gaps are
a part; the JSON's "kernels" are the rows of the log. Calls are replayed from a graph where they can
be, after the caches have been flushed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gpu
import torch
from bench_gpu_block import LINEARS
from bench_gpu_compress import COLS, ROWS, points
from bench_gpu_gemv import DTYPE, VQ, sparse_weight, vq_weight
from torch.profiler import ProfilerActivity, profile

from nowag_ext import ops

FLUSHED_BYTES = 256 << 20
MOST_SHOWN = 40  # kernels of a call
LARGE = (11008, 4096)

Kernel = tuple[float, float, str]  # start after the first one's, duration, name


def kernels(call: Callable[[], Any], *, graph: bool, warm: int) -> list[Kernel]:
    """All that one call runs on the device, in order."""
    for _ in range(warm):
        call()
    torch.cuda.synchronize()
    run = gpu.capture([call]).replay if graph else call
    run()
    flushed = torch.empty(FLUSHED_BYTES // 4, device="cuda").fill_(1.0)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    del flushed
    events = [e for e in profiler.events() or [] if str(e.device_type).endswith("CUDA")]
    events.sort(key=lambda event: event.time_range.start)
    begin = events[0].time_range.start
    return [
        (e.time_range.start - begin, e.time_range.end - e.time_range.start, gpu.kernel_name(e.name))
        for e in events
    ]


class Timeline:
    """Collects calls; prints and writes each as it comes."""

    def __init__(self, path: Any) -> None:
        self.path = path
        self.lines: list[gpu.Line] = []
        self.kernels: dict[str, list[Kernel]] = {}

    def add(self, name: str, call: Callable[[], Any], *, graph: bool = True, warm: int = 2) -> None:
        found = gpu.attempt(name, lambda: kernels(call, graph=graph, warm=warm))
        if not found:
            return
        span = max(start + duration for start, duration, _ in found)
        notes = {"kernels": len(found), "sum": sum(duration for _, duration, _ in found)}
        line = gpu.Line("timeline", name, "span", span, 0, 0, notes=notes)
        gpu.print_lines([line])
        for start, duration, kernel in found[:MOST_SHOWN]:
            print(f"  {start:9.1f} {duration:9.2f} {kernel}")
        self.lines.append(line)
        self.kernels[name] = found[:MOST_SHOWN]
        gpu.write(self.path, self.lines, kernels=self.kernels)


def block(timeline: Timeline, name: str, weights: list[Any], op: Any, tokens: int) -> None:
    """The seven linears of a Llama-2-7B block."""
    x = {
        cols: torch.randn(tokens, cols, device="cuda", dtype=DTYPE)
        for cols in {cols for _, cols in LINEARS}
    }

    def run() -> None:
        for weight, (_, cols) in zip(weights, LINEARS, strict=True):
            op(x[cols], *weight)

    timeline.add(f"block, {name}, tokens={tokens}", run)


def linears(timeline: Timeline, quick: bool) -> None:
    for name, (d, code_bits) in VQ.items():
        weights = [vq_weight(*shape, d, code_bits) for shape in LINEARS]
        for tokens in (1, 8) if quick else (1, 2, 8):
            block(timeline, name, weights, ops.vq_gemv, tokens)
        x = torch.randn(64, LARGE[1], device="cuda", dtype=DTYPE)
        vq = weights[LINEARS.index(LARGE)]
        shape = f"{LARGE[0]}x{LARGE[1]}, {name}, tokens=64, eager"
        timeline.add(shape, lambda vq=vq, x=x: ops.vq_linear(x, *vq, None), graph=False)
    weights = [sparse_weight(*shape, "50 %") for shape in LINEARS]
    block(timeline, "sparse 50 %", weights, ops.sparse_gemv, 1)


def compression(timeline: Timeline) -> None:
    for d, code_bits in VQ.values():
        (w, h), entries = points(d), 2**code_bits
        scale = ops.kmeans_scale(float(len(w) * h.double().sum()), float(w.abs().max()))
        codebook = ops.kmeans_seed([w], [h], entries, d, "random", 0)
        codes = torch.zeros(len(w), len(h) // d, dtype=torch.uint16, device="cuda")
        sums = torch.zeros(entries, 2 * d + 1, dtype=torch.int64, device="cuda")
        warm = False

        def iterate() -> None:
            nonlocal warm
            ops.kmeans_assign([w], [h], [codebook], [codes], [sums], scale, warm)  # noqa: B023
            ops.kmeans_update(sums, scale, codebook)  # noqa: B023
            warm = True

        name = f"{ROWS}x{COLS} d={d} K={entries}"
        timeline.add(f"assign+update, {name}", iterate, graph=False, warm=6)
        timeline.add(
            f"seed, {name}",
            lambda w=w, h=h, k=entries, d=d: ops.kmeans_seed([w], [h], k, d, "kmeans++", 0),
            graph=False, warm=1,
        )  # fmt: skip


def selection(timeline: Timeline) -> None:
    w, h = torch.randn(ROWS, COLS, device="cuda"), torch.rand(COLS, device="cuda")
    half = w.numel() // 2
    zeros = w * (w > 0)
    timeline.add("select 50 %", lambda: ops.prune_select(w, h, half))
    timeline.add("select 50 %, half zeros", lambda: ops.prune_select(zeros, h, half))
    timeline.add("select 2:4", lambda: ops.prune_select_nm(w, h, 2, 4))
    timeline.add("normalize", lambda: ops.normalize(w))


def main() -> None:
    options = gpu.arguments(__doc__ or "")
    timeline = Timeline(options.json)
    linears(timeline, options.quick)
    selection(timeline)
    compression(timeline)


if __name__ == "__main__":
    main()
