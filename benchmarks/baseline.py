"""What a measured line is held against: the last committed result of its device, a prediction.

A line of a GPU benchmark (gpu.Line) is named by its op, shape and contender. `results/<device>/`
holds the committed documents of one device, `results/predictions.json` what was predicted before
it was measured. Needs nothing but Python, so that run_gpu.py can use it anywhere.
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
LEGEND = "each figure: us now (last committed us, now/last; predicted us, now/predicted)"

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
    """Microseconds by line: measured last on this device, and predicted for it."""

    last: dict[Key, float] = field(default_factory=dict)
    predicted: dict[Key, float] = field(default_factory=dict)

    def beside(self, line: Line) -> str:
        """`11.9 (11.8 1.01x; predicted 6.5 1.83x)`: a line's time and what is known of it."""
        now = line["microseconds"]
        known = []
        if last := self.last.get(key(line)):
            known.append(f"{short(last)} {now / last:.2f}x")
        if predicted := self.predicted.get(key(line)):
            known.append(f"predicted {short(predicted)} {now / predicted:.2f}x")
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


@functools.cache
def of_device(device: str, results: Path = RESULTS) -> Baseline:
    """The baseline of a device, by the name that its driver gives it."""
    folder = device_folder(device)
    predictions = results / PREDICTIONS.name
    predicted: dict[Key, float] = {}
    if predictions.is_file():
        lines = json.loads(predictions.read_text())["lines"]
        predicted = {key(e): e["microseconds"] for e in lines if e["device"] == folder}
    return Baseline(read_lines(sorted((results / folder).glob("*.json"))), predicted)
