"""Hardware counters of about twenty launches, by ncu: what bounds each kernel.

    python benchmarks/bench_gpu_counters.py --json out.json

Times are those under ncu, each launch alone and from cold caches: they compare with each other and
with an earlier run, not with the other benchmarks. The CSV stays beside the JSON.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import gpu
from profile_gpu import MARK

STALLS = (
    "barrier", "branch_resolving", "dispatch_stall", "drain", "imc_miss", "lg_throttle",
    "long_scoreboard", "math_pipe_throttle", "membar", "mio_throttle", "no_instruction",
    "not_selected", "selected", "short_scoreboard", "wait",
)  # fmt: skip
_OF_PEAK = "avg.pct_of_peak_sustained"
DURATION = "gpu__time_duration.sum"
# What a note is called -> ncu's name and what it is divided by.
METRICS = {
    "grid": ("launch__grid_size", 1),
    "block": ("launch__block_size", 1),
    "registers": ("launch__registers_per_thread", 1),
    "shared_kb": ("launch__shared_mem_per_block", 1000),
    "warps %": (f"sm__warps_active.{_OF_PEAK}_active", 1),
    "issue %": (f"smsp__issue_active.{_OF_PEAK}_active", 1),
    "dram %": (f"gpu__dram_throughput.{_OF_PEAK}_elapsed", 1),
    "dram_read_mb": ("dram__bytes_read.sum", 1e6),
    "l2 %": (f"lts__throughput.{_OF_PEAK}_elapsed", 1),
    "l1 %": (f"l1tex__throughput.{_OF_PEAK}_active", 1),
    "alu %": (f"sm__inst_executed_pipe_alu.{_OF_PEAK}_active", 1),
    "fma %": (f"sm__inst_executed_pipe_fma.{_OF_PEAK}_active", 1),
    "lsu %": (f"sm__inst_executed_pipe_lsu.{_OF_PEAK}_active", 1),
    "tensor %": (f"sm__pipe_tensor_cycles_active.{_OF_PEAK}_active", 1),
    "instructions_m": ("smsp__inst_executed.sum", 1e6),
    "shared_wavefronts_m": ("l1tex__data_pipe_lsu_wavefronts_mem_shared.sum", 1e6),
    "bank_conflicts_m": ("l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum", 1e6),
    **{
        f"waits {stall}": (
            f"smsp__average_warps_issue_stalled_{stall}_per_issue_active.ratio", 1
        )
        for stall in STALLS
    },
}  # fmt: skip
MICROSECONDS = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6, "nsecond": 1e-3, "usecond": 1.0}


def rows(text: Iterable[str]) -> list[dict[str, str]]:
    """ncu's CSV among whatever else stands in its log; the first row has the units."""
    return list(csv.DictReader(line for line in text if line.startswith('"')))


def line(row: dict[str, str], units: dict[str, str], call: str) -> gpu.Line:
    """A launch; a counter that the device does not have is left out."""

    def value(metric: str) -> float | None:
        try:
            return float(row[metric].replace(",", ""))
        except (KeyError, ValueError):
            return None

    notes = {
        note: found / divisor
        for note, (metric, divisor) in METRICS.items()
        if (found := value(metric)) is not None
    }
    microseconds = (value(DURATION) or 0.0) * MICROSECONDS.get(units.get(DURATION, ""), 1e-3)
    kernel = gpu.kernel_name(row["Kernel Name"])
    return gpu.Line("ncu", call, kernel, microseconds, 0, 0, notes=notes)


def lines(text: Iterable[str], calls: Sequence[str]) -> list[gpu.Line]:
    """Every launch under the name of its call, of which a spin kernel is the first."""
    table = rows(text)
    units, launches = (table[0], table[1:]) if table else ({}, [])
    found: list[gpu.Line] = []
    names = iter(calls)
    call = ""
    for row in launches:
        if MARK in row["Kernel Name"]:
            call = next(names, "")
        else:
            found.append(line(row, units, call))
    return found


def profile(report: Path) -> list[str]:
    """Runs profile_gpu.py under ncu; returns the names of its calls, in order."""
    metrics = ",".join([DURATION, *(metric for metric, _ in METRICS.values())])
    command: list[Any] = [
        "ncu", "--profile-from-start", "off", "--clock-control", "none", "--csv", "--page", "raw",
        "--print-units", "base", "--metrics", metrics, "--log-file", report, "--force-overwrite",
        sys.executable, Path(__file__).with_name("profile_gpu.py"),
    ]  # fmt: skip
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        print(f"ncu ended with status {result.returncode}", flush=True)
    return [line for line in result.stdout.splitlines() if not line.startswith("==")]  # ncu's own


def main() -> None:
    options = gpu.arguments(__doc__ or "")
    with tempfile.TemporaryDirectory() as folder:
        report = (options.json or Path(folder) / "counters").with_suffix(".csv")
        calls = profile(report)
        text = report.read_text().splitlines() if report.is_file() else []
    results = lines(text, calls)
    gpu.print_lines(results)
    gpu.write(options.json, results)
    if not results:
        raise SystemExit("\n".join(["ncu counted nothing:", *text[-5:]]))


if __name__ == "__main__":
    main()
