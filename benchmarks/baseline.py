"""What a measured line is held against: the last committed result of its device, a prediction.

A line of a GPU benchmark (gpu.Line) is named by its op, shape and contender. `results/<device>/`
holds the committed documents of one device, `results/predictions.json` targets, and what was
predicted before it was measured. Needs nothing but Python, so that run_gpu.py can use it anywhere.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
PREDICTIONS = RESULTS / "predictions.json"
LEGEND = "each figure: us now (last committed us, now/last; target or predicted us, now/that)"

Line = dict[str, Any]
Key = tuple[str, str, str]


def device_folder(device: str) -> str:
    """The folder of a device's results: h100 for "NVIDIA H100 80GB HBM3"."""
    model = re.search(r"\b[A-Z]{1,2}\d{1,4}[A-Z]?\b", device)
    return (model.group() if model else re.sub(r"\W+", "-", device)).lower()


def key(line: Line) -> Key:
    return line["op"], line["shape"], line["contender"]


@dataclass
class Baseline:
    """Microseconds by line: measured last on this device; and what they should be.

    The latter with what it is: a target, or predicted by the reasoning that made a change.
    """

    last: dict[Key, float] = field(default_factory=dict)
    aimed: dict[Key, tuple[str, float]] = field(default_factory=dict)

    def beside(self, line: Line) -> str:
        """`11.9 (11.8 1.01x; predicted 6.5 1.83x)`: a line's time and what is known of it."""
        now = line["microseconds"]
        known = []
        if last := self.last.get(key(line)):
            known.append(f"{short(last)} {now / last:.2f}x")
        if aimed := self.aimed.get(key(line)):
            kind, microseconds = aimed
            known.append(f"{kind} {short(microseconds)} {now / microseconds:.2f}x")
        return short(now) + (f" ({'; '.join(known)})" if known else "")

    def table(self, lines: Iterable[Line]) -> list[str]:
        """One row an op and shape, every contender beside what is known of it."""
        rows: dict[tuple[str, str], list[str]] = {}
        for line in lines:
            cells = rows.setdefault((line["op"], line["shape"]), [])
            cells.append(f"{line['contender']} {self.beside(line)}")
        return [f"{op} {shape}: {', '.join(cells)}" for (op, shape), cells in rows.items()]


def short(microseconds: float) -> str:
    """Three digits, and whole microseconds from 100 on."""
    if microseconds >= 99.95:
        return f"{microseconds:.0f}"
    return f"{microseconds:.1f}" if microseconds >= 9.995 else f"{microseconds:.2f}"


def read_lines(paths: Iterable[Path]) -> dict[Key, float]:
    """Microseconds of every line; of two files with the same line the first holds."""
    found: dict[Key, float] = {}
    for path in paths:
        for line in json.loads(path.read_text()).get("lines", []):
            found.setdefault(key(line), line["microseconds"])
    return found


def read_predictions(path: Path, folder: str) -> dict[Key, tuple[str, float]]:
    """What a device's lines should be; a prediction stands before a target of the same line."""
    lines = json.loads(path.read_text())["lines"] if path.is_file() else []
    lines.sort(key=lambda line: line["kind"] == "predicted")
    return {
        key(line): (line["kind"], line["microseconds"])
        for line in lines
        if line["device"] == folder
    }


@functools.cache
def of_device(device: str, results: Path = RESULTS) -> Baseline:
    """The baseline of a device, by the name that its driver gives it."""
    folder = device_folder(device)
    last = read_lines(sorted((results / folder).glob("*.json")))
    return Baseline(last, read_predictions(results / PREDICTIONS.name, folder))
