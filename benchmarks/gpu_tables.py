"""The CUDA tables of the READMEs, each from the documents of one device (results/h100/*.json).

A document's lines are those of gpu.Line: op, shape, contender, microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import baseline
from tables import Document, Row, number, table

DENSE = "cuBLAS bf16"
SHORT_SHAPES = ("4096x4096", "11008x4096", "28672x8192")
SHORT = (DENSE, "torch int4", "aqlm 2x8", "vq d=6", "vq d=4")
COUNTERS = ("grid", "registers", "warps %", "issue %", "l1 %", "dram %", "tensor %")
WAITS = "waits "
MOST_WAITS = 3

Documents = Mapping[str, Document]


def source(document: Document) -> str:
    """The device, versions, ceiling and the command; the rest of "machine" stays in the JSON."""
    machine = document["machine"]
    parts = [f"{machine['device']}, torch {machine['torch']}, commit {machine['commit'][:12]}"]
    if bandwidth := document.get("copy_bandwidth"):
        parts.append(f"copies at {number(bandwidth / 1e12)} TB/s")
    parts += [document["remark"]] if "remark" in document else []
    return "; ".join([*parts, f"`{document['command']}`"]) + "."


def cell(line: Row) -> str:
    """The time, and how many times as long the peer takes."""
    micros = number(line["microseconds"])
    own = line["contender"] == line["peer"] or not line["times_peer"]
    return micros if own else f"{micros}, {number(line['times_peer'])}x"


def pivot(lines: Sequence[Row], first: str) -> str:
    """One row a shape, one column a contender."""
    names = list(dict.fromkeys(line["contender"] for line in lines))
    rows: dict[str, dict[str, str]] = {}
    for line in lines:
        rows.setdefault(line["shape"], {})[line["contender"]] = cell(line)
    cells = [[shape, *(row.get(name, "") for name in names)] for shape, row in rows.items()]
    return table([first, *names], cells)


def of_op(document: Document, op: str) -> list[Row]:
    return [line for line in document["lines"] if line["op"] == op]


def gemv(documents: Documents) -> str:
    """Ours beside torch's, and beside published kernels if they were run apart."""
    parts = []
    for document in documents.values():
        parts += [source(document), pivot(of_op(document, "gemv"), f"µs (x {DENSE})")]
    return "\n\n".join(parts)


def many(documents: Documents) -> str:
    document = documents["many"]
    graph, eager = of_op(document, "linear"), of_op(document, "linear, eager")
    host = ", ".join(
        f"{line['contender']} {number(line['microseconds'])} µs" for line in of_op(document, "host")
    )
    return "\n\n".join(
        [source(document), "Under a graph:", pivot(graph, f"µs (x {DENSE})"), "Eager:",
         pivot(eager, f"µs (x {DENSE})"),
         f"The host's time of an eager call at one token: {host}."]
    )  # fmt: skip


def model(documents: Documents) -> str:
    """The linears of one block, and a whole model in milliseconds."""
    parts = []
    if block := documents.get("block"):
        parts += [source(block), pivot(of_op(block, "block"), f"µs (x {DENSE})")]
    if whole := documents.get("model"):
        lines = [{**line, "microseconds": line["microseconds"] / 1e3} for line in whole["lines"]]
        held = {
            line["contender"]: line["notes"]["gib_held"]
            for line in lines
            if "gib_held" in line["notes"]
        }
        text = ", ".join(f"{name} {number(gib)} GiB" for name, gib in held.items())
        parts += [source(whole), pivot(lines, "ms (x dense)"), f"Memory held: {text}."]
    return "\n\n".join(parts)


def compress(documents: Documents) -> str:
    document = documents["compress"]
    lines = [
        [line["op"], line["shape"], line["contender"], number(line["microseconds"]),
         f"{line['percent_of_copy']:.0f} %" if line["bytes"] else "",
         f"{number(line['times_peer'])}x {line['peer']}" if line["times_peer"] else "",
         ", ".join(f"{name} {number(value)}" for name, value in line["notes"].items())]
        for line in document["lines"]
    ]  # fmt: skip
    header = ["", "shape", "", "µs", "of copy bandwidth", "x peer", "notes"]
    return f"{source(document)}\n\n{table(header, lines)}"


def timeline(documents: Documents) -> str:
    document = documents["timeline"]
    lines = []
    for line in document["lines"]:
        kernels = document["kernels"][line["shape"]]
        _, longest, name = max(kernels, key=lambda kernel: kernel[1])
        lines.append(
            [line["shape"], number(line["microseconds"]), str(line["notes"]["kernels"]),
             number(line["notes"]["sum"]), f"{name}, {number(longest)}"]
        )  # fmt: skip
    header = ["call", "first to last, µs", "kernels", "their sum, µs", "the longest, µs"]
    return f"{source(document)}\n\n{table(header, lines)}"


def counters(documents: Documents) -> str:
    document = documents["counters"]
    lines = []
    for line in document["lines"]:
        notes = line["notes"]
        waits = [(notes[name], name.removeprefix(WAITS)) for name in notes if WAITS in name]
        most = ", ".join(f"{name} {number(n)}" for n, name in sorted(waits)[: -MOST_WAITS - 1 : -1])
        lines.append(
            [line["shape"], line["contender"], number(line["microseconds"]),
             *(number(notes[name]) if name in notes else "" for name in COUNTERS), most]
        )  # fmt: skip
    header = ["call", "kernel", "µs", *COUNTERS, "warps waiting an issue, most"]
    return f"{source(document)}\n\n{table(header, lines)}"


def units(documents: Documents) -> str:
    document = documents["units"]
    rates = [[rate["name"], number(rate["value"]), rate["unit"]] for rate in document["rates"]]
    times = [[line["shape"], number(line["microseconds"]), "µs"] for line in document["lines"]]
    return f"{source(document)}\n\n{table(['unit', 'rate or time', ''], [*rates, *times])}"


def targets(documents: Documents) -> str:
    """All targets of the device beside what was measured last."""
    measured = {
        baseline.key(line): line["microseconds"]
        for document in documents.values()
        for line in document["lines"]
    }
    device = next(iter(documents.values()))["machine"]["device"]
    aims = baseline.read_predictions(baseline.PREDICTIONS, baseline.device_folder(device))
    lines = []
    for key, (kind, aim) in aims.items():
        if key in measured:
            op, shape, contender = key
            times = [number(measured[key]), f"{number(aim)} ({kind})", number(measured[key] / aim)]
            lines.append([f"{op} {shape}", contender, *times])
    header = ["", "", "measured, µs", "to be, µs", "measured / to be"]
    return table(header, lines) if lines else ""


def predicted(documents: Documents) -> str:
    """predict.py's three tables: launches, chains, and what has not been measured."""
    document = documents["predicted"]
    errors, within = document["errors"], document["range"]
    launches = [
        [row["shape"], row["contender"],
         *(number(row[name]) for name in ("measured", "modelled", "ratio", "left_out")),
         row["bound"]]
        for row in document["launches"]
    ]  # fmt: skip
    chains = [
        [row["shape"], row["contender"],
         *(number(row[name]) for name in ("measured", "modelled", "ratio"))]
        for row in document["chains"]
    ]  # fmt: skip
    expected = [
        [f"{row['op']} {row['shape']}", row["contender"], number(row["modelled"]),
         f"{number(row['low'])} to {number(row['high'])}",
         number(row["target"]) if row["target"] else "", row["counts"]]
        for row in document["predictions"]
    ]  # fmt: skip
    off = {
        name: f"median {100 * error['median']:.0f} %, worst {100 * error['worst']:.0f} %"
        for name, error in errors.items()
    }
    header = ["", "", "measured, µs", "modelled", "ratio"]
    return "\n\n".join(
        [f"`{document['command']}`; fitted: latency {document['fitted']['latency']} µs, "
         f"p {document['fitted']['norm']:g}.",
         f"Launches under ncu: off by {off['launches']}; by constants fitted to all other kernels: "
         f"{off['launches_left_out']}.",
         table([*header, "left out", "mostly"], launches),
         "Chains in a graph, at the commit that was measured; no constant fitted to them: off by "
         f"{off['chains']}.",
         table(header, chains),
         f"**Predictions** for the kernels as they are now, within a factor of {number(within)} "
         "as nine of ten of those above:",
         table(["", "", "predicted, µs", "range", "target", "counts"], expected)]
    )  # fmt: skip


def short(documents: Documents) -> str:
    """One token at three shapes, all from one run."""
    for document in documents.values():
        if {"torch int4", "vq d=6"} <= {line["contender"] for line in document["lines"]}:
            break
    else:
        return ""
    lines = [
        {**line, "shape": shape}
        for shape in SHORT_SHAPES
        for name in SHORT
        for line in document["lines"]
        if (line["shape"], line["contender"]) == (f"{shape} tokens=1", name)
    ]
    return f"{source(document)}\n\n{pivot(lines, 'µs')}"


# Section of a README -> the documents that it is made of, those that are there, and how.
SECTIONS: dict[str, tuple[Sequence[str], Callable[[Documents], str]]] = {
    "gpu_short": (("gemv", "peers"), short),
    "gpu_gemv": (("gemv", "peers"), gemv),
    "gpu_many": (("many",), many),
    "gpu_model": (("block", "model"), model),
    "gpu_compress": (("compress",), compress),
    "gpu_timeline": (("timeline",), timeline),
    "gpu_counters": (("counters",), counters),
    "gpu_units": (("units",), units),
    "gpu_predicted": (("predicted",), predicted),
    "gpu_targets": (("gemv", "block", "many", "compress", "model"), targets),
}


def section(name: str, results: Path, load: Callable[[Path], Document | None]) -> str | None:
    """One section from every device's folder in results; None where none has its documents."""
    names, write = SECTIONS[name]
    parts = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        found = {name: document for name in names if (document := load(folder / f"{name}.json"))}
        if found and all("device" in document["machine"] for document in found.values()):
            parts.append(write(found))
    return "\n\n".join(filter(None, parts)) or None
