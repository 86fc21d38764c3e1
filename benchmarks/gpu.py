"""What the GPU benchmarks share: timing under graph replay, rotated operands, ceilings, tables.

A figure is the median over replays of a CUDA graph that holds several calls, each on a copy of the
operands of its own, so that together they exceed the L2 cache. Contenders take turns.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import baseline
import torch

ROTATED_BYTES = 256 << 20  # several times any L2
MOST_COPIES = 256
# Calls that one graph holds, the same number for all contenders: what a replay costs beside its
# calls then weighs the same on each. Fewer where a call is long.
GRAPH_CALLS = 64
GRAPH_MICROSECONDS = 5000.0
HEAD_START = 4_000_000  # cycles that the device waits: the host has then queued all that is timed


@dataclass
class Line:
    """One contender at one shape."""

    op: str
    shape: str
    contender: str
    microseconds: float
    p10: float
    p90: float
    bytes: int = 0
    percent_of_copy: float = 0.0
    times_peer: float = 0.0
    peer: str = ""
    notes: dict[str, Any] = field(default_factory=dict)


def copies(bytes_each: int) -> int:
    """How many copies of an operand of this size exceed the cache."""
    return max(2, min(MOST_COPIES, -(-ROTATED_BYTES // max(1, bytes_each))))


def capture(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """A graph of all calls, after each has run once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _elapsed(action: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    start.record()
    action()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def graph_calls(contenders: Mapping[str, Sequence[Callable[[], Any]]]) -> int:
    """How many calls each contender's graph holds: all its copies, unless calls are long."""
    longest = 0.0
    for calls in contenders.values():
        calls[0]()
        longest = max(longest, _elapsed(calls[0]))
    most = max(GRAPH_CALLS, *(len(calls) for calls in contenders.values()))
    return max(4, min(most, int(GRAPH_MICROSECONDS / longest)))


def compare(
    contenders: Mapping[str, Sequence[Callable[[], Any]]], *, graphs: bool = True, rounds: int = 25
) -> dict[str, tuple[float, float, float]]:
    """(median, p10, p90) microseconds a call of each contender, replayed in turn.

    One that cannot run here is left out, with its reason.
    """
    contenders = {name: calls for name, calls in contenders.items() if runs(name, calls[0])}
    actions: dict[str, tuple[Callable[[], Any], int]] = {}
    count = graph_calls(contenders) if graphs and contenders else 0
    for name, calls in contenders.items():
        if not graphs:
            actions[name] = (lambda calls=calls: [call() for call in calls], len(calls))
            continue
        rotated = [calls[i % len(calls)] for i in range(count)]
        if graph := attempt(name, lambda rotated=rotated: capture(rotated)):
            actions[name] = (graph.replay, count)
    samples: dict[str, list[float]] = {name: [] for name in actions}
    for round_number in range(rounds + 3):
        for name, (action, count) in actions.items():
            elapsed = _elapsed(action) / count
            if round_number >= 3:
                samples[name].append(elapsed)
    return {name: _spread(times) for name, times in samples.items()}


def attempt(name: str, make: Callable[[], Any]) -> Any:
    """What make() returns; None, and why on a line, if it raises, on the stream that was current.

    A peer that fails, whatever it is, ends neither a benchmark nor what is measured beside it.
    """
    try:
        with torch.cuda.stream(torch.cuda.current_stream()):
            return make()
    except Exception as reason:
        message = " ".join(str(reason).split())
        print(f"{name} left out: {type(reason).__name__}: {message[:160]}", flush=True)
        return None


def runs(name: str, call: Callable[[], Any]) -> bool:
    """Whether a call can be made, its kernels included."""

    def once() -> bool:
        call()
        torch.cuda.synchronize()
        return True

    return bool(attempt(name, once))


def seconds(action: Callable[[], Any], count: int = 1) -> float:
    """Wall time of an action with its kernels, the mean of so many."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        action()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def host_seconds(call: Callable[[], Any], count: int = 300) -> float:
    """What a call takes of the host alone: its kernels are short, or wait for the first."""
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / count


def _spread(times: list[float]) -> tuple[float, float, float]:
    ordered = sorted(times)
    last = len(ordered) - 1
    return statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)]


def copy_bandwidth() -> float:
    """Bytes read plus bytes written a second by a large device-to-device copy."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    best = min(_elapsed(lambda: target.copy_(source)) for _ in range(10))
    return 2 * source.numel() * 4 / (best * 1e-6)


def dense_rate() -> float:
    """bfloat16 operations a second of a large cuBLAS product on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = min(_elapsed(lambda: torch.mm(a, b)) for _ in range(10))
    return 2 * 8192**3 / (best * 1e-6)


def lines(
    op: str,
    shape: str,
    timings: dict[str, tuple[float, float, float]],
    bytes_of: dict[str, int],
    peer: str,
    bandwidth: float,
) -> list[Line]:
    """The contenders' lines, with their ratio to the peer's time."""
    out = []
    for name, (median, p10, p90) in timings.items():
        moved = bytes_of.get(name, 0)
        out.append(
            Line(
                op, shape, name, median, p10, p90, moved,
                100 * moved / (median * 1e-6) / bandwidth,
                timings[peer][0] / median if peer in timings else 0.0, peer,
            )
        )  # fmt: skip
    return out


def print_lines(results: Sequence[Line]) -> None:
    """One line a contender: its time beside what is known of it, % of a copy, ratio to its peer."""
    known = baseline.of_device(torch.cuda.get_device_name())
    for line in results:
        parts = [
            f"{line.op:12} {line.shape:24} {line.contender:22} {known.beside(asdict(line))} us"
        ]
        if line.p90:
            parts.append(f"[{line.p10:.2f}, {line.p90:.2f}]")
        if line.bytes:
            parts.append(f"{line.percent_of_copy:.1f} % of copy")
        if line.times_peer:
            parts.append(f"{line.times_peer:.2f} x {line.peer}")
        parts += [f"{name}={value:.4g}" for name, value in line.notes.items()]
        print("  ".join(parts), flush=True)


def kernel_name(name: str) -> str:
    """vq_gemv_lut<2 1> of `void nowag::cuda::vq_gemv_lut<(nowag::DType)2, 1>(VqWeight, ...)`."""
    name = re.sub(r"^void |\(anonymous namespace\)::|nowag::(?:cuda::)?", "", name)
    name = re.sub(r"\((?:\w+::)*\w+\)(?=\d)", "", name)  # casts of template arguments
    return name.partition("(")[0].replace(",", "").strip()[:80]


@functools.cache
def machine() -> dict[str, Any]:
    """Device, driver, clocks as found, versions, commit."""
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    return {
        "device": torch.cuda.get_device_name(),
        "nvidia_smi": _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": _output("git", "rev-parse", "HEAD") or os.environ.get("COMMIT", ""),
    }


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def arguments(description: str) -> argparse.Namespace:
    """--json FILE and --quick, which every GPU benchmark has; gradients are off from here on."""
    torch.set_grad_enabled(False)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--quick", action="store_true", help="few shapes and repeats")
    return parser.parse_args()


def write(path: Path | None, results: Sequence[Line], **more: Any) -> None:
    """Writes the figures with what they were measured on."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        figures = {
            "command": command(), "machine": machine(), **more,
            "lines": [asdict(line) for line in results],
        }  # fmt: skip
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(figures, indent=1) + "\n")
        partial.replace(path)  # run_gpu.py reads it while the benchmark goes on


def command() -> str:
    """How this program was called, without where its figures go."""
    script, *rest = sys.argv
    if "--json" in rest:
        at = rest.index("--json")
        del rest[at : at + 2]
    return shlex.join(["python", f"benchmarks/{Path(script).name}", *rest])
