"""Three layers of SmolLM2 by vq_compress, against plain PyTorch; pruning masks of every layer.

    python benchmarks/bench_layers.py --json benchmarks/results/cpu/layers.json

act_norms as in bench_model.py. d=4, 2 bits, 100 iterations with the default settings. The peers do
one iteration of the same k-means in the same process, times 100: reference.py, and the usual torch
expression, a GEMM and an argmin over the whole n x K matrix of scores. Masks are compared with a
stable ascending sort of the saliencies of the same normalised weights.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import harness
import torch
from real_layers import CALIBRATION, add_data_option, calibrated, require_data
from torch import Tensor

import nowag_ext
from nowag_ext import ops, reference
from nowag_ext.normalize import normalize_weight

D, BITS, ITERS = 4, 2, 100
LAYERS = ("5.mlp.down_proj", "5.self_attn.q_proj", "15.mlp.gate_proj")


def seconds_of(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def oracle_iteration(w: Tensor, h: Tensor, codebook: Tensor) -> None:
    codes = reference.kmeans_assign(w, h, codebook)
    sums = reference.kmeans_sums(w, h, codes, codebook.shape[0], D, 2.0**30)
    reference.kmeans_update(sums, 2.0**30, codebook)


def torch_iteration(w: Tensor, h: Tensor, codebook: Tensor) -> None:
    x = w.view(w.shape[0], -1, D)
    weight = h.view(-1, D)
    bias = weight @ codebook.square().T
    scores = bias - 2 * ((x * weight) @ codebook.T)
    codes = scores.argmin(-1).flatten()
    moment = torch.zeros_like(codebook).index_add_(0, codes, (x * weight).reshape(-1, D))
    mass = torch.zeros_like(codebook).index_add_(0, codes, weight.expand_as(x).reshape(-1, D))
    torch.where(mass > 0, moment / mass, codebook)


def bench_layer(name: str, weight: Tensor, norms: Tensor) -> dict[str, Any]:
    result = nowag_ext.vq_compress(weight, norms, d=D, bits=BITS, iters=ITERS)
    seconds = seconds_of(
        lambda: nowag_ext.vq_compress(weight, norms, d=D, bits=BITS, iters=ITERS), 3
    )
    parts = normalize_weight(weight, norms)
    operands = (parts.normalized, parts.importance)
    codebook = ops.kmeans_seed([operands[0]], [operands[1]], 1 << (D * BITS), D, "random", 0)
    seconds_of(lambda: oracle_iteration(*operands, codebook), 1)
    row = {
        "layer": name,
        "relative_objective": result.relative_objective,
        "seconds": seconds,
        "reference.py_seconds": ITERS
        * seconds_of(lambda: oracle_iteration(*operands, codebook), 1),
        "torch_seconds": ITERS * seconds_of(lambda: torch_iteration(*operands, codebook), 3),
    }
    print(
        f"{name}: relative objective {row['relative_objective']:.5f}, {seconds:.2f} s; "
        f"reference.py {row['reference.py_seconds'] / seconds:.0f}x, torch's expression "
        f"{row['torch_seconds'] / seconds:.1f}x as long"
    )
    return row


def equal_masks(weight: Tensor, norms: Tensor) -> bool:
    parts = normalize_weight(weight, norms)
    w, h = parts.normalized, parts.importance
    order = torch.sort((h * (w * w)).flatten(), stable=True).indices
    kept = torch.ones(w.numel(), dtype=torch.bool)
    kept[order[: w.numel() // 2]] = False
    bits = ops.prune_select(w, h, w.numel() // 2)
    mask = (bits[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return torch.equal(mask.flatten(1)[:, : w.shape[1]].bool(), kept.view_as(w))


def main() -> None:
    parser = harness.arguments(__doc__)
    add_data_option(parser)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    require_data(options.data, [CALIBRATION])
    model, _, norms = calibrated(options.data)
    print(harness.machine())
    rows = []
    for layer in LAYERS:
        name = f"model.layers.{layer}"
        rows.append(bench_layer(name, model.get_submodule(name).weight.detach(), norms[name]))
    equal = sum(equal_masks(model.get_submodule(n).weight.detach(), norms[n]) for n in norms)
    print(f"pruning masks equal to a stable sort's: {equal} of {len(norms)} linears")
    if options.json:
        document = {
            "command": harness.command(),
            "machine": harness.machine(),
            "layers": rows,
            "masks": [equal, len(norms)],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
