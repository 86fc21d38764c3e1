"""Rates of an SM's units, and what launches, barriers and cold reads cost (units.cu).

python benchmarks/bench_gpu_units.py --json out.json
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import gpu
import torch

SOURCE = Path(__file__).with_name("units.cu")
MICROSECONDS = "us"


def parse(text: str) -> tuple[list[dict[str, Any]], list[gpu.Line]]:
    """Rates, and times as lines, of what units.cu prints."""
    rates, times = [], []
    for row in text.splitlines():
        name, value, unit = row.split("\t")
        if unit == MICROSECONDS:
            times.append(gpu.Line("unit", name, "units.cu", float(value), 0, 0))
        else:
            rates.append({"name": name, "value": float(value), "unit": unit})
            print(f"{name:44} {float(value):8.4g} {unit}")
    return rates, times


def build(program: Path) -> None:
    major, minor = torch.cuda.get_device_capability()
    target = f"-arch=sm_{major}{minor}"
    subprocess.run(["nvcc", "-O3", "-std=c++17", target, str(SOURCE), "-o", program], check=True)


def main() -> None:
    options = gpu.arguments(__doc__ or "")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "units"
        build(program)
        result = subprocess.run([program], stdout=subprocess.PIPE, text=True)
    rates, times = parse(result.stdout)
    gpu.print_lines(times)
    gpu.write(options.json, times, rates=rates)
    if result.returncode:
        raise SystemExit(f"units.cu ended with status {result.returncode}")


if __name__ == "__main__":
    main()
