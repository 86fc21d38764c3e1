"""Whether every kernel runs here and agrees with the CPU, and what the device can do at most.

python benchmarks/bench_gpu_smoke.py --json out.json
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gpu
import torch
from bench_gpu_gemv import VQ, check, sparse_weight, vq_weight
from torch import Tensor

from nowag_ext import ops

ROWS, COLS = 512, 768


def ceilings() -> list[gpu.Line]:
    """A large copy, a large product, and the least that a launch and a call cost."""
    copy, product = gpu.copy_bandwidth(), gpu.dense_rate()
    print(f"copy {copy / 1e12:.2f} TB/s, bf16 product {product / 1e12:.0f} TFLOP/s", flush=True)
    x = torch.zeros(1, device="cuda")
    launch = gpu.compare({"add_": [lambda: x.add_(1.0)]})["add_"]
    return [
        gpu.Line("ceiling", "copy of 1 GiB", "torch", 2**31 / copy * 1e6, 0, 0, 2**31, 100.0),
        gpu.Line("ceiling", "8192^3 product", "torch bf16", 2 * 8192**3 / product * 1e6, 0, 0),
        gpu.Line("ceiling", "a kernel of a graph", "torch", *launch),
    ]


def same(name: str, op: Callable[..., Any], *arguments: Any) -> None:
    """The device's bits are the CPU's."""

    def move(argument: Any) -> Any:
        if isinstance(argument, list):
            return [move(item) for item in argument]
        return argument.cuda() if isinstance(argument, Tensor) else argument

    got, want = op(*map(move, arguments)), op(*arguments)
    pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
    if not all(torch.equal(a.cpu(), b) for a, b in pairs):
        raise SystemExit(f"{name}: the device's bits are not the CPU's")
    print(f"{name}: ok", flush=True)


def checks() -> None:
    w, h = torch.randn(ROWS, COLS), torch.rand(COLS)
    same("normalize", ops.normalize, w)
    same("prune_select", ops.prune_select, w, h, w.numel() // 2)
    same("prune_select_nm", ops.prune_select_nm, w, h, 2, 4)
    for name, (d, code_bits) in VQ.items():
        same(f"kmeans_seed {name}", ops.kmeans_seed, [w], [h], 2**code_bits, d, "kmeans++", 0)
        vq = vq_weight(ROWS, COLS, d, code_bits)
        dense = ops.vq_dequantize(*vq, torch.float32)
        check(lambda x, vq=vq: ops.vq_gemv(x, *vq), dense, COLS, name)
        print(f"vq_gemv {name}: ok", flush=True)
    for pattern in ("50 %", "2:4"):
        sparse = sparse_weight(ROWS, COLS, pattern)
        dense = ops.sparse_dequantize(*sparse, COLS, torch.float32)
        check(lambda x, w=sparse: ops.sparse_gemv(x, *w), dense, COLS, pattern)
        print(f"sparse_gemv {pattern}: ok", flush=True)


def main() -> None:
    options = gpu.arguments(__doc__ or "")
    checks()
    results = ceilings()
    gpu.print_lines(results)
    gpu.write(options.json, results)


if __name__ == "__main__":
    main()
