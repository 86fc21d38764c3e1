"""The command line on a tiny random model: results, sentences, exit status, what is left."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_process import fresh_python
from rich.console import Console
from rich.progress import Progress as Bars
from tiny_model import TEXT, save_tiny, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

import nowag_ext
from nowag_ext import _cpu, cli, disk, gemm, render
from nowag_ext.cli import app
from nowag_ext.evaluate import perplexity, tokenize
from nowag_ext.forecast import sizes
from nowag_ext.methods import LayerSettings
from nowag_ext.pipeline.compress import _Run
from nowag_ext.source import calibration_batches

pytestmark = pytest.mark.usefixtures("one_thread")

VQ = ["--d", "4", "--bits", "2", "--iters", "3", "--distill", "0"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A directory with a model, a text and its statistics."""
    directory = tmp_path_factory.mktemp("work")
    save_tiny(directory / "model")
    (directory / "text.txt").write_text(TEXT)
    arguments = ["--text", directory / "text.txt", "-o", directory / "stats.safetensors"]
    result = run("calibrate", directory / "model", *arguments, "--length", 64, "--samples", 5)
    assert result.exit_code == 0, result.output
    assert "Calibrating on 5 windows of 64 tokens, the first of the text" in one_line(result.output)
    return directory


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def one_line(text: str) -> str:
    return " ".join(text.split())


def fails_with(sentence: str, *arguments: object) -> None:
    """The command says one sentence on standard error, and exits with 1."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert re.search(sentence, result.stderr), result.stderr
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output


def test_statistics_are_those_of_the_api(work: Path) -> None:
    batches = calibration_batches(tokenize(tiny_tokenizer(), TEXT), samples=5, length=64)
    expected = nowag_ext.calibrate(tiny_llama(), batches)
    stored = nowag_ext.load_act_norms(work / "stats.safetensors")
    assert set(stored) == set(expected)
    assert all(torch.equal(stored[name], expected[name]) for name in expected)


def test_compress_then_eval_and_generate(work: Path, tmp_path: Path) -> None:
    output = tmp_path / "vq"
    result = run("compress", work / "model", "-o", output,
                 "--act-norms", work / "stats.safetensors", *VQ)  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads((output / "report.json").read_text())
    with (output / "layers.csv").open() as file:
        layers = list(csv.DictReader(file))
    assert len(layers) == len(report["layers"]) == 14
    assert report["settings"] == {
        "d": 4, "bits": 2, "iters": 3, "n_init": 1, "init": "kmeans++", "seed": 0,
    }  # fmt: skip
    assert f"{report['bits_per_weight']:.3f}" in result.output
    assert f"{report['mean_relative_objective']:.4f}" in result.output

    result = run("eval", output, "--text", work / "text.txt", "--window", 32, "--windows", 4)
    assert result.exit_code == 0, result.output
    tokens = tokenize(tiny_tokenizer(), TEXT)
    expected = perplexity(nowag_ext.load(output), tokens, window=32, windows=4).perplexity
    printed = float(result.output.split()[1])
    assert math.isclose(printed, expected, rel_tol=1e-4)
    assert "first 4 non-overlapping windows of 32 tokens" in one_line(result.output)
    dense = run("eval", work / "model", "--text", work / "text.txt", "--window", 32)
    assert float(dense.output.split()[1]) != printed
    assert f"first {len(tokens) // 32} non-overlapping" in one_line(dense.output)

    result = run("generate", output, "--prompt", "It was", "--max-new-tokens", 5, "--chat")
    assert result.exit_code == 0, result.output
    assert "tokens/s" in result.stderr


def test_compress_calibrates_by_itself(work: Path, tmp_path: Path) -> None:
    for name, source in {
        "text": ["--text", work / "text.txt", "--length", 64, "--samples", 5, "--recipe", "paper"],
        "file": ["--act-norms", work / "stats.safetensors"],
    }.items():
        result = run("compress", work / "model", "-o", tmp_path / name, *source,
                     "--method", "prune", "--pattern", "2:4")  # fmt: skip
        assert result.exit_code == 0, result.output
    one = (tmp_path / "text" / "model.safetensors").read_bytes()
    assert one == (tmp_path / "file" / "model.safetensors").read_bytes()


def test_compress_block_by_block(work: Path, tmp_path: Path) -> None:
    """--text means feedback, with one codebook: the same as in Python."""
    (tmp_path / "more.txt").write_text(TEXT[::-1])
    result = run("compress", work / "model", "-o", tmp_path / "out", *VQ, "--length", 64,
                 "--text", work / "text.txt", "--text", tmp_path / "more.txt", "--samples", 6,
                 "--resume")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "6 windows of 64 tokens, the first of the text, from 2 texts in turn" in one_line(
        result.output
    )
    tokens = [tokenize(tiny_tokenizer(), text)[: 3 * 64].view(3, 64) for text in (TEXT, TEXT[::-1])]
    model = tiny_llama()
    nowag_ext.compress(model, torch.stack(tokens, 1).view(6, 64), d=4, bits=2, iters=3)
    stored = nowag_ext.load(tmp_path / "out")
    assert len(list(stored.model.nowag_codebooks.parameters())) == 1
    for name, tensor in model.state_dict().items():
        assert torch.equal(stored.state_dict()[name], tensor), name
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["stages"]["forwards"] > 0
    assert "seconds in all: activation norms" in one_line(result.output)
    assert re.search(r"\. \d+\.\d MB of memory at most\.", one_line(result.output))
    assert report["calibration_tokens"] == 6 * 64
    assert "384 tokens, 4.0 for each input of the widest layer" in one_line(result.stderr)
    assert re.search(r"shared\s.*0\.0", result.output)
    assert f"{report['bits_per_weight']:.3f}" in result.output
    assert not (tmp_path / "out.partial").exists()


def test_layers_and_hidden_states_stay_on_disk(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = [work / "model", "--text", work / "text.txt", "--length", 64, "--samples", 4, *VQ]
    (tmp_path / "states").mkdir()
    seen = []
    compress = cli.compress.compress_blocks

    def look(model: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend(name for name, one in model.named_parameters() if one.is_meta)
        assert (tmp_path / "out.partial").is_dir()
        return compress(model, *args, **kwargs)

    monkeypatch.setattr(cli.compress, "compress_blocks", look)
    states = ["--offload", tmp_path / "states"]
    result = run("compress", *arguments, "-o", tmp_path / "out", *states)
    assert result.exit_code == 0, result.output
    assert len([name for name in seen if name.endswith("_proj.weight")]) == 14
    assert not any("embed" in name or "lm_head" in name for name in seen)
    assert not [one for one in caplog.records if one.name.startswith("accelerate")]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "states"]
    assert list((tmp_path / "states").iterdir()) == []
    result = run("compress", *arguments, "-o", tmp_path / "other", *states[:1], tmp_path / "none")
    assert result.exit_code == 2
    assert "--offload" in result.output
    assert not (tmp_path / "other").exists()


def test_codebook_a_layer(work: Path, tmp_path: Path) -> None:
    result = run("compress", work / "model", "-o", tmp_path / "out", *VQ, "--length", 64,
                 "--text", work / "text.txt", "--codebook-scope", "layer")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "16 were asked for" not in result.stderr
    assert "tokens, " not in result.stderr  # 1024, more than 8 for each of 96 inputs
    assert not hasattr(nowag_ext.load(tmp_path / "out").model, "nowag_codebooks")


def test_dense_format_loads_without_nowag(work: Path, tmp_path: Path) -> None:
    result = run("compress", work / "model", "-o", tmp_path / "dense", "--format", "dense",
                 "--act-norms", work / "stats.safetensors",
                 "--method", "prune", "--sparsity", 0.75, "--ignore", "down_proj")  # fmt: skip
    assert result.exit_code == 0, result.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    layer = model.model.layers[0].mlp
    assert float((layer.up_proj.weight == 0).double().mean()) == 0.75
    assert float((layer.down_proj.weight == 0).double().mean()) < 0.01
    assert (tmp_path / "dense" / "report.json").is_file()


def test_as_many_windows_as_there_is_time_for(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["compress", work / "model", "-o", tmp_path / "out", "--text", work / "text.txt",
                 "--length", 16, "--samples", "auto", "--minutes", 2.5, *VQ]  # fmt: skip
    asked: list[float] = []
    many = cli.compress._SAMPLES["feedback"] + 3

    def affordable(*arguments: Any) -> int:
        asked.append(arguments[-1])
        return many

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.compress, "affordable_samples", affordable)
    with monkeypatch.context() as patch:
        patch.setattr(_Run, "_layer", interrupted)  # codebooks are finished by then
        result = run(*arguments)
    assert result.exit_code == 130
    assert "go on with" in result.stderr
    # It goes on with as many, however fast the machine is now.
    monkeypatch.setattr(cli.compress, "affordable_samples", lambda *_: 1000)
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert asked == [150.0]
    assert not (tmp_path / "out.partial").exists()
    assert f"Calibrating on {many} windows of 16 tokens" in one_line(result.stdout)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["calibration_tokens"] == many * 16


def test_a_number_of_windows_alone_is_nothing_to_go_on_from(work: Path, tmp_path: Path) -> None:
    result = run("compress", work / "model", "-o", tmp_path / "out", *VQ, "--length", 100_000,
                 "--text", work / "text.txt", "--samples", "auto")  # fmt: skip
    assert result.exit_code == 1
    assert "less than one window of 100000" in result.stderr
    assert "go on with" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_fewer_windows_than_without_asking(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.compress, "affordable_samples", lambda *_: 3)
    result = run("compress", work / "model", "-o", tmp_path / "out", "--dry-run", *VQ,
                 "--text", work / "text.txt", "--samples", "auto")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "10 minutes are enough for 3 windows of text here" in one_line(result.stderr)
    assert f"From {cli.compress._SAMPLES['feedback']} windows" in one_line(result.stdout)


def test_dtype_is_stored(work: Path, tmp_path: Path) -> None:
    result = run("compress", work / "model", "-o", tmp_path / "out", "--dtype", "bfloat16",
                 "--act-norms", work / "stats.safetensors", "--method", "prune")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert nowag_ext.load(tmp_path / "out").dtype == torch.bfloat16


def test_resume_keeps_layers_until_the_checkpoint_is_written(work: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    model, norms = tiny_llama(), nowag_ext.load_act_norms(work / "stats.safetensors")
    settings = {"d": 4, "bits": 2, "iters": 3}

    def stop(name: str, done: float, total: float) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nowag_ext.compress_model(model, norms, work_dir=partial, progress=stop, **settings)
    result = run("compress", work / "model", "-o", tmp_path / "out", "--resume", *VQ,
                 "--act-norms", work / "stats.safetensors")  # fmt: skip
    assert result.exit_code == 0, result.output
    layers = json.loads((tmp_path / "out" / "report.json").read_text())["layers"]
    assert {layer["resumed"] for layer in layers} == {True, False}
    assert not partial.exists()


@pytest.mark.parametrize(
    ("sentence", "arguments"),
    [
        ("there is no model nowhere/at/all", ["{w}/text.txt", "nowhere/at/all"]),
        ("there is no text file .*missing", ["{w}/missing", "{w}/model"]),
    ],
)
def test_eval_refuses(work: Path, sentence: str, arguments: list[str]) -> None:
    text, model = (argument.format(w=work) for argument in arguments)
    fails_with(sentence, "eval", model, "--text", text)


@pytest.mark.parametrize("command", ["eval", "calibrate"])
def test_a_faster_dtype_is_named(
    command: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [command, work / "model", "--text", work / "text.txt"]
    window = {"eval": ["--window", 64], "calibrate": ["--length", 64]}[command]
    if command == "calibrate":
        arguments += ["-o", tmp_path / "stats.safetensors"]
    for fast, dtype, advice in [
        (False, "bfloat16", True),
        (False, "float32", False),
        (True, "bfloat16", False),
    ]:
        monkeypatch.setattr(gemm, "cpu_has_gemm", lambda dtype, fast=fast: fast)
        result = run(*arguments, *window, "--dtype", dtype)
        assert result.exit_code == 0, result.output
        named = f"nowag-ext {command} --dtype float32" in one_line(result.stderr)
        assert named == advice, result.stderr


def test_eval_refuses_text_that_is_not(work: Path, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "empty").write_bytes(b"")
    fails_with("not UTF-8", "eval", work / "model", "--text", tmp_path / "latin")
    fails_with("no tokens", "eval", work / "model", "--text", tmp_path / "empty")
    fails_with(
        "less than one window of 100000",
        *("eval", work / "model", "--text", work / "text.txt", "--window", 100_000),
    )
    fails_with(
        "dtype must be one of",
        *("eval", work / "model", "--text", work / "text.txt", "--dtype", "int8"),
    )


@pytest.mark.parametrize(
    ("sentence", "arguments"),
    [
        ("either --text FILE, or --act-norms", []),
        (
            "either --text FILE, or --act-norms",
            ["--act-norms", "{w}/stats.safetensors", "--text", "x"],
        ),
        ("recipe must be one of feedback, paper", ["--recipe", "magic", "--text", "{w}/text.txt"]),
        ("reads the text itself", ["--recipe", "feedback", "--act-norms", "{w}/stats.safetensors"]),
        (
            "--codebook-scope belongs to --recipe feedback",
            ["--codebook-scope", "model", "--act-norms", "{w}/stats.safetensors"],
        ),
        ("--codebook-scope must be one of", ["--codebook-scope", "all", "--text", "{w}/text.txt"]),
        ("less than one window of 1000000", ["--length", "1000000", "--text", "{w}/text.txt"]),
        ("no calibration file", ["--act-norms", "{w}/nothing"]),
        ("not a file of calibration", ["--act-norms", "{w}/model/model.safetensors"]),
        ("method must be one of", ["--method", "magic", "--text", "{w}/text.txt"]),
        ("no setting 'sparsity'", ["--sparsity", "0.5", "--text", "{w}/text.txt"]),
        ("format must be one of", ["--format", "pickle", "--text", "{w}/text.txt"]),
        (
            "bits must be an integer",
            ["--d", "3", "--bits", "2.5", "--text", "{w}/text.txt"],
        ),
        ("is too small", ["--d", "8", "--bits", "2", "--act-norms", "{w}/stats.safetensors"]),
        ("names no linear", ["--ignore", "nope", "--act-norms", "{w}/stats.safetensors"]),
        ("--samples must be a number .*'many'", ["--samples", "many", "--text", "{w}/text.txt"]),
        ("--samples must be a number .*'0'", ["--samples", "0", "--text", "{w}/text.txt"]),
        ("--minutes belongs to --samples auto", ["--minutes", "3", "--text", "{w}/text.txt"]),
        (
            "--minutes must be a finite number above 0, not nan",
            ["--samples", "auto", "--minutes", "nan", "--text", "{w}/text.txt"],
        ),
        (
            "--minutes must be a finite number above 0, not inf",
            ["--samples", "auto", "--minutes", "inf", "--text", "{w}/text.txt"],
        ),
    ],
)
def test_compress_refuses(work: Path, tmp_path: Path, sentence: str, arguments: list[str]) -> None:
    output = tmp_path / "out"
    rest = [argument.format(w=work) for argument in arguments]
    fails_with(sentence, "compress", work / "model", "-o", output, *rest)
    assert list(tmp_path.iterdir()) == []


def test_compress_refuses_before_it_calibrates(work: Path, tmp_path: Path) -> None:
    result = run("compress", work / "model", "-o", tmp_path / "out", "--d", 8, "--recipe", "paper",
                 "--text", work / "text.txt", "--length", 64)  # fmt: skip
    assert "is too small" in result.stderr
    assert "Calibrating" not in result.stdout


def test_compress_does_not_overwrite_unasked(work: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    arguments = ["compress", work / "model", "-o", tmp_path, "--method", "prune",
                 "--act-norms", work / "stats.safetensors"]  # fmt: skip
    fails_with("exists and is not empty", *arguments)
    assert (tmp_path / "mine").read_text() == "precious"
    fails_with("mine in it was not written by nowag_ext", *arguments, "--overwrite")
    assert (tmp_path / "mine").read_text() == "precious"
    (tmp_path / "mine").unlink()
    assert run(*arguments).exit_code == 0
    before = (tmp_path / "model.safetensors").read_bytes()
    assert run(*arguments, "--pattern", "2:4", "--overwrite").exit_code == 0
    assert (tmp_path / "model.safetensors").read_bytes() != before
    again = tmp_path.with_name(f"{tmp_path.name}-again")
    fails_with("compressed|quantised", "compress", tmp_path, "-o", again,
               "--act-norms", work / "stats.safetensors", "--method", "prune")  # fmt: skip


def test_names_are_printed_as_they_are(work: Path, tmp_path: Path) -> None:
    """Square brackets are markup to rich, and a name of theirs was once an error at the end."""
    output = tmp_path / "[/oops] [bold]out"
    result = run("compress", work / "model", "-o", output, "--method", "prune",
                 "--act-norms", work / "stats.safetensors")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "[/oops] [bold]out" in one_line(result.stdout)
    statistics = tmp_path / "[red]stats[/nothing]"
    result = run("calibrate", work / "model", "--text", work / "text.txt", "-o", statistics,
                 "--length", 64, "--samples", 1)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "[red]stats[/nothing]" in one_line(result.stdout).replace(" ", "")
    fails_with(r"there is no text file .*\[/x\]",
               "eval", output, "--text", tmp_path / "[/x]")  # fmt: skip


def test_traceback_on_request(work: Path) -> None:
    result = run("--traceback", "eval", work / "model", "--text", work / "missing")
    assert isinstance(result.exception, FileNotFoundError)


def test_env_names_what_runs_and_what_is_missing() -> None:
    result = run("env")
    assert result.exit_code == 0
    for fact in (nowag_ext.__version__, torch.__version__, "transformers", "threads", "cuda"):
        assert fact in result.output
    if not torch.cuda.is_available():
        assert "No CUDA device can be used" in result.output


def test_env_says_that_a_level_was_forced() -> None:
    code = "from nowag_ext.cli import app; app()"
    result = subprocess.run(
        **fresh_python("-c", code, "env", NOWAG_SIMD="scalar"), capture_output=True, check=True
    )
    if _cpu.simd_best() != "scalar":
        assert "because NOWAG_SIMD=scalar" in result.stdout


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [(signal.SIGINT, 130, "Interrupted."), (signal.SIGTERM, 143, "Terminated.")],
)
def test_interrupt_leaves_nothing(
    work: Path, tmp_path: Path, number: signal.Signals, status: int, said: str
) -> None:
    """A signal in the middle of the compression: its status, no file, no traceback."""
    code = (
        "import signal, time, nowag_ext.cli as cli\n"
        # A shell that starts the tests in the background has them ignore it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "compress = cli.compress.compress_model\n"
        "def announced(*args, progress, **kwargs):\n"
        "    def tell(*told):\n"
        "        progress(*told)\n"
        "        print('working', flush=True)\n"
        "        time.sleep(60)\n"
        "    compress(*args, progress=tell, **kwargs)\n"
        "cli.compress.compress_model = announced\n"
        "cli.app()\n"
    )
    arguments = ["compress", work / "model", "-o", tmp_path / "out", "--d", 4,
                 "--iters", 1_000_000, "--act-norms", work / "stats.safetensors"]  # fmt: skip
    process = subprocess.Popen(
        **fresh_python("-c", code, *arguments, OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert "working" in process.stdout.readline()
    time.sleep(0.05)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert said in errors
    assert "Traceback" not in output + errors
    assert list(tmp_path.iterdir()) == []


def test_code_of_a_model_is_run_only_when_it_is_trusted(work: Path, tmp_path: Path) -> None:
    model, ran = tmp_path / "model", tmp_path / "ran"
    save_tiny(model)
    config = json.loads((model / "config.json").read_text())
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (model / "config.json").write_text(
        json.dumps({**config, "model_type": "own", "auto_map": auto_map})
    )
    (model / "own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'own'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    out = tmp_path / "out"
    text = ["--text", work / "text.txt"]
    evaluate = ["eval", model, *text, "--window", 32, "--windows", 2]
    compress = ["compress", model, "-o", out, "--method", "prune", *text,
                "--length", 32, "--samples", 2]  # fmt: skip
    statistics = tmp_path / "stats"
    for arguments in (
        evaluate, compress, ["generate", model, "--prompt", "It"],
        ["calibrate", model, *text, "-o", statistics, "--length", 32],
    ):  # fmt: skip
        command = [str(argument) for argument in arguments]
        result = CliRunner().invoke(app, command, input="y\ny\n")
        assert result.exit_code == 1
        assert "brings Python code of its own" in result.stderr
        assert not ran.exists()
    result = run(*compress, "--trust-remote-code")
    assert result.exit_code == 0, result.output
    assert ran.exists()
    ran.unlink()
    fails_with("brings Python code of its own", "eval", out, *text, "--window", 32)
    assert not ran.exists()
    result = run("eval", out, *text, "--window", 32, "--windows", 2, "--trust-remote-code")
    assert result.exit_code == 0, result.output


def test_what_is_not_copied_is_said(work: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    (tmp_path / "secret").write_text("a key")
    (tmp_path / "model" / "LICENSE").symlink_to(tmp_path / "secret")
    (tmp_path / "model" / "NOTICE").write_text("Made by hand.")
    result = run("compress", tmp_path / "model", "-o", tmp_path / "out", "--method", "prune",
                 "--act-norms", work / "stats.safetensors")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "LICENSE was not copied: it is a link that leads out" in one_line(result.stderr)
    assert (tmp_path / "out" / "NOTICE").read_text() == "Made by hand."
    assert not (tmp_path / "out" / "LICENSE").exists()


def test_compress_with_overrides(work: Path, tmp_path: Path) -> None:
    common = ["compress", work / "model", "-o", tmp_path / "out", "--d", 4, "--bits", 1.5]
    common += ["--iters", 2, "--act-norms", work / "stats.safetensors"]
    result = run(*common, "--override", "down_proj method=prune", "--override", "up_proj bits=1")
    assert result.exit_code == 0, result.output
    assert "(prune:" in result.output
    assert "(bits 1)" in result.output
    with (tmp_path / "out" / "layers.csv").open() as file:
        methods = {row["name"].rpartition(".")[2]: row["method"] for row in csv.DictReader(file)}
    assert methods["down_proj"] == "prune"
    assert methods["up_proj"] == "vq"
    fails_with("override 'up_proj': d must be", *common, "--override", "up_proj d=9")


def test_refusals_name_options(work: Path, tmp_path: Path) -> None:
    compress = ["compress", work / "model", "-o", tmp_path / "out"]
    with_norms = [*compress, "--act-norms", work / "stats.safetensors"]
    fails_with("Error: --iters must be", *with_norms, "--iters", 0)
    fails_with("Error: --n-init must be", *with_norms, "--n-init", 0)
    fails_with(r"Error: --d must be an integer from 1", *with_norms, "--d", 9)
    fails_with("Error: --dtype must be one of", *with_norms, "--dtype", "int3")
    fails_with("Error: --text: there is no text file", *compress, "--text", tmp_path / "missing")
    fails_with("Error: --text: .* is a directory", *compress, "--text", tmp_path)
    fails_with("Error: --act-norms: there is no calib", *compress, "--act-norms", tmp_path / "no")
    fails_with("Error: --temperature must be 0 or a positive number",
               "generate", work / "model", "--prompt", "x", "--temperature", "nan")  # fmt: skip
    for output, sentence in {
        work / "model": "must not hold each other|exists and is not empty",
        work / "model" / "new": "must not hold each other",
        work / "text.txt": "is a file: a directory is needed",
        "/dev/null": "is a device: a directory is needed",
        "/proc/nowag": "cannot be written",
        "/": "exists and is not empty",
    }.items():
        for more in ([], ["--overwrite"]):
            result = run(*with_norms, *more, "-o", output)
            assert result.exit_code == 1
            assert re.match(f"Error: --output: .*({sentence})", result.stderr), result.stderr
    assert list(tmp_path.iterdir()) == []


def test_calibrate_replaces_only_statistics(work: Path, tmp_path: Path) -> None:
    common = ["calibrate", work / "model", "--text", work / "text.txt", "--length", 64,
              "--samples", 1]  # fmt: skip
    text = (work / "text.txt").read_bytes()
    model = (work / "model" / "model.safetensors").read_bytes()
    for file in (work / "text.txt", work / "model" / "model.safetensors"):
        fails_with("--output: .* is no file of calibration statistics", *common, "-o", file)
    fails_with("--output: /dev/null: is a device: a regular file", *common, "-o", "/dev/null")
    assert (work / "text.txt").read_bytes() == text
    assert (work / "model" / "model.safetensors").read_bytes() == model
    (tmp_path / "link").symlink_to("stats")
    for _ in range(2):
        assert run(*common, "-o", tmp_path / "link").exit_code == 0
    assert (tmp_path / "link").is_symlink()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "stats"]


def test_room_is_looked_for_before_the_model_is_read(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configuration alone says how much will be written."""
    settings = LayerSettings("vq", {"d": 4, "bits": 2}, {})
    needed = sizes(tiny_llama(), settings, ["lm_head"], "layer", dense=False).written
    arguments = ["compress", work / "model", "-o", tmp_path / "out", *VQ,
                 "--act-norms", work / "stats.safetensors"]  # fmt: skip
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=needed - 1))
    with monkeypatch.context() as patched:
        patched.setattr(disk, "open_dense_model", None)
        fails_with("--output: .*0.2 MB are needed but the disk has 0.2 MB free", *arguments)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    model = tiny_llama()
    norms = nowag_ext.load_act_norms(work / "stats.safetensors")
    nowag_ext.compress_model(model, norms, d=4, bits=2, iters=1)
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    assert needed == sum(tensors.values()) + model.nowag_report.bytes


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing reads weights."""
    for function in ("dense_model", "load"):
        monkeypatch.setattr(f"nowag_ext.source.{function}", None)


WITH_TEXT: dict[str, list[str]] = {
    "calibrate": ["-o", "out"], "compress": ["-o", "out"], "eval": [],
}  # fmt: skip


@pytest.mark.parametrize("command", WITH_TEXT)
def test_a_short_text_is_refused_before_weights_are_read(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unread: None, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("It is.")
    long = ["--text", work / "text.txt"] if command != "eval" else []
    fails_with(
        r"the text has \d+ tokens, less than one window of 64",
        command, work / "model", *long, "--text", "short.txt", *WITH_TEXT[command],
        "--window" if command == "eval" else "--length", 64,
    )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


@pytest.mark.parametrize("command", [*WITH_TEXT, "generate", "compress from statistics"])
def test_a_missing_tokenizer_is_found_before_weights_are_read(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unread: None, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("model")
    given = ["--text", work / "text.txt", *WITH_TEXT.get(command, [])]
    if command == "generate":
        given = ["--prompt", "It"]
    elif command == "compress from statistics":
        given = ["--act-norms", work / "stats.safetensors", "-o", "out", *VQ]
    fails_with("there is no tokenizer beside the model model", command.split()[0], "model", *given)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_prompt_is_refused_before_weights_are_read(
    work: Path, tmp_path: Path, unread: None
) -> None:
    shutil.copytree(work / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    fails_with("has no chat template: leave --chat out",
               "generate", tmp_path / "model", "--prompt", "It", "--chat")  # fmt: skip
    fails_with("the prompt is empty", "generate", tmp_path / "model", "--prompt", "")


def test_a_model_of_another_kind_is_refused_briefly(tmp_path: Path) -> None:
    """transformers lists all models that it has; one sentence is enough."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "smolvlm"}')
    for command in ("eval", "compress"):
        text = [command, tmp_path / "model", "--text", "/dev/null"]
        more = ["-o", tmp_path / "out"] if command == "compress" else []
        result = run(*text, *more)
        assert result.exit_code == 1
        assert "SmolVLMConfig" in result.stderr
        assert len(result.stderr) < 500
        assert result.stderr.count("\n") == 1


def test_temperature(work: Path) -> None:
    common = ["generate", work / "model", "--prompt", "It was", "--max-new-tokens", 12]
    texts = [
        run(*common, *more).stdout
        for more in (
            [], ["--temperature", 0], ["--temperature", 3], ["--temperature", 3, "--seed", 0],
            ["--temperature", 3, "--seed", 1],
        )
    ]  # fmt: skip
    assert texts[0] == texts[1] != texts[2] == texts[3] != texts[4]


def test_completion_can_be_installed() -> None:
    assert "--install-completion" in run("--help").output


def test_progress_counts_from_where_a_stage_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an earlier stage nor what an earlier run finished makes the estimate wrong."""
    now = [0.0]
    console = Console(file=io.StringIO(), force_terminal=True, get_time=lambda: now[0])
    seen = []
    monkeypatch.setattr(Bars, "__exit__", lambda self, *_: (seen.append(self), self.stop())[1])
    times = render._Times()
    with render.progress_bar(console) as progress:
        progress("calibrate", 8, 8)
        now[0] = 100.0
        progress("one", 50, 100)
        now[0] = 110.0
        progress("two", 60, 100)
    assert str(times.render(seen[0].tasks[0])) == "0:00:10 elapsed, 0:00:40 left"
