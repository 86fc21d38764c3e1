"""Runs that several processes share: their arithmetic, what ends them, who speaks."""

from __future__ import annotations

import copy
import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_same_bits, assert_within
from fresh_process import fresh_python
from safetensors.torch import load_file
from test_pipeline import SETTINGS, windows
from tiny_model import TEXT, save_tiny
from tiny_models import tiny_model
from torch import distributed as dist
from typer.testing import CliRunner

from nowag_ext import cli, compress
from nowag_ext.pipeline import compress as pipeline
from nowag_ext.pipeline.ranks import ALONE, RankLostError, Ranks
from nowag_ext.pipeline.statistics import GroupStatistics

pytestmark = pytest.mark.usefixtures("one_thread")


def together(count: int, work: Callable[[dist.ProcessGroup], Any]) -> list[Any]:
    """What ``work`` returns or raises on each of so many ranks: threads here, over gloo."""
    store = dist.HashStore()
    results: list[Any] = [None] * count

    def run(rank: int) -> None:
        group = dist.ProcessGroup(store, rank, count)
        gloo = dist.ProcessGroupGloo(store, rank, count, timedelta(seconds=60))
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
        group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        try:
            results[rank] = work(group)
        except BaseException as error:
            # Without its frames, which keep the group: gone with it, as where a process ends.
            results[rank] = error.with_traceback(None)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_shares_are_all_there_is_and_alike() -> None:
    def shares(group: dist.ProcessGroup) -> tuple[list[int], dict[str, int]]:
        ranks = Ranks(group)
        return list(range(8))[ranks.share(8)], ranks.owners({"a": 1, "b": 4, "c": 2, "d": 2})

    parts, owners = zip(*together(3, shares), strict=True)
    assert parts == ([0, 1], [2, 3, 4], [5, 6, 7])
    assert all(one == {"b": 0, "c": 1, "d": 2, "a": 1} for one in owners)


def test_messages_and_sums() -> None:
    def exchange(group: dist.ProcessGroup) -> Any:
        ranks = Ranks(group)
        sums = [torch.full((3,), 10.0**ranks.rank), torch.tensor([2**40 + ranks.rank])]
        ranks.add_up(sums)
        mine = {"none": torch.empty(0, 2), "codes": torch.tensor([[ranks.rank]], dtype=torch.uint8)}
        said = [ranks.tell((mine, {"rank": ranks.rank}), source) for source in range(3)]
        return sums, said

    for sums, said in together(3, exchange):
        assert_same_bits(sums[0], torch.full((3,), 111.0))
        assert_same_bits(sums[1], torch.tensor([3 * 2**40 + 3]))
        for source, (tensors, facts) in enumerate(said):
            assert facts == {"rank": source}
            assert list(tensors) == ["none", "codes"]
            assert_same_bits(tensors["codes"], torch.tensor([[source]], dtype=torch.uint8))
            assert tensors["none"].shape == (0, 2)


def test_alone_says_what_it_is_told() -> None:
    message = {"tensor": torch.ones(2)}, {"fact": object()}
    assert ALONE.tell(message) is message
    assert ALONE.share(5) == slice(0, 5)
    assert ALONE.owners({"a": 1, "b": 2}) == {"a": 0, "b": 0}


class Statistics:
    """What two ranks' activation norms and sums were, to be those of a single process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[Any] = []
        self._replayed: Iterator[Any] | None = None
        norms, add_up = pipeline.activation_norms, GroupStatistics.add_up

        def kept_norms(blocks: Any, few: Any, ranks: Ranks, progress: Any) -> Any:
            return self._kept(ranks, norms(blocks, few, ranks, progress))

        def kept_sums(statistics: GroupStatistics, ranks: Ranks) -> None:
            add_up(statistics, ranks)
            vars(statistics).update(self._kept(ranks, vars(statistics)))

        monkeypatch.setattr(pipeline, "activation_norms", kept_norms)
        monkeypatch.setattr(GroupStatistics, "add_up", kept_sums)

    def _kept(self, ranks: Ranks, own: Any) -> Any:
        if self._replayed is not None:
            kept = next(self._replayed)
            _assert_near(own, kept)
            return kept
        if ranks.first:
            self.seen.append(copy.deepcopy(own))
        return own

    def replay(self) -> None:
        self._replayed = iter(self.seen)

    def is_used_up(self) -> bool:
        assert self._replayed is not None
        return next(self._replayed, None) is None


def _assert_near(own: Any, kept: Any) -> None:
    """Another order of addition, and no more than that."""
    assert set(own) == set(kept)
    for name, value in kept.items():
        if isinstance(value, dict):
            _assert_near(own[name], value)
        elif isinstance(value, torch.Tensor):
            assert_within(own[name], value, 1e-4 * float(value.abs().max()), name)
        else:
            assert own[name] == value, name


@pytest.mark.parametrize(
    ("count", "method", "settings"),
    [
        (2, "vq", {**SETTINGS, "overrides": {"o_proj": {"method": "prune", "pattern": "2:4"}}}),
        (3, "vq", {**SETTINGS, "codebook_scope": "kind"}),
        (2, "vq", {**SETTINGS, "codebook_scope": "layer", "ignore": ("lm_head", "k_proj")}),
        (2, "vq", {**SETTINGS, "head": {"d": 2, "bits": 3}}),
        (2, "prune", {"sparsity": 0.5}),
    ],
)
def test_the_bits_of_one_process_with_the_same_statistics(
    count: int, method: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shares of windows that are not alike; every tensor, the codebooks' too."""
    statistics = Statistics(monkeypatch)
    models = [tiny_model() for _ in range(count)]

    def run(group: dist.ProcessGroup) -> None:
        tokens = windows(10) if group.rank() == 0 else None
        compress(models[group.rank()], tokens, method, group=group, **settings)

    assert together(count, run) == [None] * count
    statistics.replay()
    alone = tiny_model()
    compress(alone, windows(10), method, **settings)
    assert statistics.is_used_up()
    wanted = alone.state_dict()
    assert list(models[0].state_dict()) == list(wanted)
    for name, tensor in models[0].state_dict().items():
        assert_same_bits(tensor, wanted[name], name)
    layers = [[layer.name for layer in one.nowag_report.layers] for one in (models[0], alone)]
    assert layers[0] == layers[1]
    assert not hasattr(models[1], "nowag_report")
    for name, tensor in tiny_model().state_dict().items():
        assert_same_bits(models[1].state_dict()[name], tensor, name)


def test_each_rank_needs_a_window() -> None:
    models = [tiny_model() for _ in range(3)]

    def run(group: dist.ProcessGroup) -> None:
        tokens = windows(2) if group.rank() == 0 else None
        compress(models[group.rank()], tokens, group=group, **SETTINGS)

    for error in together(3, run):
        assert isinstance(error, ValueError)
        assert "3 processes need a window of calibration text each, and there are only 2" in str(
            error
        )


def test_a_rank_that_has_gone_is_missed() -> None:
    def run(group: dist.ProcessGroup) -> None:
        if group.rank() == 0:
            Ranks(group).add_up([torch.ones(1)])

    error, _ = together(2, run)
    assert isinstance(error, RankLostError)


def test_rank_0_keeps_and_resumes_for_all(tmp_path: Path) -> None:
    def run_with(stop: Any, directory: Path) -> list[Any]:
        models = [tiny_model(), tiny_model()]

        def run(group: dist.ProcessGroup) -> Any:
            model, first = models[group.rank()], group.rank() == 0
            given = {"work_dir": directory, "progress": stop} if first else {}
            given["head"] = {"d": 2, "bits": 3}
            return compress(model, windows() if first else None, group=group, **given, **SETTINGS)

        return together(2, run)

    def stop(name: str, _done: float, _total: float) -> None:
        if name.startswith("model.layers.1.mlp"):
            raise KeyboardInterrupt

    stopped, missed = run_with(stop, tmp_path / "work")
    assert isinstance(stopped, KeyboardInterrupt)
    assert isinstance(missed, RankLostError)
    model, _ = run_with(None, tmp_path / "work")
    assert sum(layer.resumed for layer in model.nowag_report.layers) == 7 + 4
    whole, _ = run_with(None, tmp_path / "other")
    for name, tensor in whole.state_dict().items():
        assert_same_bits(model.state_dict()[name], tensor, name)
    alone = compress(tiny_model(), windows(), work_dir=tmp_path / "work", **SETTINGS)
    assert not any(layer.resumed for layer in alone.nowag_report.layers)


def test_compress_alone_has_ranks(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nowag_ext.cli.base.launched", lambda: 2)
    monkeypatch.setattr("nowag_ext.cli.base.launcher", lambda: ["torchrun"])
    arguments = ["eval", work / "model", "--text", work / "text.txt"]
    run = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert run.exit_code == 1
    assert run.stderr == "Error: torchrun is for compress alone: start this without it.\n"


# --- torchrun ------------------------------------------------------------------------------------

COMMON = ["--bits", 1, "--iters", 3, "--length", 32, "--samples", 6]

# A rank is killed, or raises, or waits where it says, when it comes to the second layer.
FAILING = """
import os, signal, time
import nowag_ext.cli as cli, nowag_ext.pipeline.compress as pipeline
who, how = os.environ["FAILING"].split()
layer = pipeline._Run._layer
def failing(run, index, *streams):
    if index == 1 and os.environ["RANK"] == who:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "raises":
            raise MemoryError("there is none left.")
        if how == "waits":
            print("second layer", flush=True)
            time.sleep(100)
    layer(run, index, *streams)
pipeline._Run._layer = failing
cli.app()
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("work")
    save_tiny(directory / "model")
    (directory / "text.txt").write_text(TEXT)
    (directory / "failing.py").write_text(FAILING)
    return directory


def torchrun(
    work: Path, *arguments: object, failing: str | None = None
) -> subprocess.CompletedProcess[str]:
    program = ["-m", "--", "nowag_ext"] if failing is None else [work / "failing.py"]
    return subprocess.run(
        **fresh_python(
            "-m", "torch.distributed.run", "--nproc-per-node", 2, *program, *arguments,
            OMP_NUM_THREADS="1", FAILING=failing or "",
        ),
        capture_output=True, timeout=300,
    )  # fmt: skip


def compress_arguments(work: Path, output: Path) -> list[object]:
    return ["compress", work / "model", "--text", work / "text.txt", "-o", output, *COMMON]


def said(run: subprocess.CompletedProcess[str]) -> list[str]:
    """Our own sentences on standard error: torchrun's begin otherwise."""
    return re.findall(r"^(?:Error: |Terminated|Interrupted).*", run.stderr, re.MULTILINE)


def assert_same(output: Path, whole: Path) -> None:
    one, other = (load_file(path / "model.safetensors") for path in (output, whole))
    assert set(one) == set(other)
    for name, tensor in other.items():
        assert_same_bits(one[name], tensor, name)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_which_goes_on_from_there(work: Path, tmp_path: Path) -> None:
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    given = compress_arguments(work, output)
    whole = torchrun(work, *compress_arguments(work, tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("Calibrating on 6 windows") == 1
    assert whole.stdout.count("The checkpoint, report.json and layers.csv are in") == 1
    for failing, sentence in {
        "1 killed": "Error: another process of this run has ended|Terminated by torchrun: ",
        "0 raises": "Error: MemoryError: there is none left",
    }.items():
        began = time.monotonic()
        run = torchrun(work, *given, failing=failing)
        assert run.returncode == 1
        assert time.monotonic() - began < 90
        (ours,) = said(run)
        assert re.match(sentence, ours), ours
        command = " ".join(map(str, given))
        assert ours.endswith(
            f"What is finished is kept in {partial}; go on with: "
            f"torchrun --nproc-per-node 2 -m -- nowag_ext {command}"
        )
        assert not output.exists()
    alone = CliRunner().invoke(cli.app, [str(argument) for argument in given])
    assert alone.exit_code == 1
    assert "processes 2, not processes 1" in alone.stderr
    again = torchrun(work, *given)
    assert again.returncode == 0, again.stderr
    report = json.loads((output / "report.json").read_text())
    assert sum(layer["resumed"] for layer in report["layers"]) == 7
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "whole"]
    assert_same(output, tmp_path / "whole")


@pytest.mark.slow
def test_a_refusal_is_said_once(work: Path, tmp_path: Path) -> None:
    given = compress_arguments(work, tmp_path / "out")
    (tmp_path / "out").write_text("mine")
    run = torchrun(work, *given)
    assert run.returncode == 1
    (ours,) = said(run)
    assert ours == f"Error: --output: {tmp_path / 'out'} is a file: a directory is needed."
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_interrupts_end_all_of_them(work: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        **fresh_python(
            "-m", "torch.distributed.run", "--nproc-per-node", 2, work / "failing.py",
            *compress_arguments(work, tmp_path / "out"), OMP_NUM_THREADS="1", FAILING="0 waits",
        ),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("second layer"):
            break
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, stderr = process.communicate(timeout=120)
    assert time.monotonic() - began < 20
    assert len(re.findall(r"^Terminated by torchrun: .*go on with", stderr, re.MULTILINE)) == 1
    assert (tmp_path / "out.partial").is_dir()
