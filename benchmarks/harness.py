"""What every benchmark shares: timing, rotation of operands, ceilings, tables, JSON.

Results are ratios to named peers measured in the same process, interleaved call by call, with the
same number of threads, on operands rotated through more memory than the caches hold.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from nowag_ext import _cpu

ROTATED_BYTES = int(os.environ.get("NOWAG_BENCH_ROTATE_MIB", "1536")) * 2**20


@dataclass
class Timing:
    """Seconds a call: median and the middle 80 %."""

    median: float
    p10: float
    p90: float
    calls: int


@dataclass
class Row:
    """One line of a benchmark: one contender at one shape."""

    op: str
    shape: str
    contender: str
    timing: Timing
    bytes: int = 0
    flops: int = 0
    ceiling: str = ""
    ceiling_percent: float = 0.0
    ratios: dict[str, float] = field(default_factory=dict)  # peer -> peer's time / this time
    notes: dict[str, Any] = field(default_factory=dict)


def rotation_count(bytes_each: int, most: int = 4096) -> int:
    """How many copies of an operand of this size exceed the caches."""
    return max(2, min(most, -(-ROTATED_BYTES // max(1, bytes_each))))


def compare(
    contenders: dict[str, Sequence[Callable[[], Any]]], seconds: float = 2.0, least: int = 5
) -> dict[str, Timing]:
    """Times contenders interleaved; each is a list of closures, one an operand copy, rotated."""
    cycles = {name: itertools.cycle(calls) for name, calls in contenders.items()}
    for cycle in cycles.values():
        next(cycle)()
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    begin = time.perf_counter()
    while True:
        for name, cycle in cycles.items():
            call = next(cycle)
            start = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - start)
        enough = min(len(times) for times in samples.values()) >= least
        if enough and time.perf_counter() - begin > seconds * len(contenders):
            return {name: summarize(times) for name, times in samples.items()}


def summarize(times: list[float]) -> Timing:
    ordered = sorted(times)
    last = len(ordered) - 1
    return Timing(
        statistics.median(ordered),
        ordered[round(0.1 * last)],
        ordered[round(0.9 * last)],
        len(ordered),
    )


def read_bandwidth() -> float:
    """Bytes a second that torch's threads read from memory, the best of several passes."""
    buffer = torch.ones(ROTATED_BYTES // 4)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        buffer.sum()
        best = max(best, buffer.numel() * 4 / (time.perf_counter() - start))
    return best


def fma_rate() -> float:
    """float32 operations a second of torch's dense GEMM, the practical FMA ceiling."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(a, b)
        best = max(best, 2 * 2048**3 / (time.perf_counter() - start))
    return best


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "simd": _cpu.simd_level(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def command() -> str:
    """How this program was called, without where its figures go."""
    script, *rest = sys.argv
    if "--json" in rest:
        at = rest.index("--json")
        del rest[at : at + 2]
    return shlex.join(["python", f"benchmarks/{Path(script).name}", *rest])


class Report:
    """Collects rows, prints each as it comes, writes them all as JSON."""

    def __init__(self, op: str) -> None:
        self.op = op
        self.rows: list[dict[str, Any]] = []
        self.ceilings = {"read_gb_s": read_bandwidth() / 1e9, "gemm_gflop_s": fma_rate() / 1e9}
        print(
            f"{op} | {machine()} | read {self.ceilings['read_gb_s']:.1f} GB/s, "
            f"GEMM {self.ceilings['gemm_gflop_s']:.0f} GFLOP/s"
        )

    def add(
        self,
        shape: str,
        timings: dict[str, Timing],
        peers: Sequence[str],
        cost: dict[str, dict[str, int]] | None = None,
        notes: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        """One row a contender; cost[contender] may hold bytes and flops a call."""
        for name, timing in timings.items():
            row = Row(self.op, shape, name, timing, **(cost or {}).get(name, {}))
            seconds = timing.median
            shares = {
                "read bandwidth": row.bytes / seconds / 1e9 / self.ceilings["read_gb_s"],
                "GEMM rate": row.flops / seconds / 1e9 / self.ceilings["gemm_gflop_s"],
            }
            row.ceiling = max(shares, key=lambda key: shares[key])
            row.ceiling_percent = 100 * shares[row.ceiling]
            row.ratios = {
                peer: timings[peer].median / seconds
                for peer in peers
                if peer in timings and peer != name
            }
            row.notes = (notes or {}).get(name, {})
            self.rows.append(asdict(row))
            print(_line(row), flush=True)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "op": self.op,
            "command": command(),
            "machine": machine(),
            "ceilings": self.ceilings,
            "rotated_bytes": ROTATED_BYTES,
            "rows": self.rows,
        }
        path.write_text(json.dumps(document, indent=1) + "\n")
        print(f"wrote {path}")


def _line(row: Row) -> str:
    ratios = "  ".join(f"{ratio:.2f}x {peer}" for peer, ratio in row.ratios.items())
    spread = f"[{row.timing.p10 * 1e6:.0f}, {row.timing.p90 * 1e6:.0f}]"
    share = f"{row.ceiling_percent:3.0f} % of {row.ceiling}" if row.ceiling_percent else ""
    notes = " ".join(f"{key}={value}" for key, value in row.notes.items())
    return (
        f"{row.shape:>18} {row.contender:<24} {row.timing.median * 1e6:11.1f} us {spread:>18}"
        f"  {share:<26} {ratios}  {notes}"
    )


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds a contender and shape")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's)")
    return parser
