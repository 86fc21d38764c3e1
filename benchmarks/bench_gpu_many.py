"""Linears at more than 16 tokens, under graph replay and eager, and the host's time of a call.

    python benchmarks/bench_gpu_many.py --json out.json

An eager call is what a prompt is made of: its time is the larger of the device's and the host's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import gpu
import torch
from bench_gpu_gemv import DENSE, DTYPE, VQ, vq_weight
from torch import Tensor

from nowag_ext import ops

SHAPES = [(4096, 4096), (11008, 4096)]
HOST = (4096, 4096)
TOKENS = [17, 32, 64, 128, 512, 2048]
QUICK = [17, 64, 512, 2048]
COPIES = 4  # of the dense weight: 32 MB and more each
ROUNDS = 7

Linear = Callable[[Tensor], Tensor]


def check(linear: Linear, dense: Tensor, tokens: int, name: str) -> None:
    x = torch.randn(tokens, dense.shape[1], device="cuda", dtype=DTYPE)
    want = x.double() @ dense.double().T
    error = float((linear(x).double() - want).norm() / want.norm())
    # Dense tiles are rounded to bf16 before they are multiplied.
    if not error < 1e-2:
        raise SystemExit(
            f"{name}, {tokens} tokens: relative error {error:.2e}, expected under 1e-2"
        )


def linears(rows: int, cols: int) -> dict[str, list[Linear]]:
    """Every contender, ours checked."""
    weights = [torch.randn(rows, cols, device="cuda", dtype=DTYPE) for _ in range(COPIES)]
    found: dict[str, list[Linear]] = {
        DENSE: [lambda x, w=w: torch.nn.functional.linear(x, w) for w in weights]
    }
    for name, (d, code_bits) in VQ.items():
        vq = [vq_weight(rows, cols, d, code_bits) for _ in range(COPIES)]
        found[name] = [lambda x, w=w: ops.vq_linear(x, *w, None) for w in vq]
        dense = ops.vq_dequantize(*vq[0], torch.float32)
        for tokens in (17, 64, 512):
            check(found[name][0], dense, tokens, name)
    return found


def bench(
    found: dict[str, list[Linear]], rows: int, cols: int, tokens: int, bandwidth: float
) -> list[gpu.Line]:
    x = torch.randn(tokens, cols, device="cuda", dtype=DTYPE)
    calls: dict[str, Sequence[Callable[[], Tensor]]] = {
        name: [lambda f=f: f(x) for f in some] for name, some in found.items()
    }
    shape = f"{rows}x{cols} tokens={tokens}"
    graph = gpu.compare(calls, rounds=ROUNDS)
    eager = gpu.compare(calls, graphs=False, rounds=ROUNDS)
    return [
        *gpu.lines("linear", shape, graph, {}, DENSE, bandwidth),
        *gpu.lines("linear, eager", shape, eager, {}, DENSE, bandwidth),
    ]


def host(rows: int, cols: int) -> list[gpu.Line]:
    """What one eager call at one token takes of the host."""
    x = torch.randn(1, cols, device="cuda", dtype=DTYPE)
    weight = torch.randn(rows, cols, device="cuda", dtype=DTYPE)
    calls = {DENSE: lambda: torch.nn.functional.linear(x, weight)}
    for name, (d, code_bits) in VQ.items():
        vq = vq_weight(rows, cols, d, code_bits)
        calls[name] = lambda vq=vq: ops.vq_gemv(x, *vq)
    timings = {}
    for name, call in calls.items():
        microseconds = 1e6 * gpu.host_seconds(call)
        timings[name] = (microseconds, 0.0, 0.0)
    return gpu.lines("host", f"{rows}x{cols} tokens=1", timings, {}, DENSE, 1.0)


def main() -> None:
    options = gpu.arguments(__doc__ or "")
    bandwidth = gpu.copy_bandwidth()
    results = host(*HOST)
    gpu.print_lines(results)
    for rows, cols in SHAPES:
        found = linears(rows, cols)
        for tokens in QUICK if options.quick else TOKENS:
            lines = bench(found, rows, cols, tokens, bandwidth)
            gpu.print_lines(lines)
            results += lines
            gpu.write(options.json, results, copy_bandwidth=bandwidth)
        del found
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
