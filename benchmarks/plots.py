"""The plots of benchmarks/README.md, each from the JSON of one benchmark, by matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tables import Document, Row, nearest_peer, number, one_token, own_rows, peers_of

# The same figures give the same file: no date, no random ids.
matplotlib.rcParams.update(
    {
        "svg.hashsalt": "nowag",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "figure.facecolor": "white",
    }
)

# Told apart by people who are colour blind as well (Okabe and Ito); grey and dashed: peers.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
GREYS = ["#444444", "#999999", "#bbbbbb"]


def vq_gemv(document: Document) -> Figure:
    """Time against tokens, on the first shape."""
    shape = document["rows"][0]["shape"].partition(", ")[0]
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in document["rows"]:
        of, _, tokens = row["shape"].partition(", ")
        if of == shape:
            point = (int(tokens), 1e6 * row["timing"]["median"])
            lines.setdefault(row["contender"], []).append(point)
    figure, (axes,) = panels(1)
    peers = peers_of(document["rows"])
    colours, greys = iter(COLOURS), iter(GREYS)
    for name, points in lines.items():
        peer = name in peers
        axes.plot(
            *zip(*points, strict=True), label=name, color=next(greys if peer else colours),
            linestyle="--" if peer else "-", marker="o", markersize=3,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="µs", title=shape)
    ticks = sorted({tokens for points in lines.values() for tokens, _ in points} - {17})
    axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    legend_below(figure, axes)
    return figure


def sparse_gemv(document: Document) -> Figure:
    """How many times as fast as the dense product of the same dtype, at one token."""
    rows = one_token(own_rows(document["rows"]))
    figure, (axes,) = panels(1)
    bars(
        axes,
        [row["shape"] for row in rows],
        [f"{row['contender']} to {nearest_peer(row)}" for row in rows],
        [row["ratios"][nearest_peer(row)] for row in rows],
    )
    axes.set(ylabel="times as fast", title="one token")
    legend_below(figure, axes)
    return figure


def prune(document: Document) -> Figure:
    """How many times as fast as each peer of the selection."""
    rows = own_rows(document["rows"])
    peers = list(rows[0]["ratios"])
    rows = [row for row in rows if list(row["ratios"]) == peers]
    names = list(dict.fromkeys(row["contender"] for row in rows))
    figure, found = panels(len(names))
    for axes, name in zip(found, names, strict=True):
        mine = [row for row in rows if row["contender"] == name]
        cells = [(row, peer) for peer in peers for row in mine]
        bars(
            axes,
            [row["shape"] for row, _ in cells],
            [peer for _, peer in cells],
            [row["ratios"][peer] for row, peer in cells],
        )
        axes.set(yscale="log", ylabel="times as fast", title=name)
    legend_below(figure, found[0])
    return figure


def kmeans(document: Document) -> Figure:
    """What an iteration costs over the run of the first case, in each of its forms."""
    first = document["rows"][0]["case"]
    rows = [row for row in document["rows"] if row["case"] == first]
    figure, found = panels(len(rows))
    for axes, row in zip(found, rows, strict=True):
        nanos = [1e9 * seconds / row["points"] for seconds in row["iteration_seconds"]]
        axes.plot(range(1, len(nanos) + 1), nanos, color=COLOURS[0], label="an iteration")
        marks = {"faiss": "FAISS", "first iteration": "first iteration"}
        for (key, label), style in zip(marks.items(), ("--", ":"), strict=True):
            axes.axhline(1e3 * row["us_a_point"][key], color=GREYS[0], linestyle=style, label=label)
        axes.set(xlabel="iteration", ylabel="ns a point", title=f"d={row['d']}, K={row['entries']}")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    legend_below(figure, found[0])
    return figure


def decode(document: Document) -> Figure:
    """Milliseconds of a token by part, a panel a model."""
    shapes = list(dict.fromkeys(row["shape"] for row in document["rows"]))
    figure, found = panels(len(shapes))
    for axes, shape in zip(found, shapes, strict=True):
        rows = [row for row in document["rows"] if row["shape"] == shape and "ms_a_token" in row]
        stacked(axes, rows)
        axes.set(xlabel="ms a token", title=shape)
    legend_below(figure, found[0])
    return figure


def stacked(axes: Axes, rows: Sequence[Row]) -> None:
    names = [row["contender"] for row in rows][::-1]
    left = [0.0] * len(rows)
    for part, colour in zip(rows[0]["ms_a_token"], COLOURS, strict=False):
        values = [row["ms_a_token"][part] for row in rows][::-1]
        axes.barh(names, values, left=left, color=colour, label=part)
        left = [a + b for a, b in zip(left, values, strict=True)]
    for y, row in enumerate(rows[::-1]):
        axes.text(left[y], y, f" {number(row['tokens_per_second'])} tokens/s", va="center")
    axes.set_xlim(right=1.35 * max(left))


def panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(6.0 if count == 1 else 3.6 * count, 3.4), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def legend_below(figure: Figure, axes: Axes) -> None:
    """One legend for all panels, where it covers nothing."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)


def bars(axes: Axes, groups: Sequence[str], names: Sequence[str], values: Sequence[float]) -> None:
    """Grouped bars: entry i stands in groups[i], in the colour of names[i]; a line at 1."""
    places = {group: at for at, group in enumerate(dict.fromkeys(groups))}
    series = list(dict.fromkeys(names))
    width = 0.8 / len(series)
    for index, name in enumerate(series):
        own = [(places[g], v) for g, n, v in zip(groups, names, values, strict=True) if n == name]
        at = [place + (index - (len(series) - 1) / 2) * width for place, _ in own]
        axes.bar(at, [value for _, value in own], width, label=name, color=COLOURS[index])
    axes.axhline(1, color=GREYS[0], linestyle="--", linewidth=1)
    axes.set_xticks(list(places.values()), list(places))


PLOTS: dict[str, Callable[[Any], Figure]] = {
    "kmeans": kmeans,
    "prune": prune,
    "vq_gemv": vq_gemv,
    "sparse_gemv": sparse_gemv,
    "decode": decode,
}


def write(name: str, document: Document, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    PLOTS[name](document).savefig(directory / f"{name}.svg", metadata={"Date": None})
