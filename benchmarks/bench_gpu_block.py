"""One Llama-2-7B decoder block, its seven linears compressed, at one token; times 32.

"siblings": linears that read the same input in one call, with one codebook, as decode_graph has it.

python benchmarks/bench_gpu_block.py --json out.json
"""

from __future__ import annotations

import itertools
from typing import Any

import gpu
import torch
from bench_gpu_gemv import sparse_weight, vq_weight
from torch import Tensor

from nowag_ext import ops

HIDDEN, INTERMEDIATE, BLOCKS = 4096, 11008, 32
LINEARS = [(HIDDEN, HIDDEN)] * 4 + [(INTERMEDIATE, HIDDEN)] * 2 + [(HIDDEN, INTERMEDIATE)]
SIBLINGS = [3, 1, 2, 1]  # query, key, value; output; gate and up; down


def block_bytes(weights: list[list[Tensor]]) -> int:
    return sum(tensor.numel() * tensor.element_size() for weight in weights for tensor in weight)


def run_siblings(block: list[list[Tensor]], inputs: dict[int, Tensor]) -> None:
    left = iter(zip(block, LINEARS, strict=True))
    for count in SIBLINGS:
        weights, shapes = zip(*itertools.islice(left, count), strict=True)
        codes, _, row_norms, col_norms = zip(*weights, strict=True)
        codebooks = [block[0][1]] * len(codes)
        x = inputs[shapes[0][1]]
        ops.vq_gemv_group(x, codes, codebooks, row_norms, col_norms, [None] * len(codes))


def main() -> None:
    options = gpu.arguments(__doc__ or "")
    bandwidth = gpu.copy_bandwidth()
    inputs = {
        cols: torch.randn(1, cols, device="cuda", dtype=torch.bfloat16) for _, cols in LINEARS
    }
    makers: dict[str, tuple[Any, Any]] = {
        "cuBLAS bf16": (
            lambda rows, cols: [torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16)],
            torch.nn.functional.linear,
        ),
        "vq d=6": (lambda rows, cols: vq_weight(rows, cols, 6, 12), ops.vq_gemv),
        "vq d=4": (lambda rows, cols: vq_weight(rows, cols, 4, 8), ops.vq_gemv),
        "sparse 2:4": (lambda rows, cols: sparse_weight(rows, cols, "2:4"), ops.sparse_gemv),
    }
    calls, sizes = {}, {}
    for name, (make, apply) in makers.items():
        blocks = [[make(*shape) for shape in LINEARS]]
        sizes[name] = block_bytes(blocks[0])
        while len(blocks) < min(8, gpu.copies(sizes[name])):
            blocks.append([[t.clone() for t in weight] for weight in blocks[0]])

        def run(block: list[list[Tensor]], apply: Any = apply) -> None:
            for weight, (_, cols) in zip(block, LINEARS, strict=True):
                apply(inputs[cols], *weight)

        calls[name] = [lambda block=block, run=run: run(block) for block in blocks]
        if name.startswith("vq"):
            siblings = f"{name}, siblings"
            calls[siblings] = [lambda block=block: run_siblings(block, inputs) for block in blocks]
            sizes[siblings] = sizes[name]
    timings = gpu.compare(calls)
    results = gpu.lines("block", "Llama-2-7B, 1 token", timings, sizes, "cuBLAS bf16", bandwidth)
    for line in results:
        line.notes["blocks_32_ms"] = BLOCKS * line.microseconds / 1e3
    gpu.print_lines(results)
    gpu.write(options.json, results, copy_bandwidth=bandwidth)


if __name__ == "__main__":
    main()
