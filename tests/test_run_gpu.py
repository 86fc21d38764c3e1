"""run_gpu.sh keeps what it has done, whatever happens: driven here with stubs in place of a GPU."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import baseline
import pytest
import run_gpu

SCRIPT = Path(run_gpu.__file__).with_name("run_gpu.sh")
DEVICE = "NVIDIA H100 80GB HBM3"

# Every command of such a machine. What a part does stands in $STUB_HOME/does/<part>: nothing, or
# fail, hang, or "figures, hang": write its figures first.
STUB = f"""#!/bin/bash
case ${{0##*/}} in
    nvidia-smi) echo "{DEVICE}, 580.1, 81559 MiB, 700.00 W"; exit ;;
    compute-sanitizer) part=$2 ;;
    python)
        case "$1" in
            */run_gpu.py) exec {sys.executable} "$@" ;;
            -c) exit ;;
            -m) part=tests ;;
            *) part=${{1##*/}} part=${{part%.py}} part=${{part#bench_}} part=${{part#gpu_}} ;;
        esac ;;
esac
echo "$part" >>"$STUB_HOME/calls"
echo "$part begins"
does=
[ -e "$STUB_HOME/does/$part" ] && read -r does <"$STUB_HOME/does/$part"
line='"op": "'$part'", "shape": "64x96 tokens=1", "contender": "vq d=6", "microseconds": 12.0'
[ "$part" = modules ] && echo modules >"$2"
if [ "${{@: -2:1}}" = --json ] && [ "$does" != hang ]; then
    printf '{{"lines": [{{%s}}]}}' "$line" >"${{@: -1}}"
fi
case $does in
    *hang)
        echo $$ >"$STUB_HOME/hanging"
        mv "$STUB_HOME/hanging" "$STUB_HOME/hangs"
        exec sleep 60 ;;
    fail) exit 3 ;;
esac
exit 0
"""


class Stubs:
    """A folder of commands that stand for a GPU machine's, and what was called."""

    def __init__(self, home: Path) -> None:
        self.home, self.out = home, home / "out"
        for name in ("python", "nvidia-smi", "compute-sanitizer"):
            path = home / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(STUB)
            path.chmod(0o755)
        self.does()

    def does(self, **parts: str) -> None:
        shutil.rmtree(self.home / "does", ignore_errors=True)
        (self.home / "does").mkdir()
        for part, what in parts.items():
            (self.home / "does" / part).write_text(f"{what}\n")
        (self.home / "calls").write_text("")

    def start(self, **variables: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ, "PATH": f"{self.home / 'bin'}:{os.environ['PATH']}", "PYTHON": "python",
            "STUB_HOME": str(self.home), **variables,
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", str(SCRIPT), str(self.out)], env=environment, stdout=subprocess.PIPE, text=True
        )

    def run(self, **variables: str) -> tuple[int, str]:
        process = self.start(**variables)
        text, _ = process.communicate(timeout=60)
        return process.returncode, text

    def calls(self) -> list[str]:
        return (self.home / "calls").read_text().split()

    def saved(self) -> dict[str, Any]:
        """The parts of result.json, once all that is in OUTDIR has been found whole."""
        assert len(list(self.out.iterdir())) <= 8
        with tarfile.open(self.out / "logs.tar.gz") as archive:
            assert all(archive.extractfile(member) for member in archive.getmembers())
        return json.loads((self.out / "result.json").read_text())["parts"]

    def logs(self) -> set[str]:
        with tarfile.open(self.out / "logs.tar.gz") as archive:
            return set(archive.getnames())


@pytest.fixture
def stubs(tmp_path: Path) -> Stubs:
    return Stubs(tmp_path)


ORDER = ["modules", "smoke", "tests", "gemv", "peers", "block", "many", "timeline", "compress",
         "counters", "memcheck", "racecheck", "model", "units"]  # fmt: skip


def test_all_parts_in_order(stubs: Stubs) -> None:
    status, text = stubs.run()
    assert status == 0, text
    assert stubs.calls() == ORDER
    parts = stubs.saved()
    assert list(parts) == ORDER
    assert {part["status"] for part in parts.values()} == {"ok"}
    assert parts["gemv"]["document"]["lines"][0]["op"] == "gemv"
    assert {path.name for path in stubs.out.iterdir()} == {
        "result.json", "logs.tar.gz", "modules.tar.gz",
    }  # fmt: skip
    assert {"tests.log", "gemv.log", "gemv.json"} <= stubs.logs()
    assert len(text) < 12_000
    assert "not done: nothing" in text


def test_a_part_that_hangs_is_ended_and_the_rest_goes_on(stubs: Stubs) -> None:
    stubs.does(gemv="figures, hang", block="fail")
    status, text = stubs.run(LIMIT="2", ONLY="gemv block many")
    assert status == 1
    parts = stubs.saved()
    assert parts["gemv"]["status"] == "ended at its limit"
    assert parts["gemv"]["document"]["lines"]  # what it wrote before
    assert parts["block"]["status"] == "failed"
    assert parts["many"]["status"] == "ok"
    assert "not done: gemv (ended at its limit), block (failed)" in text
    with pytest.raises(ProcessLookupError):
        os.kill(int((stubs.home / "hangs").read_text()), 0)


def test_only_and_skip(stubs: Stubs) -> None:
    status, text = stubs.run(ONLY="gemv block", SKIP="block")
    assert status == 0
    assert stubs.calls() == ["modules", "gemv"]
    assert "== block: left out" in text


def test_nothing_runs_without_modules(stubs: Stubs) -> None:
    stubs.does(modules="fail")
    status, _ = stubs.run()
    assert status == 1
    assert stubs.calls() == ["modules"]
    assert stubs.saved()["modules"]["status"] == "failed"


def test_what_does_not_fit_the_budget_is_not_begun(stubs: Stubs) -> None:
    status, text = stubs.run(BUDGET="7", ONLY="gemv")
    assert status == 1
    assert stubs.calls() == []
    assert stubs.saved()["modules"]["status"] == "no time"
    assert "modules (no time)" in text


def wait_for(path: Path) -> None:
    for _ in range(400):
        if path.exists():
            return
        time.sleep(0.025)
    raise AssertionError(f"{path} does not come")


@pytest.mark.parametrize("part", ["smoke", "tests", "racecheck"])
def test_a_machine_that_vanishes_leaves_all_that_was_done(stubs: Stubs, part: str) -> None:
    stubs.does(**{part: "hang"})
    process = stubs.start()
    wait_for(stubs.home / "hangs")
    os.kill(process.pid, signal.SIGKILL)
    os.kill(int((stubs.home / "hangs").read_text()), signal.SIGKILL)
    process.communicate()
    before = ORDER[: ORDER.index(part)]
    parts = stubs.saved()
    assert list(parts) == before
    assert {part["status"] for part in parts.values()} == {"ok"}
    assert {f"{name}.log" for name in before} <= stubs.logs()

    stubs.does()  # a second run goes on
    status, text = stubs.run()
    assert status == 0
    assert stubs.calls() == ["modules", *ORDER[ORDER.index(part) :]]
    assert set(stubs.saved()) == set(ORDER)
    assert {f"{name}.log" for name in ORDER} <= stubs.logs()
    assert "== smoke: ok before" in text or part == "smoke"


def test_figures_are_saved_while_their_part_runs(stubs: Stubs) -> None:
    stubs.does(gemv="figures, hang")
    process = stubs.start(ONLY="gemv")
    wait_for(stubs.home / "hangs")
    for _ in range(400):
        if "document" in stubs.saved().get("gemv", {}):
            break
        time.sleep(0.025)
    process.send_signal(signal.SIGTERM)  # as `timeout` does
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert stubs.saved()["gemv"]["status"] == "interrupted"
    assert stubs.saved()["gemv"]["document"]["lines"]
    with pytest.raises(ProcessLookupError):
        os.kill(int((stubs.home / "hangs").read_text()), 0)


def test_a_result_that_was_carried_along_is_gone_on_with(stubs: Stubs, tmp_path: Path) -> None:
    stubs.run(ONLY="gemv")
    carried = tmp_path / "carried"
    stubs.out.rename(carried)
    stubs.does()
    status, _ = stubs.run(ONLY="gemv block", RESUME=str(carried / "result.json"))
    assert status == 0
    assert stubs.calls() == ["modules", "block"]
    assert set(stubs.saved()) == {"modules", "gemv", "block"}
    assert {"gemv.log", "block.log"} <= stubs.logs()


def test_figures_of_other_sources_are_not_mixed(stubs: Stubs) -> None:
    stubs.run(ONLY="gemv")
    result = json.loads((stubs.out / "result.json").read_text())
    (stubs.out / "result.json").write_text(json.dumps({**result, "sources": "others"}))
    stubs.does()
    _, text = stubs.run(ONLY="gemv")
    assert "beginning anew" in text
    assert stubs.calls() == ["modules", "gemv"]


def line(shape: str, contender: str, microseconds: float) -> dict[str, Any]:
    return {"op": "gemv", "shape": shape, "contender": contender, "microseconds": microseconds}


def results(folder: Path) -> Path:
    """A folder of results of one device with one prediction."""
    (folder / "h100").mkdir(parents=True)
    lines = [line("64x96 tokens=1", "vq d=6", 10.0), line("64x96 tokens=1", "dense", 20.0)]
    (folder / "h100" / "gemv.json").write_text(json.dumps({"lines": lines}))
    (folder / "h100" / "peers.json").write_text(
        json.dumps({"lines": [line("64x96 tokens=1", "dense", 99.0)]})
    )
    same = line("64x96 tokens=1", "vq d=6", 6.0)
    aimed = [
        {"device": "h100", "kind": "predicted", **same},
        {"device": "h100", "kind": "target", **same, "microseconds": 5.0},
        {"device": "h100", "kind": "target", **line("64x96 tokens=2", "vq d=6", 100.0)},
        {"device": "h200", "kind": "target", **line("64x96 tokens=1", "dense", 1.0)},
    ]
    (folder / "predictions.json").write_text(json.dumps({"lines": aimed}))
    return folder


def test_lines_stand_beside_the_last_result_and_their_prediction(tmp_path: Path) -> None:
    found = baseline.of_device(DEVICE, results(tmp_path))
    rows = found.table(
        [line("64x96 tokens=1", "vq d=6", 12.0), line("64x96 tokens=1", "dense", 20.0),
         line("64x96 tokens=2", "vq d=6", 123.4)]
    )  # fmt: skip
    assert rows == [
        "gemv 64x96 tokens=1: "
        "vq d=6 12.0 (10.0 1.20x; predicted 6.00 2.00x), dense 20.0 (20.0 1.00x)",
        "gemv 64x96 tokens=2: vq d=6 123 (target 100 1.23x)",
    ]


def test_a_run_prints_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_gpu, "machine", lambda: {"device": DEVICE})
    this = run_gpu.Run(tmp_path, tmp_path, 60)
    this.baseline = baseline.of_device(DEVICE, results(tmp_path / "results"))
    lines = [line("64x96 tokens=1", "vq d=6", 12.0)] + [
        line(f"{shape}x96 tokens=1", "vq d=6", 5.0) for shape in range(1000)
    ]
    this.result["parts"]["gemv"] = {"status": "ok", "seconds": 3.0, "document": {"lines": lines}}
    (tmp_path / "gemv.log").write_text("a peer left out: ImportError: none\nthe end\n")
    this.result["parts"]["block"] = {"status": "ok", "seconds": 1.0}
    (tmp_path / "block.log").write_text("a peer left out: ImportError: none\nthe end\n")
    this.show("block")
    for _ in range(4):
        this.show("gemv")
    text = capsys.readouterr().out
    assert "== block: ok, 1 s | the end\n  a peer left out: ImportError: none\n" in text
    assert "gemv 64x96 tokens=1: vq d=6 12.0 (10.0 1.20x; predicted 6.00 2.00x)" in text
    assert text.count("== gemv: ok, 3 s") == 4  # however much each part has to say
    assert len(text) < 11_000


@pytest.mark.parametrize(
    ("device", "folder"),
    [(DEVICE, "h100"), ("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100"),
     ("Tesla T4", "t4"), ("NVIDIA L40S", "l40s"), ("NVIDIA GeForce RTX 4090",
     "nvidia-geforce-rtx-4090")],
)  # fmt: skip
def test_the_device_names_the_folder(device: str, folder: str) -> None:
    assert baseline.device_folder(device) == folder


def test_every_prediction_is_of_a_device_and_says_why() -> None:
    for entry in json.loads(baseline.PREDICTIONS.read_text())["lines"]:
        assert entry["device"]
        assert entry["kind"] in ("target", "predicted")
        assert entry["because"]
        assert entry["microseconds"] > 0
        assert all(entry[name] for name in ("op", "shape", "contender"))


def test_kept_figures_are_the_next_baseline(stubs: Stubs, tmp_path: Path) -> None:
    stubs.does(block="figures, hang")
    stubs.run(ONLY="gemv block", LIMIT="2")
    run_gpu.keep(stubs.out, tmp_path / "results")
    assert [path.name for path in (tmp_path / "results" / "h100").iterdir()] == ["gemv.json"]
    kept = baseline.of_device(DEVICE, tmp_path / "results")
    assert kept.last == {("gemv", "64x96 tokens=1", "vq d=6"): 12.0}
