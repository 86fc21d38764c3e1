"""The tables of benchmarks/README.md, each from the JSON document of one benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

Document = dict[str, Any]
Row = dict[str, Any]
# A document at the machine's best instruction set, and the same benchmark at AVX2 if it was run.
Render = Callable[[Document, Document | None], str]

MODEL_PEER = "dense bf16"


def number(value: float) -> str:
    """Three significant digits, fewer below 1, never an exponent; nothing for a NaN."""
    if value != value:
        return ""
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.1 else f"{value:.2g}"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def source(document: Document) -> str:
    """The machine, its ceilings and the command."""
    machine = document["machine"]
    parts = [
        f"{machine['cpu']}, {machine['threads']} threads, {machine['simd']}, "
        f"torch {machine['torch']}"
    ]
    if ceilings := document.get("ceilings"):
        parts.append(
            f"reads {number(ceilings['read_gb_s'])} GB/s, "
            f"GEMM {number(ceilings['gemm_gflop_s'])} GFLOP/s in fp32"
        )
    if command := document.get("command"):
        parts.append(f"`{command}`")
    return "; ".join(parts) + "."


# --- documents of harness.Report.add: vq_gemv, sparse_gemv, prune ---------------------------------


def peers_of(rows: Sequence[Row]) -> list[str]:
    """The contenders that others are compared with, in the order of the document."""
    return list(dict.fromkeys(peer for row in rows for peer in row.get("ratios", ())))


def own_rows(rows: Sequence[Row]) -> list[Row]:
    peers = peers_of(rows)
    return [row for row in rows if row["contender"] not in peers]


def nearest_peer(row: Row) -> str:
    """The peer of the same dtype, else the first."""
    dtype = row["contender"].rpartition(" ")[2]
    return next((peer for peer in row["ratios"] if peer.endswith(dtype)), next(iter(row["ratios"])))


def spread(timing: dict[str, float]) -> str:
    """Half of the middle 80 %, as a share of the median."""
    return f"±{50 * (timing['p90'] - timing['p10']) / timing['median']:.0f} %"


def rate(row: Row) -> str:
    """What is compared with the ceiling, a second."""
    if row["ceiling"] == "GEMM rate":
        return f"{number(row['flops'] / row['timing']['median'] / 1e9)} GFLOP/s"
    return f"{number(row['bytes'] / row['timing']['median'] / 1e9)} GB/s"


def at_avx2(row: Row, avx2: Document | None) -> str:
    """Median and ratio to the nearest peer in the run at AVX2."""
    for other in avx2["rows"] if avx2 else ():
        if (other["shape"], other["contender"]) == (row["shape"], row["contender"]):
            peer = nearest_peer(other)
            micros = number(1e6 * other["timing"]["median"])
            return f"{micros} µs, {number(other['ratios'][peer])}x {peer}"
    return ""


def timings(rows: Sequence[Row], avx2: Document | None) -> str:
    """One line a contender of ours, with all that the harness knows."""
    peers = peers_of(rows)
    header = ["shape", "", "µs", "spread", "rate", "of ceiling", *(f"x {peer}" for peer in peers)]
    lines = []
    for row in rows:
        ratios = [number(row["ratios"][peer]) if peer in row["ratios"] else "" for peer in peers]
        ceiling = f"{row['ceiling_percent']:.0f} % of {row['ceiling']}"
        lines.append(
            [row["shape"], row["contender"], number(1e6 * row["timing"]["median"]),
             spread(row["timing"]), rate(row), ceiling, *ratios]
            + ([at_avx2(row, avx2)] if avx2 else [])
        )  # fmt: skip
    return table(header + (["at AVX2"] if avx2 else []), lines)


def one_token(rows: Sequence[Row]) -> list[Row]:
    """The rows of one token, their shape without it."""
    found = []
    for row in rows:
        shape, _, tokens = row["shape"].partition(", ")
        if tokens == "1":
            found.append({**row, "shape": shape})
    return found


def without_tokens(document: Document | None) -> Document | None:
    return document and {**document, "rows": one_token(document["rows"])}


def by_tokens(rows: Sequence[Row]) -> str:
    """One line a shape and number of tokens, one column a contender."""
    names = list(dict.fromkeys(row["contender"] for row in rows))
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        peer = nearest_peer(row)
        micros = number(1e6 * row["timing"]["median"])
        lines.setdefault(row["shape"], {})[row["contender"]] = (
            f"{micros} µs, {number(row['ratios'][peer])}x"
        )
    cells = [[shape, *(found.get(name, "") for name in names)] for shape, found in lines.items()]
    heads = [f"{name} (x {nearest_peer(row)})" for name, row in _first_rows(rows, names)]
    return table(["shape, tokens", *heads], cells)


def _first_rows(rows: Sequence[Row], names: Sequence[str]) -> list[tuple[str, Row]]:
    return [(name, next(row for row in rows if row["contender"] == name)) for name in names]


def gemv(document: Document, avx2: Document | None) -> str:
    own = own_rows(document["rows"])
    few = without_tokens(avx2)
    parts = ["One token:", timings(one_token(own), few)]
    more = [row for row in own if not row["shape"].endswith(", 1")]
    if more:
        parts += ["More tokens, and the ratio to the dense product:", by_tokens(more)]
    return "\n\n".join(parts)


def prune(document: Document, avx2: Document | None) -> str:
    """Tables of the rows with the same peers: selection, and the whole way."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in own_rows(document["rows"]):
        groups.setdefault(tuple(row["ratios"]), []).append(row)
    return "\n\n".join(timings(rows, avx2) for rows in groups.values())


# --- documents with rows of their own -------------------------------------------------------------


def kmeans(document: Document, avx2: Document | None) -> str:
    header = [
        "", "d, K", "iterations 2-21", "22 on", "first", "FAISS", "torch", "every entry",
        "x FAISS, 2-21", "x FAISS, whole run", "x torch", "x every entry, whole run",
        "seeding / assignment", "sums and update / FAISS",
    ]  # fmt: skip
    times = ["iterations 2-21", "iterations 22 on", "first iteration", "faiss", "torch",
             "every entry"]  # fmt: skip
    ratios = ["faiss / iterations 2-21", "faiss / mean of the run", "torch / iterations 2-21",
              "every entry / mean of the run"]  # fmt: skip
    others = {(row["case"], row["d"]): row for row in avx2["rows"]} if avx2 else {}
    lines = []
    for row in document["rows"]:
        # A run of 21 iterations has no later ones.
        nanos = {name: 1e3 * us or float("nan") for name, us in row["us_a_point"].items()}
        line = [row["case"], f"{row['d']}, {row['entries']}", *(number(nanos[n]) for n in times)]
        line += [number(row["ratios"][name]) for name in ratios]
        line += [
            number(row["seeding_over_assignment"]), f"{row['update_over_brute_force']:.1%}"
        ]  # fmt: skip
        if avx2:
            other = others.get((row["case"], row["d"]))
            line.append(_kmeans_at_avx2(other) if other else "")
        lines.append(line)
    text = "Nanoseconds a point:"
    return f"{text}\n\n{table(header + (['at AVX2, 2-21'] if avx2 else []), lines)}"


def _kmeans_at_avx2(row: Row) -> str:
    nanos = number(1e3 * row["us_a_point"]["iterations 2-21"])
    return f"{nanos}, {number(row['ratios']['faiss / iterations 2-21'])}x FAISS"


def kmeans_seed(document: Document, _: Document | None) -> str:
    cases: dict[tuple[str, int, int], dict[str, Row]] = {}
    for row in document["rows"]:
        case = (row["layer"], row["d"], row["entries"])
        cases.setdefault(case, {})[row["seeding"]] = row
    names = list(dict.fromkeys(row["seeding"] for row in document["rows"]))
    lines = []
    for (layer, d, entries), found in cases.items():
        line = [layer, f"{d}, {entries}"]
        for key in ("objective", "objective_lloyd"):
            line += [_mean_and_range(found[name][key]) for name in names]
        line += [number(found[name]["assignments"]) for name in names]
        lines.append(line)
    header = ["layer", "d, K"]
    for what in ("", "Lloyd alone, ", "cost in assignments, "):
        header += [f"{what}{name}" for name in names]
    text = "Relative objective after 100 iterations, mean of three seeds ± half their range:"
    return f"{text}\n\n{table(header, lines)}"


def _mean_and_range(values: Sequence[float]) -> str:
    half = (max(values) - min(values)) / 2
    return f"{statistics.fmean(values):.5f} ±{half:.5f}"


def layers(document: Document, _: Document | None) -> str:
    lines = []
    for row in document["layers"]:
        ratios = [row[f"{peer}_seconds"] / row["seconds"] for peer in ("torch", "reference.py")]
        lines.append(
            [row["layer"].removeprefix("model.layers."), f"{row['relative_objective']:.5f}",
             number(row["seconds"]), *map(number, ratios)]
        )  # fmt: skip
    header = [
        "layer",
        "relative objective",
        "seconds",
        "x torch's expression",
        "x the oracle",
    ]
    equal, of = document["masks"]
    text = f"Pruning masks equal to a stable sort's: {equal} of {of} linears."
    return f"{table(header, lines)}\n\n{text}"


def model(document: Document, _: Document | None) -> str:
    header = ["", "bits/weight, all in", "mean relative objective", "perplexity", "KL to dense",
              "seconds to compress", "tokens/s", f"x {MODEL_PEER}"]  # fmt: skip
    columns = {
        "bits_per_weight": "{:.2f}", "mean_relative_objective": "{:.4f}", "perplexity": "{:.2f}",
        "kl_to_dense": "{:.2f}", "compress_seconds": "{:.1f}", "tokens_per_second": "{:.1f}",
    }  # fmt: skip
    speeds = {row["name"]: row["tokens_per_second"] for row in document["rows"]}
    lines = []
    for row in document["rows"]:
        cells = [shape.format(row[key]) if key in row else "" for key, shape in columns.items()]
        lines.append([row["name"], *cells, number(row["tokens_per_second"] / speeds[MODEL_PEER])])
    return f"{document['model']}:\n\n{table(header, lines)}"


def decode(document: Document, _: Document | None) -> str:
    rows = document["rows"]
    peers = peers_of(rows)
    parts = list(rows[0]["ms_a_token"])
    prompts = list(rows[0].get("prompt_tokens_per_second", {}))
    header = ["model", "", "MiB of weights", "tokens/s", "range of rounds",
              *(f"of a prompt of {length}" for length in prompts), "of read bandwidth",
              *(f"x {peer}" for peer in peers), *(f"{part}, ms" for part in parts)]  # fmt: skip
    lines = []
    for row in rows:
        rounds = sorted(row["tokens_per_second_rounds"])
        token = 1e3 / row["tokens_per_second"]
        half = 50 * (rounds[-1] - rounds[0]) / row["tokens_per_second"]
        cells = [
            row["shape"], row["contender"], f"{row['weight_bytes'] / 2**20:.0f}",
            number(row["tokens_per_second"]), f"±{half:.0f} %",
            *(number(row["prompt_tokens_per_second"][length]) for length in prompts),
        ]  # fmt: skip
        if "ms_a_token" in row:
            cells += [
                f"{row['read_percent']:.0f} %",
                *(number(row["ratios"].get(peer, float("nan"))) for peer in peers),
                *(f"{number(ms)} ({ms / token:.0%})" for ms in row["ms_a_token"].values()),
            ]
        lines.append(cells + [""] * (len(header) - len(cells)))
    packed = [row for row in rows if "us_a_linear" in row]
    text = "What one packed linear takes at one token, µs:"
    columns = list(packed[0]["us_a_linear"])
    each = [
        [row["shape"], row["contender"], str(row["linears"])]
        + [number(us) for us in row["us_a_linear"].values()]
        for row in packed
    ]
    linears = table(["model", "", "linears", *columns], each)
    return f"{table(header, lines)}\n\n{text}\n\n{linears}"


TABLES: dict[str, Render] = {
    "kmeans": kmeans,
    "kmeans_seed": kmeans_seed,
    "prune": prune,
    "vq_gemv": gemv,
    "sparse_gemv": gemv,
    "layers": layers,
    "model": model,
    "decode": decode,
}
