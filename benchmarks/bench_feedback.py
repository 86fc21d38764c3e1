"""VQ under a full Hessian, by part: factor, error feedback, and the plain assignment beside it.

    python benchmarks/bench_feedback.py --json benchmarks/results/cpu/feedback.json

One 4096x4096 layer and a codebook that is given, so that nothing is trained. "plain" is
vq_compress with the same codebook and no Hessian: what the nearest entries alone cost. Peak memory
is the process's, less what it held before, in copies of the weight.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch

from nowag_ext import vq_compress
from nowag_ext.feedback import shared_points

FORMS = ((6, 2), (4, 2), (4, 3))


def seconds_of(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def status(field: str) -> int:
    """A size of this process that Linux keeps, in bytes: VmRSS now, VmHWM at most."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def measure(size: int, d: int, bits: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator)
    inputs = torch.randn(2 * size, size // 4, generator=generator)
    mixing = torch.randn(size // 4, size, generator=generator) / (size // 4) ** 0.5
    mixed = inputs @ mixing + 0.3 * torch.randn(2 * size, size, generator=generator)
    mixed *= torch.randn(size, generator=generator).mul(0.7).exp()
    hessian = mixed.T @ mixed / len(mixed)
    del inputs, mixing, mixed
    norms = hessian.diagonal().sqrt()
    codebook = torch.randn(2 ** (d * bits), d, generator=generator)
    shared = {"d": d, "bits": bits, "codebook": codebook / size**0.5}
    plain, nearest = seconds_of(lambda: vq_compress(weight, norms, **shared))
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    before = status("VmRSS")
    whole, packed = seconds_of(lambda: vq_compress(weight, norms, **shared, hessian=hessian))
    peak = (status("VmHWM") - before) / weight.nbytes
    factor, points = seconds_of(lambda: shared_points(weight, hessian, d))
    assign, _ = seconds_of(lambda: points.assign(codebook))
    return {
        "size": size, "d": d, "bits": bits, "plain_seconds": plain, "seconds": whole,
        "factor_seconds": factor, "assign_seconds": assign, "more_memory_in_weights": peak,
        "relative_objective": packed.relative_objective,
        "plain_diagonal_objective": nearest.relative_objective,
    }  # fmt: skip


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--size", type=int, default=4096, help="inputs and outputs")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    report = harness.Report("feedback")
    for d, bits in FORMS:
        row = measure(options.size, d, bits)
        report.rows.append(row)
        print(", ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    if options.json:
        report.write(options.json)


if __name__ == "__main__":
    main()
