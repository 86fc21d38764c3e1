"""VQ GEMV against published kernels, where their packages are installed, and torch's int4 product.

    python benchmarks/bench_gpu_peers.py --json out.json

Apart from bench_gpu_gemv.py, because these may compile when first used, and fail. Without any of
them there is nothing to measure, and nothing is written.
"""

from __future__ import annotations

import gpu
import gpu_peers
import torch
from bench_gpu_gemv import DENSE, QUICK, bench, dense, vq

SHAPES = [*QUICK, (4096, 11008), (8192, 28672)]
TOKENS = [1, 8]


def main() -> None:
    options = gpu.arguments(__doc__ or "")
    bandwidth = gpu.copy_bandwidth()
    results: list[gpu.Line] = []
    for rows, cols in QUICK if options.quick else SHAPES:
        published = gpu_peers.layers(gpu_peers.PUBLISHED, rows, cols)
        if not published:
            print("no published kernel runs here")
            return
        found = {DENSE: dense(rows, cols), **vq(rows, cols), **published}
        found |= gpu_peers.layers({"torch int4": gpu_peers.torch_int4}, rows, cols)
        for tokens in TOKENS:
            lines = bench(found, f"{rows}x{cols} tokens={tokens}", tokens, cols, bandwidth)
            gpu.print_lines(lines)
            results += lines
            gpu.write(options.json, results, copy_bandwidth=bandwidth)
        del found, published
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
