"""The README's measured sections follow from the benchmarks' JSON, and from nothing else."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import render
from tables import TABLES, number

MACHINE = {"cpu": "a CPU", "threads": 2, "simd": "avx512", "torch": "2.13.0", "python": "3.11.7"}
COMMON = {
    "command": "python benchmarks/bench_x.py --seconds 1",
    "machine": MACHINE,
    "ceilings": {"read_gb_s": 50.0, "gemm_gflop_s": 200.0},
}


def timed(shape: str, contender: str, median: float, ratios: dict[str, float]) -> dict[str, Any]:
    timing = {"median": median, "p10": 0.9 * median, "p90": 1.1 * median, "calls": 9}
    return {
        "op": "x", "shape": shape, "contender": contender, "timing": timing, "bytes": 10**6,
        "flops": 0, "ceiling": "read bandwidth", "ceiling_percent": 20.0, "ratios": ratios,
        "notes": {},
    }  # fmt: skip


def gemv(own: str) -> dict[str, Any]:
    rows = []
    for tokens in (1, 2):
        shape = f"64x96, {tokens}"
        rows += [
            timed(shape, own, 1e-4 * tokens, {"dense fp32": 4.0, "dense bf16": 2.5 / tokens}),
            timed(shape, "dense fp32", 4e-4 * tokens, {"dense bf16": 0.5}),
            timed(shape, "dense bf16", 2e-4, {"dense fp32": 2.0}),
        ]
    return {**COMMON, "rows": rows}


def kmeans() -> dict[str, Any]:
    times = ["iterations 2-21", "iterations 22 on", "first iteration", "assignment from nothing",
             "faiss", "torch", "every entry"]  # fmt: skip
    row = {
        "case": "64x96", "d": 4, "entries": 256, "points": 1536, "relative_objective": 0.1,
        "iteration_seconds": [3e-4, 2e-4, 1e-4],
        "us_a_point": dict.fromkeys(times, 0.02),
        "ratios": {
            "faiss / iterations 2-21": 2.5, "torch / iterations 2-21": 20.0,
            "every entry / mean of the run": 0.9, "faiss / mean of the run": 3.0,
        },
        "seeding_over_assignment": 0.5, "update_over_brute_force": 0.02,
    }  # fmt: skip
    row["us_a_point"]["iterations 22 on"] = 0.0
    return {**COMMON, "rows": [row]}


def kmeans_seed() -> dict[str, Any]:
    rows = [
        {
            "layer": "q_proj", "d": 4, "entries": 256, "seeding": name, "seconds": 0.1,
            "assignments": 1.5, "objective": [0.1, 0.2, 0.3], "objective_lloyd": [0.2, 0.2, 0.2],
        }
        for name in ("kmeans++", "random")
    ]  # fmt: skip
    return {**COMMON, "rows": rows}


def decode() -> dict[str, Any]:
    dense = {
        "shape": "tiny", "contender": "dense bf16", "tokens_per_second": 10.0,
        "tokens_per_second_rounds": [9.0, 10.0, 11.0], "read_percent": 50.0,
        "ms_a_token": {"lm_head": 20.0, "linears": 70.0, "rest": 10.0}, "ratios": {},
        "weight_bytes": 3 << 20, "prompt_tokens_per_second": {"64": 80.0},
    }  # fmt: skip
    packed = {
        **dense, "contender": "VQ d=4 bf16", "ratios": {"dense bf16": 3.0}, "linears": 14,
        "us_a_linear": {"kernel": 50.0, "op dispatch": 6.0, "module": 3.0},
    }  # fmt: skip
    other = {
        "shape": "tiny", "contender": "llama.cpp Q4_0", "tokens_per_second": 40.0,
        "tokens_per_second_rounds": [39.0, 40.0, 41.0], "weight_bytes": 1 << 20,
        "prompt_tokens_per_second": {"64": 90.0},
    }  # fmt: skip
    return {**COMMON, "rows": [dense, packed, other]}


def model() -> dict[str, Any]:
    rows = [
        {"name": "dense fp32", "perplexity": 22.55, "tokens_per_second": 12.0},
        {"name": "dense bf16", "tokens_per_second": 10.0},
        {"name": "vq", "perplexity": 42.69, "tokens_per_second": 30.0, "bits_per_weight": 2.08},
    ]
    return {**COMMON, "model": "a model", "rows": rows}


def layers() -> dict[str, Any]:
    row = {
        "layer": "model.layers.0.q_proj", "relative_objective": 0.04, "seconds": 2.0,
        "torch_seconds": 300.0, "reference.py_seconds": 900.0,
    }  # fmt: skip
    return {**COMMON, "layers": [row], "masks": [7, 7]}


def prune() -> dict[str, Any]:
    rows = [
        timed("64x96", "prune_select 50 %", 1e-4, {"torch.argsort": 300.0}),
        timed("64x96", "torch.argsort", 3e-2, {}),
        timed("64x96", "fp32 W to 2:4 bitmap", 2e-4, {"torch copy_": 0.5}),
        timed("64x96", "torch copy_", 1e-4, {}),
    ]
    return {**COMMON, "rows": rows}


DOCUMENTS = {
    "kmeans": kmeans(), "kmeans_seed": kmeans_seed(), "prune": prune(),
    "vq_gemv": gemv("d=4 bf16"), "sparse_gemv": gemv("2:4 fp32"), "layers": layers(),
    "model": model(), "decode": decode(),
}  # fmt: skip


def put(directory: Path, name: str, document: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.json").write_text(json.dumps(document))


def readme(*names: str) -> str:
    sections = [f"<!-- measured: {name} -->\nold {name}\n<!-- end -->\n" for name in names]
    return "before\n" + "between\n".join(sections) + "after\n"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for name, document in DOCUMENTS.items():
        put(tmp_path, name, document)
    return tmp_path


def test_every_table_has_as_many_cells_in_each_line(results: Path) -> None:
    assert set(DOCUMENTS) == set(TABLES)
    text = render.render(readme(*TABLES), results)
    assert "old" not in text
    for block in text.split("\n\n"):
        cells = {line.count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(cells) <= 1, block
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert render.render(text, results) == text


def test_a_row_says_its_median_spread_ceiling_and_ratios(results: Path) -> None:
    slower = copy.deepcopy(DOCUMENTS["vq_gemv"])
    slower["rows"][0]["timing"]["median"] = 5e-4
    slower["rows"][0]["ratios"]["dense bf16"] = 0.4
    put(results / "avx2", "vq_gemv", slower)
    text = render.render(readme("vq_gemv"), results)
    want = ["64x96", "d=4 bf16", "100", "±10 %", "10.0 GB/s", "20 % of read bandwidth"]
    want += ["4.00", "2.50", "500 µs, 0.40x dense bf16"]
    assert f"| {' | '.join(want)} |" in text
    assert "| 64x96, 2 | 200 µs, 1.25x |" in text
    assert "a CPU, 2 threads, avx512, torch 2.13.0" in text
    assert "`python benchmarks/bench_x.py --seconds 1`" in text


def test_a_section_without_figures_stays(results: Path) -> None:
    (results / "kmeans.json").unlink()
    text = render.render(readme("kmeans", "prune"), results)
    assert "old kmeans" in text
    assert "old prune" not in text


def test_a_section_of_no_benchmark_is_refused(results: Path) -> None:
    with pytest.raises(SystemExit, match="no benchmark 'other'"):
        render.render(readme("other"), results)


def test_check_tells_whether_the_readme_is_current(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = results / "README.md"
    path.write_text(readme("model"))
    monkeypatch.setattr(
        sys, "argv", ["render.py", str(results), "--readme", str(path), "--check"]
    )  # fmt: skip
    assert render.main() == 1
    assert path.read_text() == readme("model")
    path.write_text(render.render(path.read_text(), results))
    assert render.main() == 0


def test_plots_are_the_same_bytes_each_time(results: Path) -> None:
    pytest.importorskip("matplotlib")
    import plots

    assert set(plots.PLOTS) == set(render.PLOTTED)
    text = readme(*TABLES)
    render.write_plots(text, results, results / "a")
    render.write_plots(text, results, results / "b")
    for name in render.PLOTTED:
        first = (results / "a" / f"{name}.svg").read_bytes()
        assert first == (results / "b" / f"{name}.svg").read_bytes()


@pytest.mark.parametrize(
    ("value", "text"),
    [(12345.6, "12,346"), (456.7, "457"), (12.34, "12.3"), (1.0, "1.00"), (0.5, "0.50"),
     (0.0123, "0.012"), (0.0, "0"), (float("nan"), "")],
)  # fmt: skip
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def gpu_document(device: str, *lines: dict[str, Any], **more: Any) -> dict[str, Any]:
    machine = {"device": device, "nvidia_smi": f"{device}, 1.2", "torch": "2.11", "commit": "0123"}
    blank = {"p10": 0.0, "p90": 0.0, "bytes": 0, "percent_of_copy": 0.0, "times_peer": 0.0,
             "peer": "", "notes": {}}  # fmt: skip
    found = [{**blank, **line} for line in lines]
    return {
        "command": "python benchmarks/bench_gpu_x.py",
        "machine": machine,
        "lines": found,
        **more,
    }


def gpu_line(op: str, shape: str, contender: str, us: float, **more: Any) -> dict[str, Any]:
    return {"op": op, "shape": shape, "contender": contender, "microseconds": us, **more}


def test_gpu_results_of_every_device(tmp_path: Path) -> None:
    dense = gpu_line("gemv", "64x96 tokens=1", "cuBLAS bf16", 12.5)
    ours = gpu_line("gemv", "64x96 tokens=1", "vq d=6", 5.0, times_peer=2.5, peer="cuBLAS bf16")
    for device in ("h100", "h200"):
        put(tmp_path / device, "gemv", gpu_document(f"an {device}", dense, ours))
    put(tmp_path / "cpu", "gemv", gemv("d=4 bf16"))  # of another kind
    text = render.render("<!-- measured: gpu_gemv -->\n<!-- end -->", tmp_path / "cpu")
    assert "an h100, torch 2.11, commit 0123; `python benchmarks/bench_gpu_x.py`." in text
    assert "an h200, torch" in text
    assert "| 64x96 tokens=1 | 12.5 | 5.00, 2.50x |" in text
    assert render.render(text, tmp_path / "cpu") == text


def test_gpu_sections_of_their_own_documents(tmp_path: Path) -> None:
    wait = {"grid": 132, "waits barrier": 1.0, "waits drain": 3.0, "waits membar": 2.0}
    put(
        tmp_path / "h100",
        "counters",
        gpu_document("a GPU", gpu_line("ncu", "a call", "a kernel", 7.5, notes=wait)),
    )
    call = gpu_line("timeline", "a call", "span", 9.0, notes={"kernels": 2, "sum": 10.0})
    put(
        tmp_path / "h100",
        "timeline",
        gpu_document("a GPU", call, kernels={"a call": [[0.0, 4.0, "one"], [3.0, 6.0, "two"]]}),
    )
    (tmp_path / "cpu").mkdir()
    names = ("gpu_counters", "gpu_timeline", "gpu_model")
    text = render.render(readme(*names), tmp_path / "cpu")
    assert "| a call | a kernel | 7.50 | 132 |" in text
    assert "drain 3.00, membar 2.00, barrier 1.00 |" in text
    assert "| a call | 9.00 | 2 | 10.0 | two, 6.00 |" in text
    assert "old gpu_model" in text  # nothing was measured


def test_the_readmes_say_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["render.py", "--check"])
    assert render.main() == 0
