"""One call of each kernel worth counting, for ncu (bench_gpu_counters.py runs it).

Only what stands between the profiler's marks is counted. A spin kernel begins each call, so that
whoever reads the counters knows whose they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bench_gpu_compress import points
from bench_gpu_gemv import DTYPE, VQ, sparse_weight, vq_weight

from nowag_ext import ops

ROWS, COLS = 11008, 4096
FLUSHED_BYTES = 128 << 20
MARK = "spin_kernel"  # torch.cuda._sleep
WARM_ITERATIONS = 3


def assignment(d: int, code_bits: int) -> Callable[[], Any]:
    """An assignment in the middle of a run."""
    (w, h), entries = points(d), 2**code_bits
    scale = ops.kmeans_scale(float(len(w) * h.double().sum()), float(w.abs().max()))
    codebook = ops.kmeans_seed([w], [h], entries, d, "random", 0)
    codes = torch.zeros(len(w), len(h) // d, dtype=torch.uint16, device="cuda")
    sums = torch.zeros(entries, 2 * d + 1, dtype=torch.int64, device="cuda")
    for iteration in range(WARM_ITERATIONS):
        ops.kmeans_assign([w], [h], [codebook], [codes], [sums], scale, iteration > 0)
        ops.kmeans_update(sums, scale, codebook)
    return lambda: ops.kmeans_assign([w], [h], [codebook], [codes], [sums], scale, True)


def calls() -> dict[str, Callable[[], Any]]:
    """Name -> call, what is most worth knowing first."""
    x = {n: torch.randn(n, COLS, device="cuda", dtype=DTYPE) for n in (1, 2, 16, 64)}
    d6, d4 = (vq_weight(ROWS, COLS, *form) for form in VQ.values())
    sparse = sparse_weight(ROWS, COLS, "50 %")
    w, h = torch.randn(4096, 4096, device="cuda"), torch.rand(4096, device="cuda")
    return {
        "vq d=6 tokens=1": lambda: ops.vq_gemv(x[1], *d6),
        "vq d=6 tokens=2": lambda: ops.vq_gemv(x[2], *d6),
        "vq d=6 tokens=16": lambda: ops.vq_gemv(x[16], *d6),
        "vq d=6 tokens=64": lambda: ops.vq_linear(x[64], *d6, None),
        "vq d=4 tokens=1": lambda: ops.vq_gemv(x[1], *d4),
        "vq d=4 tokens=16": lambda: ops.vq_gemv(x[16], *d4),
        "assign d=6": assignment(*VQ["vq d=6"]),
        "assign d=4": assignment(*VQ["vq d=4"]),
        "dequantize d=6": lambda: ops.vq_dequantize(*d6, DTYPE),
        "sparse 50 % tokens=1": lambda: ops.sparse_gemv(x[1], *sparse),
        "select 50 %": lambda: ops.prune_select(w, h, w.numel() // 2),
    }


def main() -> None:
    torch.set_grad_enabled(False)
    flushed = torch.empty(FLUSHED_BYTES // 4, device="cuda")
    for name, call in calls().items():
        call()
        flushed.fill_(1.0)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        torch.cuda._sleep(1)
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        print(name, flush=True)


if __name__ == "__main__":
    main()
