"""What the CUDA kernels should take on an H100, by gpu_model.py, and how far off the model is.

    python benchmarks/predict.py                          # three tables
    python benchmarks/predict.py --json benchmarks/results/h100/predicted.json

1. The 20 launches of counters.json, with ncu's counts: given these, does the model get the time?
2. Lines of gemv.json and block.json, to which no constant was fitted, by the kernels of 6cce1a7.
3. The kernels as they are now: predictions, not measurements.

What counts as a round, as a wait or as early was decided with (1) and (2) in sight, so that their
errors flatter the model. Kernels that ncu has not counted can be further off.

A new kernel: a function in gpu_launches.py, and its lines in `present`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import baseline
import gpu_launches as kernels
import gpu_tables
from gpu_model import Device, Fit, Launch, alone, bound, fitted, in_graph, median_off, off

RESULTS = baseline.RESULTS / "h100"
# Bound by fences, 209 warps waiting for them an issue, of which the model knows nothing.
NOT_FITTED = ("prune_sample",)
# Of the errors of (1) and (2), this share lies within the range of a prediction.
WITHIN = 0.9
SHAPES = ((4096, 4096), (11008, 4096), (28672, 8192))
MOST_TILE_BYTES = 64 << 20  # of vq_dequantize, from 65 tokens on

Row = dict[str, Any]
Shape = tuple[int, int]
Group = tuple[Shape, int]

BLOCK = "Llama-2-7B, 1 token"
SMALL, UP, DOWN = (4096, 4096), (11008, 4096), (4096, 11008)
EACH_ALONE: list[Group] = [(SMALL, 1)] * 4 + [(UP, 1)] * 2 + [(DOWN, 1)]
SIBLINGS: list[Group] = [(SMALL, 3), (SMALL, 1), (UP, 2), (DOWN, 1)]


def read(name: str) -> list[Row]:
    return list(json.loads((RESULTS / f"{name}.json").read_text())["lines"])


def calibrated() -> tuple[Fit, list[Launch], list[Row]]:
    lines = read("counters")
    launches = [
        kernels.measured(line, known) for line, known in zip(lines, kernels.MEASURED, strict=True)
    ]
    chosen = [i for i, launch in enumerate(launches) if launch.name not in NOT_FITTED]
    fit = fitted([launches[i] for i in chosen], [lines[i]["microseconds"] for i in chosen])
    return fit, launches, lines


def launches_table(fit: Fit, launches: Sequence[Launch], lines: Sequence[Row]) -> list[Row]:
    left_out = iter(fit.left_out)
    rows = []
    for launch, line in zip(launches, lines, strict=True):
        modelled = alone(launch, fit.device)
        ratio = modelled / line["microseconds"]
        others = ratio if launch.name in NOT_FITTED else next(left_out)
        rows.append({
            "shape": line["shape"], "contender": launch.name, "measured": line["microseconds"],
            "modelled": modelled, "ratio": ratio, "left_out": others,
            "bound": bound(launch, fit.device),
        })  # fmt: skip
    return rows


def as_measured(shape: Shape, tokens: int) -> dict[str, list[Launch]]:
    """By contender, the chain of 6cce1a7; the two-token lookup of then is not described."""
    chains = {"vq d=4": kernels.multiply(*shape, 4, tokens)}
    if tokens == 1:
        chains["vq d=6"] = kernels.look_up(*shape, stages=2)
        chains["sparse 50 %"] = kernels.sparse(*shape)
    elif tokens > 2:
        chains["vq d=6"] = kernels.multiply(*shape, 6, tokens)
    return chains


def block(d: int, groups: Sequence[Group], device: Device, measured: bool = False) -> float:
    """The linears of a Llama-2-7B block at one token, a chain for each group of siblings."""

    def chain(shape: Shape, members: int) -> list[Launch]:
        if d == 6:
            return kernels.look_up(*shape, members, 2 if measured else kernels.LUT_STAGES)
        product = kernels.multiply if measured else kernels.in_clusters
        return product(*shape, d, 1, members)

    return sum(in_graph(chain(shape, count), device) for shape, count in groups)


def chains_table(device: Device) -> list[Row]:
    times = {(line["shape"], line["contender"]): line["microseconds"] for line in read("gemv")}
    rows = []
    for shape in SHAPES:
        for tokens in (1, 2, 4, 8, 16):
            for name, chain in as_measured(shape, tokens).items():
                line = f"{shape[0]}x{shape[1]} tokens={tokens}"
                modelled = in_graph(chain, device)
                rows.append({
                    "shape": line, "contender": name, "measured": times[line, name],
                    "modelled": modelled, "ratio": modelled / times[line, name],
                })  # fmt: skip
    times = {(line["shape"], line["contender"]): line["microseconds"] for line in read("block")}
    for d in (6, 4):
        measured, modelled = times[BLOCK, f"vq d={d}"], block(d, EACH_ALONE, device, measured=True)
        rows.append({
            "shape": BLOCK, "contender": f"vq d={d}", "measured": measured, "modelled": modelled,
            "ratio": modelled / measured,
        })  # fmt: skip
    return rows


def many(shape: Shape, d: int, tokens: int, dense: float, device: Device) -> float:
    """From 17 tokens on: straight from codes, in two runs from 65 on; then tiles and cuBLAS."""
    if tokens <= 128:
        runs = math.ceil(tokens / 64)
        return runs * in_graph(kernels.batch(*shape, d, min(tokens, 64)), device)
    tiles = math.ceil(2 * shape[0] * shape[1] / MOST_TILE_BYTES)
    part = (math.ceil(shape[0] / tiles), shape[1])
    expanded = in_graph([kernels.dequantize(*part, d)], device)
    return tiles * expanded + (tiles - 1) * device.edge + dense


def present(device: Device) -> list[tuple[str, str, str, float, str]]:
    """(op, shape, contender, microseconds, where the counts come from) of every line to predict."""
    counted, arithmetic = "ncu", "arithmetic"
    found = []
    for shape in SHAPES:
        name = f"{shape[0]}x{shape[1]} tokens="
        one = in_graph(kernels.look_up(*shape), device)
        found += [
            ("gemv", f"{name}1", "vq d=6", one, counted),
            ("gemv", f"{name}2", "vq d=6", in_graph(kernels.look_up(*shape, tokens=2), device),
             arithmetic),
            ("gemv", f"{name}1", "vq d=4", in_graph(kernels.in_clusters(*shape, 4, 1), device),
             arithmetic),
            ("gemv", f"{name}8", "vq d=6", in_graph(kernels.in_clusters(*shape, 6, 8), device),
             arithmetic),
            ("gemv", f"{name}1", "sparse 50 %", in_graph(kernels.sparse(*shape), device), counted),
        ]  # fmt: skip
    dense = {
        line["shape"]: line["microseconds"]
        for line in read("many")
        if (line["op"], line["contender"]) == ("linear", "cuBLAS bf16")
    }
    for shape in SHAPES[:2]:
        for d in (6, 4):
            for tokens in (17, 64, 128, 512, 2048):
                line = f"{shape[0]}x{shape[1]} tokens={tokens}"
                time = many(shape, d, tokens, dense[line], device)
                found.append(("linear", line, f"vq d={d}", time, arithmetic))
    for d in (6, 4):
        for name, groups in ((f"vq d={d}", EACH_ALONE), (f"vq d={d}, siblings", SIBLINGS)):
            time = block(d, groups, device)
            found.append(("block", BLOCK, name, time, counted))
    vq6, square = "4096x4096 d=6 K=4096", "4096x4096"
    update = 10.0  # kmeans_move and kmeans_add_terms, timeline.json and kmeans.cuh
    assign = in_graph([kernels.assign()], device) + update + 2 * device.edge
    # A memset goes before the three kernels.
    select = device.edge + sum(in_graph([launch], device) for launch in kernels.select())
    found += [
        ("assign+update", vq6, "mean of 20", assign, arithmetic),
        ("seed", vq6, "k-means++", in_graph([kernels.seed()], device), arithmetic),
        ("select", square, "50 %", select, arithmetic),
    ]
    return found


def predictions_table(device: Device, factor: float) -> list[Row]:
    aims = {
        baseline.key(line): line["microseconds"]
        for line in json.loads(baseline.PREDICTIONS.read_text())["lines"]
        if (line["device"], line["kind"]) == ("h100", "target")
    }
    return [
        {
            "op": op, "shape": shape, "contender": contender, "modelled": time,
            "low": time / factor, "high": time * factor, "target": aims.get((op, shape, contender)),
            "counts": counts,
        }
        for op, shape, contender, time, counts in present(device)
    ]  # fmt: skip


def rounded(value: Any) -> Any:
    """Floats to what a table shows and a bit more: the same on every machine."""
    if isinstance(value, dict):
        return {name: rounded(of_name) for name, of_name in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def document() -> dict[str, Any]:
    fit, launches, lines = calibrated()
    one = launches_table(fit, launches, lines)
    chains = chains_table(fit.device)
    errors = {
        "launches": [row["ratio"] for row in one],
        "launches_left_out": [row["left_out"] for row in one],
        "chains": [row["ratio"] for row in chains],
    }
    both = sorted(map(off, errors["launches"] + errors["chains"]))
    within = both[math.ceil(WITHIN * len(both)) - 1]
    return rounded({
        "command": "python benchmarks/predict.py",
        "machine": json.loads((RESULTS / "counters.json").read_text())["machine"],
        "fitted": {"latency": fit.device.latency, "norm": fit.device.norm},
        "errors": {
            name: {"median": median_off(ratios), "worst": max(map(off, ratios))}
            for name, ratios in errors.items()
        },
        "range": 1 + within,
        "launches": one, "chains": chains,
        "predictions": predictions_table(fit.device, 1 + within),
    })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = document()
    print(gpu_tables.predicted({"predicted": found}))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
