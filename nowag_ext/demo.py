"""The main job on a real model with nothing given: compress, save, reload, measure, compare."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nowag_ext.calibrate import calibrate
from nowag_ext.checkpoint import load, save_compressed
from nowag_ext.demo_model import demo_model
from nowag_ext.demo_text import demo_text
from nowag_ext.environment import describe_environment
from nowag_ext.evaluate import Perplexity, perplexity, tokenize
from nowag_ext.files import atomic_directory, check_apart, require_space
from nowag_ext.gemm import gemm_dtype
from nowag_ext.generate import encode_prompt, generate, tokens_per_second
from nowag_ext.model import compress_model
from nowag_ext.pipeline.compress import compress
from nowag_ext.render import dtype_name, loading, megabytes, progress_bar, table
from nowag_ext.report import settings_text
from nowag_ext.source import calibration_batches, open_dense_model

RESULT_FILE = "demo.json"

# Windows of the text that activation norms are of: they need few.
_NORM_WINDOWS = 4
STORED = torch.bfloat16
PROMPT = "A list in Python is"


@dataclass(frozen=True)
class Effort:
    """How much text and how many iterations the demo spends; all of it is printed."""

    window: int = 512
    calibration_windows: int = 8
    held_out_windows: int = 6
    iters: int = 10
    new_tokens: int = 32
    rounds: int = 2
    sample_tokens: int = 48

    @classmethod
    def fast(cls) -> Effort:
        return cls(calibration_windows=2, held_out_windows=2, iters=5, new_tokens=16)


@dataclass(frozen=True)
class Method:
    """One row of the table: a method with its settings.

    ``by_block`` says that layers make up for the errors before them (``compress``), not each alone
    (``compress_model``).
    """

    name: str
    directory: str
    method: str
    settings: dict[str, Any]
    by_block: bool = False


@dataclass(frozen=True)
class DemoRow:
    """What one model, dense or compressed, came to; measured on the reloaded checkpoint.

    Attributes:
        bits_per_weight: of the compressed layers, everything stored for them counted.
        bytes: of the checkpoint's safetensors files, embeddings and norms included.
        compress_seconds: from the text to packed weights; None for the dense model.
        tokens_per_second: greedy, one sequence.
        dense_tokens_per_second: the dense model's, measured in turn with this one's.
    """

    name: str
    directory: str
    settings: dict[str, Any]
    bits_per_weight: float
    bytes: int
    perplexity: float
    compress_seconds: float | None
    tokens_per_second: float
    dense_tokens_per_second: float
    sample: str


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo measured, as in demo.json.

    Attributes:
        generation_dtype: in which tokens/s were measured: the faster for the dense model.
        quality_dtype: in which calibration and perplexity ran: the same, or float32 where this CPU
            multiplies many tokens much faster in it.
    """

    model: str
    stored_dtype: str
    generation_dtype: str
    quality_dtype: str
    dense_tokens_per_second: dict[str, float]
    protocol: str
    window: int
    effort: Effort
    seconds: float
    environment: dict[str, str]
    rows: list[DemoRow] = field(default_factory=list)


def methods(effort: Effort) -> list[Method]:
    """The ways of compressing that the demo compares."""
    bits = {"d": 4, "bits": 2, "iters": effort.iters}
    return [
        Method("VQ 2 bits", "vq-2-bits", "vq", bits, by_block=True),
        Method("50 %", "pruned-50-percent", "prune", {"sparsity": 0.5}),
    ]


def run_demo(
    model: str | None, output: Path, *, out: Console, err: Console, effort: Effort
) -> DemoResult:
    """Compresses a model in two ways, prints one table and samples, and leaves the checkpoints.

    Args:
        model: directory, hub id or .gguf file; None for SmolLM2-135M-Instruct.
        output: directory for the checkpoints and demo.json. It appears whole at the end; a
            directory that an earlier demo left is replaced.
        out, err: where results and progress go.
        effort: how much text and how many iterations.

    Raises:
        OSError: the model cannot be had, or ``output`` holds something else.
        ValueError: a layer cannot be compressed this way; the sentence names it.
    """
    overwrite = (output / RESULT_FILE).is_file()
    with atomic_directory(output, overwrite=overwrite) as directory:
        source = str(demo_model()) if model is None else model
        check_apart(output.resolve(), source)
        result = _Demo(source, directory, effort, err).run()
        (directory / RESULT_FILE).write_text(json.dumps(asdict(result), indent=2) + "\n")
    _show(result, output, out)
    return result


class _Demo:
    """One run: the dense model and its tokenizer, the text, what time it is."""

    def __init__(self, source: str, directory: Path, effort: Effort, err: Console) -> None:
        self.source, self.directory, self.effort, self.err = source, directory, effort, err
        self.text = demo_text()
        self.start = time.perf_counter()

    def run(self) -> DemoResult:
        self._tell(f"loading {self.source}")
        self._store_dense()
        loaded, speeds = self._load_dense()
        tokens = tokenize(self.tokenizer, self.text.calibration)
        self.calibration = calibration_batches(
            tokens, samples=self.effort.calibration_windows, length=self.window, seed=0
        )
        rows = [self._dense_row(loaded)]
        act_norms, seconds = self._calibrate(loaded[self.quality_dtype])
        del loaded
        rows += [
            self._by_block(method)
            if method.by_block
            else self._by_layer(method, act_norms, seconds)
            for method in methods(self.effort)
        ]
        environment = describe_environment()
        return DemoResult(
            model=self.source,
            stored_dtype=dtype_name(STORED),
            generation_dtype=dtype_name(self.dtype),
            quality_dtype=dtype_name(self.quality_dtype),
            dense_tokens_per_second=speeds,
            protocol=self.protocol,
            window=self.window,
            effort=self.effort,
            seconds=time.perf_counter() - self.start,
            environment={**environment.versions, **environment.backends},
            rows=rows,
        )

    def _tell(self, what: str) -> None:
        self.err.print(f"{time.perf_counter() - self.start:6.1f} s  {what}", soft_wrap=True)

    def _store_dense(self) -> None:
        """Writes the model in bf16: what the others start from and are compared with."""
        with loading(self.err, self.source):
            dense, tokenizer = open_dense_model(self.source, dtype_name(STORED))
        # This one and two compressed, of which the pruned is the larger, over half of it.
        size = sum(parameter.nbytes for parameter in dense.parameters())
        require_space(self.directory, 3 * size)
        dense.save_pretrained(self.directory / "dense")
        tokenizer.save_pretrained(self.directory / "dense")

    def _load_dense(self) -> tuple[dict[torch.dtype, Any], dict[str, float]]:
        """Loads the stored model in two dtypes and chooses that in which it generates faster.

        Returns:
            The models by dtype, and their tokens/s by its name.
        """
        loaded: dict[torch.dtype, Any] = {}
        speeds = {}
        for dtype in (torch.float32, torch.bfloat16):
            model, tokenizer = open_dense_model(self.directory / "dense", dtype_name(dtype))
            self.tokenizer = tokenizer
            self.window = min(
                self.effort.window, getattr(model.config, "max_position_embeddings", sys.maxsize)
            )
            # To be gone on with, as the text that is calibrated on is: it holds no conversations.
            self.prompt = encode_prompt(tokenizer, PROMPT, chat=False)
            loaded[dtype], speeds[dtype] = model, self._speed(model)
        self.dtype = max(speeds, key=lambda dtype: speeds[dtype])
        self.dense = loaded[self.dtype]
        self.quality_dtype = gemm_dtype(self.dtype, self.dense.device)
        named = {dtype_name(dtype): speed for dtype, speed in speeds.items()}
        listed = ", ".join(f"{speed:.1f} in {name}" for name, speed in named.items())
        self._tell(f"dense tokens/s: {listed}; all below generates in {dtype_name(self.dtype)}")
        return loaded, named

    def _calibrate(self, model: Any) -> tuple[dict[str, torch.Tensor], float]:
        """Activation norms, and the seconds that they took."""
        self._tell("calibrating")
        start = time.perf_counter()
        with progress_bar(self.err) as progress:
            windows = self.calibration[:_NORM_WINDOWS]
            act_norms = calibrate(model, windows, progress=progress)
        return act_norms, time.perf_counter() - start

    def _dense_row(self, loaded: dict[torch.dtype, Any]) -> DemoRow:
        self._tell("measuring the dense model")
        method = Method("dense", "dense", "", {})
        return self._measure(method, loaded.__getitem__, bits=8 * STORED.itemsize, seconds=None)

    def _by_block(self, method: Method) -> DemoRow:
        model, tokenizer = self._open(method)
        with progress_bar(self.err) as progress:
            tokens = torch.cat(self.calibration)
            compress(model, tokens, method.method, progress=progress, **method.settings)
        return self._compressed_row(method, model, tokenizer)

    def _by_layer(
        self, method: Method, act_norms: Mapping[str, torch.Tensor], calibration_seconds: float
    ) -> DemoRow:
        model, tokenizer = self._open(method)
        with progress_bar(self.err) as progress:
            compress_model(model, act_norms, method.method, progress=progress, **method.settings)
        return self._compressed_row(method, model, tokenizer, calibration_seconds)

    def _open(self, method: Method) -> tuple[Any, Any]:
        self._tell(f"compressing: {method.name}, {settings_text(method.settings)}")
        return open_dense_model(self.directory / "dense", dtype_name(STORED))

    def _compressed_row(
        self, method: Method, model: Any, tokenizer: Any, calibration_seconds: float = 0.0
    ) -> DemoRow:
        """Saves, reloads, and measures what was reloaded."""
        report = model.nowag_report
        directory = self.directory / method.directory
        save_compressed(model, tokenizer, directory)
        del model
        self._tell(f"measuring: {method.name}")
        return self._measure(
            method,
            lambda dtype: load(directory, dtype=dtype),
            bits=report.bits_per_weight,
            seconds=report.seconds + calibration_seconds,
        )

    def _measure(
        self,
        method: Method,
        load_in: Callable[[torch.dtype], Any],
        *,
        bits: float,
        seconds: float | None,
    ) -> DemoRow:
        model = load_in(self.quality_dtype)
        quality = self._perplexity(model)
        self.protocol = quality.protocol()
        if self.dtype != self.quality_dtype:
            model = load_in(self.dtype)
        dense_speeds, speeds = [], []
        for _ in range(self.effort.rounds):
            dense_speeds.append(self._speed(self.dense))
            speeds.append(dense_speeds[-1] if model is self.dense else self._speed(model))
        sample = generate(
            model, self.tokenizer, self.prompt, max_new_tokens=self.effort.sample_tokens
        )
        return DemoRow(
            name=method.name,
            directory=method.directory,
            settings=method.settings,
            bits_per_weight=bits,
            bytes=_checkpoint_bytes(self.directory / method.directory),
            perplexity=quality.perplexity,
            compress_seconds=seconds,
            tokens_per_second=statistics.median(speeds),
            dense_tokens_per_second=statistics.median(dense_speeds),
            sample=sample.text,
        )

    def _perplexity(self, model: Any) -> Perplexity:
        tokens = tokenize(self.tokenizer, self.text.held_out)
        with progress_bar(self.err) as progress:
            return perplexity(
                model,
                tokens,
                window=self.window,
                windows=self.effort.held_out_windows,
                progress=progress,
            )

    def _speed(self, model: Any) -> float:
        return tokens_per_second(
            model, self.tokenizer, self.prompt, new_tokens=self.effort.new_tokens
        )


def _checkpoint_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def _show(result: DemoResult, output: Path, out: Console) -> None:
    out.print(_table(result))
    effort = result.effort
    out.print(
        f"Text: Python's own language reference, cut by topic: {effort.calibration_windows} "
        f"windows of {result.window} tokens for calibration; "
        f"perplexity on the other half, {result.protocol}. At most {effort.iters} k-means "
        f"iterations. Few of each: for figures to rely on use the commands one by one. VQ goes "
        "through the model block by block; pruning takes every layer alone, by norms of the first "
        f"{min(_NORM_WINDOWS, effort.calibration_windows)} windows.",
        soft_wrap=True,
    )
    out.print(
        f"Stored in {result.stored_dtype}; calibration and perplexity in {result.quality_dtype}. "
        f"tokens/s: in {result.generation_dtype}, the faster for the dense model here, greedy, one "
        "sequence, in turn with the dense model.",
        soft_wrap=True,
    )
    for row in result.rows:
        out.print(f"\n{row.name}", style="bold", highlight=False)
        out.print(f"{PROMPT} ... {row.sample.strip()}", markup=False, soft_wrap=True)
    out.print(
        f"\n{result.seconds:.0f} s in all. Checkpoints and {RESULT_FILE} are in {output}: "
        f"nowag-ext generate {output / result.rows[1].directory} --prompt '...'",
        soft_wrap=True,
    )


def _table(result: DemoResult) -> Table:
    dense = result.rows[0]
    rows = [
        (
            row.name,
            f"{row.bits_per_weight:.2f}",
            megabytes(row.bytes),
            f"{row.bytes / dense.bytes:.0%}",
            f"{row.perplexity:.2f}",
            "" if row.compress_seconds is None else f"{row.compress_seconds:.1f}",
            f"{row.tokens_per_second:.1f}",
            f"{row.tokens_per_second / row.dense_tokens_per_second:.2f}",
        )
        for row in result.rows
    ]
    columns = (
        "", "bits/\nweight", "MB on\ndisk", "of\nbf16", "\nperplexity", "seconds to\ncompress",
        "tokens\n/s", "x\ndense",
    )  # fmt: skip
    return table(Path(result.model).name, columns, rows)
