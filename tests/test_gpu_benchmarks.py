"""The GPU benchmarks run from beginning to end, at tiny shapes on the CPU, and name their lines as
the committed results and targets do. Their figures mean nothing here."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import baseline
import gpu
import gpu_tables
import pytest
import render
import torch
from cpu_as_cuda import cpu_as_cuda

SHAPE = (64, 96)
TINY: dict[str, dict[str, Any]] = {
    "bench_gpu_gemv": {"QUICK": [SHAPE], "TOKENS": [1, 8]},
    "bench_gpu_peers": {"QUICK": [SHAPE, SHAPE]},
    "bench_gpu_block": {"LINEARS": [SHAPE, SHAPE], "SIBLINGS": [2]},
    "bench_gpu_many": {"SHAPES": [SHAPE], "HOST": SHAPE, "QUICK": [17, 64]},
    "bench_gpu_compress": {"ROWS": 260, "COLS": 96, "LLAMA_2_7B": {(288, 96): 2}},
    "bench_gpu_timeline": {"LINEARS": [SHAPE, SHAPE], "LARGE": SHAPE, "ROWS": 260, "COLS": 96},
    "bench_gpu_model": {
        "PROMPTS": (4, 8), "NEW_TOKENS": 2,
        "CONFIG": {
            "hidden_size": 192, "intermediate_size": 256, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 128,
            "max_position_embeddings": 512,
        },
    },
    "bench_gpu_smoke": {"ROWS": 288, "COLS": 96},
    "profile_gpu": {"ROWS": 64, "COLS": 96},
}  # fmt: skip


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gpu, "ROTATED_BYTES", 1)
    monkeypatch.setattr(gpu, "GRAPH_CALLS", 4)
    monkeypatch.setattr(gpu, "copy_bandwidth", lambda: 3e12)
    monkeypatch.setattr(gpu, "dense_rate", lambda: 8e14)
    for name, constants in TINY.items():
        module = importlib.import_module(name)
        for constant, value in constants.items():
            monkeypatch.setattr(module, constant, value)
    grad, threads = torch.is_grad_enabled(), torch.get_num_threads()
    torch.set_num_threads(1)
    with cpu_as_cuda(monkeypatch):
        yield
    torch.set_grad_enabled(grad)
    torch.set_num_threads(threads)


def run(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a benchmark writes."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick", "--json", str(path)])
    importlib.import_module(name).main()
    return json.loads(path.read_text())


class Profile:
    """Two kernels, whatever is run."""

    def __init__(self, **_: Any) -> None:
        pass

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def events(self) -> list[Any]:
        def event(start: float, end: float, name: str) -> Any:
            return SimpleNamespace(
                device_type="DeviceType.CUDA", name=name,
                time_range=SimpleNamespace(start=start, end=end),
            )  # fmt: skip

        return [event(7.0, 9.0, "two(int)"), event(5.0, 8.0, "void nowag::cuda::one<6>(int)")]


NAMES = {
    "bench_gpu_smoke": {("ceiling", "torch"), ("ceiling", "torch bf16")},
    "bench_gpu_gemv": {("gemv", n) for n in ("cuBLAS bf16", "vq d=6", "vq d=4", "sparse 50 %")},
    "bench_gpu_block": {
        ("block", n)
        for n in (
            "cuBLAS bf16", "vq d=6", "vq d=6, siblings", "vq d=4", "vq d=4, siblings", "sparse 2:4"
        )
    },
    "bench_gpu_many": {
        (op, n) for op in ("linear", "linear, eager", "host") for n in ("cuBLAS bf16", "vq d=6")
    },
    "bench_gpu_timeline": {("timeline", "span")},
    "bench_gpu_compress": {
        ("select", "50 %"), ("select", "50 %, half zeros"), ("select", "50 %, ties"),
        ("select", "2:4"), ("select", "normalize"), ("assign+update", "mean of 20"),
        ("seed", "k-means++"), ("feedback", "codes"), ("feedback", "vq_compress"),
        ("Llama-2-7B", "pruned 2:4"),
    },
    "bench_gpu_model": {("7B model", "dense"), ("7B model", "vq d=6")},
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("cuda")
def test_a_benchmark_runs_to_its_end(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bench_gpu_timeline

    monkeypatch.setattr(bench_gpu_timeline, "profile", Profile)
    figures = tmp_path / "h100" / f"{name.removeprefix('bench_gpu_')}.json"
    document = run(name, figures, monkeypatch)
    assert document["machine"]["device"] == "NVIDIA H100 80GB HBM3"
    assert document["command"] == f"python benchmarks/{name}.py --quick"
    lines = document["lines"]
    assert NAMES[name] <= {(line["op"], line["contender"]) for line in lines}
    assert len({baseline.key(line) for line in lines}) == len(lines)
    assert all(line["microseconds"] > 0 for line in lines)
    if name == "bench_gpu_timeline":
        assert document["kernels"]["normalize"] == [[0.0, 3.0, "one<6>"], [2.0, 2.0, "two"]]
    for section, (documents, _) in gpu_tables.SECTIONS.items():  # what it wrote can be shown
        if figures.stem in documents and section != "gpu_short":
            text = gpu_tables.section(section, tmp_path, render.load)
            assert section == "gpu_targets" or "python benchmarks/bench_gpu_" in str(text)


@pytest.mark.usefixtures("cuda")
def test_peers_are_measured_where_there_are_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu_peers

    def fails(rows: int, cols: int) -> Any:
        raise RuntimeError("does not\ncompile")

    def zeros(rows: int, cols: int) -> Any:
        return lambda x: x.new_zeros(len(x), rows), 7

    makers = {"aqlm 2x8": fails, "aqlm 1x16": zeros}
    monkeypatch.setattr(gpu_peers, "PUBLISHED", makers)
    monkeypatch.setattr(gpu_peers, "_missing", set())
    document = run("bench_gpu_peers", tmp_path / "out.json", monkeypatch)
    text = capsys.readouterr().out
    assert text.count("aqlm 2x8 left out: RuntimeError: does not compile") == 1
    names = {line["contender"] for line in document["lines"]}
    assert names == {"cuBLAS bf16", "vq d=6", "vq d=4", "aqlm 1x16"}

    del makers["aqlm 1x16"]
    with pytest.raises(FileNotFoundError):
        run("bench_gpu_peers", tmp_path / "none.json", monkeypatch)


def test_targets_are_of_lines_that_benchmarks_write() -> None:
    written = set().union(*NAMES.values()) | {("host", "vq d=4"), ("linear", "vq d=4")}
    for line in json.loads(baseline.PREDICTIONS.read_text())["lines"]:
        assert (line["op"], line["contender"]) in written, line


@pytest.mark.usefixtures("cuda")
def test_the_calls_that_are_profiled_run(capsys: pytest.CaptureFixture[str]) -> None:
    import profile_gpu

    profile_gpu.main()
    assert len(capsys.readouterr().out.splitlines()) == len(profile_gpu.calls())


def test_counters_of_a_report() -> None:
    import bench_gpu_counters as counters

    issue = counters.METRICS["issue %"][0]
    report = f"""==PROF== Connected to process 1
"ID","Kernel Name","{counters.DURATION}","{issue}","launch__grid_size"
"","","ns","%",""
"0","spin_kernel(long)","1,500","1.0","1"
"1","void vq_gemv_lut<2, 1, 4>(VqWeight, long)","18,848","21.14","114"
"2","vq_gemv_finish(long)","7,136","n/a","344"
"3","spin_kernel(long)","1,500","1.0","1"
"4","prune_sample(PruneLayer)","19,712","1.40","256"
"""
    found = counters.lines(report.splitlines(), ["one token", "select"])
    assert [(line.shape, line.contender, line.microseconds) for line in found] == [
        ("one token", "vq_gemv_lut<2 1 4>", pytest.approx(18.848)),
        ("one token", "vq_gemv_finish", pytest.approx(7.136)),
        ("select", "prune_sample", pytest.approx(19.712)),
    ]
    assert found[0].notes == {"grid": 114.0, "issue %": 21.14}
    assert found[1].notes == {"grid": 344.0}
    assert counters.lines(["ncu: error"], ["one token"]) == []


@pytest.mark.parametrize(
    ("name", "short"),
    [("void nowag::cuda::vq_gemv_lut<(nowag::DType)2, 1, 4>(nowag::cuda::VqWeight, int)",
      "vq_gemv_lut<2 1 4>"), ("Memset (Device)", "Memset"),
     ("nvjet_sm90_tst_64x32", "nvjet_sm90_tst_64x32"),
     ("nowag::cuda::(anonymous namespace)::one(int)", "one")],
)  # fmt: skip
def test_kernels_have_short_names(name: str, short: str) -> None:
    assert gpu.kernel_name(name) == short


@pytest.mark.usefixtures("cuda")
def test_a_contender_that_fails_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise ImportError("no such package")

    timings = gpu.compare({"ours": [lambda: torch.ones(1)], "theirs": [fails]}, rounds=1)
    assert list(timings) == ["ours"]
    assert "theirs left out: ImportError: no such package" in capsys.readouterr().out


def test_units_are_rates_and_times() -> None:
    import bench_gpu_units

    rates, times = bench_gpu_units.parse("FFMA\t108.2\tlanes a clock and SM\ncold read\t4.65\tus\n")
    assert rates == [{"name": "FFMA", "value": 108.2, "unit": "lanes a clock and SM"}]
    assert [(line.op, line.shape, line.microseconds) for line in times] == [
        ("unit", "cold read", 4.65)
    ]


@pytest.mark.slow
def test_units_compile(tmp_path: Path) -> None:
    import bench_gpu_units

    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    for arch in ("sm_80", "sm_90"):
        command = [nvcc, "-std=c++17", f"-arch={arch}", "-Werror=all-warnings", "--ptx"]
        target = ["-o", str(tmp_path / f"{arch}.ptx")]
        subprocess.run([*command, str(bench_gpu_units.SOURCE), *target], check=True)
