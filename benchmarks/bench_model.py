"""A whole model: quality, size and speed of each method, by the protocol below.

    python benchmarks/bench_model.py --json benchmarks/results/cpu/model.json

SmolLM2-135M-Instruct (or --model), fp32. act_norms from the first 16 windows of 1024 tokens of
WikiText-2's validation text, perplexity and KL on the first 16 windows of its test text; both are
read from ../shared/data (or --data) and never copied. Everything but the relative objective is
measured on the checkpoint reloaded from disk. Speeds are medians of rounds in which all contenders
take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from real_layers import CALIBRATION, TEST, add_data_option, calibrated, require_data

import nowag_ext
from nowag_ext import evaluate
from nowag_ext.generate import encode_prompt, tokens_per_second
from nowag_ext.source import open_dense_model
from nowag_ext.text import read_text

DEFAULT = ("vq:d=4,bits=2", "vq:d=2,bits=3", "prune:sparsity=0.5", "prune:pattern=2:4")
PROMPT = "The history of the city begins with"


@dataclass
class Loaded:
    """A reloaded checkpoint and what is known of it."""

    name: str
    model: Any
    figures: dict[str, Any]


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """ "vq:d=4,bits=2" -> ("vq", {"d": 4, "bits": 2})."""
    method, _, rest = text.partition(":")
    settings: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        name, _, value = part.partition("=")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return method, settings


def compress(
    text: str,
    dense: Path,
    norms: dict[str, torch.Tensor],
    directory: Path,
    logits_on: torch.Tensor,
    data: Path,
) -> Loaded:
    """Compresses, saves, reloads, and checks that the reloaded model is the same bit for bit.

    "windows=16" among the settings is for block by block, with feedback, on so many windows of the
    calibration text, "head=2:4" with that for a packed head of d=2 at 4 bits; "distill=64" for
    distillation on so many windows of 512 tokens after those; "dtype=bfloat16" for a model that is
    so before it is compressed.
    """
    method, settings = parse_method(text)
    model, tokenizer = open_dense_model(dense, settings.pop("dtype", "auto"))
    learnt = settings.pop("distill", 0)
    if "head" in settings:
        d, _, bits = settings["head"].partition(":")
        settings["head"] = {"d": int(d), "bits": json.loads(bits)}
    if "windows" in settings:
        tokens = evaluate.tokenize(tokenizer, read_text(data / CALIBRATION))
        windows = evaluate.split_windows(tokens, 1024, settings.pop("windows"))
        nowag_ext.compress(model, windows, method, **settings)
        if learnt:
            rest = evaluate.split_windows(tokens[windows.numel() :], 512, learnt)
            nowag_ext.distill(model, open_dense_model(dense)[0], rest)
    else:
        nowag_ext.compress_model(model, norms, method, **settings)
    report = model.nowag_report
    nowag_ext.save_compressed(model, tokenizer, directory)
    reloaded = nowag_ext.load(directory)
    # Without the dense head: the rounding of torch's product depends on where its weights lie.
    with torch.inference_mode():
        equal = all(
            torch.equal(*(one.base_model(ids).last_hidden_state for one in (model, reloaded)))
            for ids in (logits_on[:, :64], logits_on[:, :1])
        )
    packed = {layer.name for layer in report.layers}
    figures = {
        "settings": report.settings,
        "bits_per_weight": report.bits_per_weight,
        "head": report.head
        and {**asdict(report.head), "bits_per_weight_with_head": report.bits_per_weight_with_head},
        "mean_relative_objective": report.mean_relative_objective,
        "compress_seconds": report.seconds + (report.distillation.seconds if learnt else 0.0),
        "stages": report.stages,
        "distillation": report.distillation and asdict(report.distillation),
        "peak_memory": report.peak_memory,
        "compressed_weights": report.compressed_weights,
        "checkpoint_bytes": checkpoint_bytes(directory),
        "packed_bytes_on_disk": stored_bytes(directory, packed),
        "reload_bit_equal": equal,
    }
    bits = figures["packed_bytes_on_disk"] * 8 / report.compressed_weights
    figures["disk_over_bits_per_weight"] = bits / report.bits_per_weight
    return Loaded(text, reloaded, figures)


def checkpoint_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def stored_bytes(directory: Path, modules: set[str]) -> int:
    """Bytes that the checkpoint's files hold for the tensors of these modules."""
    total = 0
    for file in directory.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, entry in header.items():
            if name.rpartition(".")[0] in modules:
                begin, end = entry["data_offsets"]
                total += end - begin
    return total


def quality(entry: Loaded, dense: Any, tokens: torch.Tensor, options: argparse.Namespace) -> None:
    """Adds perplexity, KL to dense and the token-by-token check."""
    size = {"window": options.window, "windows": options.windows}
    if entry.model is dense:
        entry.figures["perplexity"] = evaluate.perplexity(dense, tokens, **size).perplexity
        return
    compared = evaluate.compare_with_dense(entry.model, dense, tokens, **size)
    entry.figures["perplexity"] = compared.perplexity.perplexity
    entry.figures["kl_to_dense"] = compared.kl_divergence
    check = evaluate.teacher_forced_check(entry.model, tokens)
    entry.figures["stepwise_nll_relative_difference"] = check.relative_difference
    entry.figures["stepwise_argmax_agreement"] = check.argmax_agreement


def speeds(contenders: list[Loaded], tokenizer: Any, options: argparse.Namespace) -> None:
    """Adds tokens/s: medians of rounds in which everyone takes a turn."""
    prompt = encode_prompt(tokenizer, PROMPT, chat=False)
    samples: dict[str, list[float]] = {entry.name: [] for entry in contenders}
    for _ in range(options.rounds):
        for entry in contenders:
            speed = tokens_per_second(entry.model, tokenizer, prompt, new_tokens=options.new_tokens)
            samples[entry.name].append(speed)
    for entry in contenders:
        entry.figures["tokens_per_second"] = statistics.median(samples[entry.name])
        entry.figures["tokens_per_second_rounds"] = samples[entry.name]


def show_quality(entry: Loaded) -> None:
    figures = entry.figures
    line = f"{entry.name:<24} perplexity {figures['perplexity']:.2f}"
    if "kl_to_dense" in figures:
        line += (
            f"  KL {figures['kl_to_dense']:.4f}"
            f"  objective {figures['mean_relative_objective']:.4f}"
            f"  {figures['bits_per_weight']:.3f} bits/weight"
            f" (on disk x{figures['disk_over_bits_per_weight']:.4f})"
            f"  {figures['compress_seconds']:.1f} s"
            f"\n{'':<24} token by token: NLL {figures['stepwise_nll_relative_difference']:.4%} off,"
            f" argmax equal {figures['stepwise_argmax_agreement']:.2%};"
            f" reload bit-equal: {figures['reload_bit_equal']}"
        )
    print(line, flush=True)


def show_speeds(contenders: list[Loaded]) -> None:
    best = max(entry.figures["tokens_per_second"] for entry in contenders[:2])
    for entry in contenders:
        speed = entry.figures["tokens_per_second"]
        print(f"{entry.name:<24} {speed:6.1f} tokens/s, {speed / best:.2f}x the faster dense")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "methods", nargs="*", default=DEFAULT, help="vq:d=4,bits=2 prune:pattern=2:4"
    )
    parser.add_argument("--model", help="directory, hub id or .gguf; default: the demo's model")
    add_data_option(parser)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the speed measurement")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens a round")
    parser.add_argument("--keep", type=Path, help="keep the checkpoints in this directory")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's)")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    require_data(options.data)
    if options.threads:
        torch.set_num_threads(options.threads)
    print(harness.machine(), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        run(options, Path(options.keep or scratch))


def run(options: argparse.Namespace, directory: Path) -> None:
    start = time.perf_counter()
    dense, tokenizer, norms = calibrated(options.data, options.model)
    calibration_seconds = time.perf_counter() - start
    dense.save_pretrained(directory / "dense")
    tokenizer.save_pretrained(directory / "dense")
    test = evaluate.tokenize(tokenizer, read_text(options.data / TEST))
    half, _ = open_dense_model(directory / "dense", "bfloat16")
    contenders = [Loaded("dense fp32", dense, {}), Loaded("dense bf16", half, {})]
    quality(contenders[0], dense, test, options)
    show_quality(contenders[0])
    for index, method in enumerate(options.methods):
        entry = compress(
            method, directory / "dense", norms, directory / str(index), test[None, :], options.data
        )
        quality(entry, dense, test, options)
        show_quality(entry)
        contenders.append(entry)
    speeds(contenders, tokenizer, options)
    show_speeds(contenders)
    if options.json:
        write(options, contenders, calibration_seconds)


def write(
    options: argparse.Namespace, contenders: list[Loaded], calibration_seconds: float
) -> None:
    document = {
        "command": harness.command(),
        "machine": harness.machine(),
        "model": str(options.model or "SmolLM2-135M-Instruct, GGUF Q4_1, dequantised"),
        "window": options.window,
        "windows": options.windows,
        "load_and_calibration_seconds": calibration_seconds,
        "rows": [{"name": entry.name, **entry.figures} for entry in contenders],
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {options.json}")


if __name__ == "__main__":
    main()
