"""The command ``nowag-ext``: every subcommand is a few calls of the package's public functions."""

from __future__ import annotations

import functools
import logging
import math
import os
import shlex
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import torch
import transformers
import typer
import typer.core
from rich.console import Console
from torch import Tensor

from nowag_ext import cli_options as options
from nowag_ext.calibrate import (
    CalibrationStatistics,
    check_statistics_file,
    collect_statistics,
    load_act_norms,
)
from nowag_ext.cli_sentences import named_options, one_sentence
from nowag_ext.cost import Work, affordable_samples, forecast
from nowag_ext.decoder import decoder_linears
from nowag_ext.demo import Effort, run_demo
from nowag_ext.disk import Job, kept, of_argument, source_facts
from nowag_ext.environment import describe_environment
from nowag_ext.evaluate import perplexity, split_windows
from nowag_ext.files import temporary_directory
from nowag_ext.gemm import gemm_dtype
from nowag_ext.generate import check_generation, encode_prompt
from nowag_ext.generate import generate as generate_text
from nowag_ext.model import compress_model
from nowag_ext.pipeline.codebooks import SharedCodebooks
from nowag_ext.pipeline.compress import compress as compress_blocks
from nowag_ext.pipeline.ranks import (
    launched,
    launched_rank,
    launcher,
    one_voice,
    process_group,
    spoken_for,
)
from nowag_ext.plan import plan_compression
from nowag_ext.render import (
    dtype_name,
    environment_tables,
    forecast_tables,
    loading,
    progress_bar,
    report_table,
    stages_text,
)
from nowag_ext.resume import LayerStore, run_key, work_directory
from nowag_ext.source import mixed_batches, open_dense_model, open_model, open_tokenizer
from nowag_ext.startup import raise_again
from nowag_ext.text import Text
from nowag_ext.version import __version__


class _Commands(typer.core.TyperGroup):
    """Remembers the command line, to say how to go on after an interruption; says things once."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        name = launcher() if launched() > 1 else (ctx.info_name or "nowag-ext").split()
        _shown["command"] = shlex.join([*name, *args])
        return super().parse_args(ctx, args)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        with one_voice():
            return super().main(*args, **kwargs)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compresses the linear layers of causal language models by NoWag, and runs the result.",
)
# Names of files, layers and models are printed as they are, brackets and all.
_out = Console(highlight=False, markup=False)
_err = Console(stderr=True, highlight=False, markup=False)
_shown: dict[str, Any] = {"traceback": False, "command": ""}

# For each input of a layer; its Hessian follows the text by chance if there are fewer.
_FEW_TOKENS = 8

# Windows of calibration text that each recipe reads unless told otherwise.
_SAMPLES = {"feedback": 32, "paper": 128}

# What --samples auto may take.
_MINUTES = 10.0

Command = TypeVar("Command", bound=Callable[..., Any])


def _show_version(wanted: bool) -> None:
    if wanted:
        _out.print(f"nowag-ext {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    traceback: options.Traceback = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    _shown["traceback"] = traceback


def _reported(command: Command) -> Command:
    """Errors become one sentence and exit status 1; an interrupt 130, being terminated 143."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = signal.signal(signal.SIGTERM, _on_terminate)
        try:
            raise_again()
            _quiet_libraries()
            if launched() > 1 and command.__name__ != "compress":
                raise ValueError("torchrun is for compress alone: start this without it.")
            return command(*args, **kwargs)
        except (KeyboardInterrupt, _Terminated) as stop:
            terminated = isinstance(stop, _Terminated)
            why = "Terminated" if terminated else "Interrupted"
            if terminated and launched() > 1:
                why += " by torchrun: it was ended itself, or another process has ended"
            _say(f"{why}.{_how_to_go_on(stop)}")
            raise typer.Exit(143 if terminated else 130) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if _shown["traceback"]:
                raise
            _say(f"Error: {one_sentence(error)}{_how_to_go_on(error)}")
            raise typer.Exit(1) from None
        finally:
            signal.signal(signal.SIGTERM, before)

    return run  # type: ignore[return-value]


class _Terminated(BaseException):
    """SIGTERM: unwinds as an interrupt does, so that what is half-written goes."""


def _on_terminate(_number: int, _frame: Any) -> NoReturn:
    raise _Terminated


def _say(sentence: str) -> None:
    if not spoken_for():
        _err.print(sentence, soft_wrap=True)


def _how_to_go_on(stop: BaseException) -> str:
    directory = getattr(stop, "kept", None)
    if directory is None:
        return ""
    return f" What is finished is kept in {directory}; go on with: {_shown['command']}"


def _quiet_libraries() -> None:
    """No progress bars and no advice from libraries between ours."""
    warnings.filterwarnings("ignore", module=r"(torch|transformers|huggingface_hub)(\..*)?")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity(logging.ERROR)
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # that layers are on disk: as intended


@app.command()
@_reported
def demo(
    model: options.DemoModel = None,
    output: options.DemoOutput = Path("nowag-demo"),
    fast: options.Fast = False,
) -> None:
    """Compresses a small real model, to 2 bits and by pruning, and shows what each costs."""
    run_demo(model, output, out=_out, err=_err, effort=Effort.fast() if fast else Effort())


@app.command()
@_reported
def calibrate(
    model: options.Model,
    text: options.Texts,
    output: options.StatisticsFile,
    samples: options.Samples = 128,
    length: options.Length = 1024,
    seed: options.SampleSeed = None,
    dtype: options.Dtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    resume: options.Resume = True,
) -> None:
    """Measures activation norms on text, once for all later compressions of the model."""
    with of_argument("output"):
        target = check_statistics_file(output)
    with kept(target, resume=resume) as store:
        texts = _open_texts(text)
        facts = _text_facts(texts, samples, length, seed)
        store.begin(named_options({**source_facts(model, dtype), **facts}))
        tokenizer = open_tokenizer(model, trust_remote_code=trust_remote_code)
        windows = _windows(tokenizer, texts, samples, length, seed)
        with loading(_err, model):
            loaded, _ = open_dense_model(
                model, dtype, tokenizer=tokenizer, trust_remote_code=trust_remote_code
            )
        statistics = _calibrate(loaded, windows, store)
        statistics.save(target)
        store.clear()
    _out.print(f"The statistics of {len(statistics.tokens)} linear layers are in {output}.")


@app.command()
@_reported
def compress(
    model: options.Model,
    output: options.Output,
    act_norms: options.ActNorms = None,
    text: options.CalibrationTexts = None,
    recipe: options.Recipe = None,
    method: options.Method = "vq",
    d: options.Subvector = None,
    bits: options.Bits = None,
    iters: options.Iters = None,
    n_init: options.NInit = None,
    init: options.Init = None,
    seed: options.Seed = None,
    sparsity: options.Sparsity = None,
    pattern: options.Pattern = None,
    ignore: options.Ignore = None,
    override: options.Override = None,
    codebook_scope: options.CodebookScope = None,
    min_coverage: options.MinCoverage = 0.8,
    checkpoint_format: options.Format = "nowag",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    resume: options.Resume = True,
    offload: options.Offload = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    samples: options.CompressSamples = None,
    minutes: options.Minutes = None,
    length: options.Length = 1024,
    sample_seed: options.SampleSeed = None,
) -> None:
    """Compresses a model's linear layers and writes a checkpoint, report.json and layers.csv."""
    settings = _settings(
        d=d, bits=bits, iters=iters, n_init=n_init, init=init, seed=seed,
        sparsity=sparsity, pattern=pattern,
    )  # fmt: skip
    overrides = options.parse_overrides(override or ())
    left_dense = ("lm_head", *(ignore or ()))
    recipe = _recipe(recipe, act_norms, text)
    if recipe == "paper" and codebook_scope not in (None, "layer"):
        raise ValueError("--codebook-scope belongs to --recipe feedback: paper has one a layer.")
    if recipe == "paper" and offload is not None:
        raise ValueError("--offload belongs to --recipe feedback: paper keeps no hidden states.")
    scope = SharedCodebooks(codebook_scope or ("model" if recipe == "feedback" else "layer")).scope
    if recipe == "paper" and launched() > 1:
        raise ValueError("torchrun is for --recipe feedback alone: start this without it.")
    if dry_run and launched() > 1:
        raise ValueError("--dry-run is for one process: start it without torchrun.")
    if launched_rank() > 0:
        _help_compress(
            model, output, dtype, trust_remote_code, method, left_dense, codebook_scope=scope,
            offload_dir=offload, overrides=overrides, min_coverage=min_coverage, **settings,
        )  # fmt: skip
        return
    job = Job(
        model, output, method, settings, overrides, left_dense,
        scope,
        dtype=dtype, checkpoint_format=checkpoint_format, trust_remote_code=trust_remote_code,
        overwrite=overwrite,
    )  # fmt: skip
    norms = None
    if act_norms is not None:
        with of_argument("act_norms"):
            norms = load_act_norms(act_norms)
    wanted = _SAMPLES[recipe] if samples is None else options.parse_samples(samples)
    if minutes is not None and wanted is not None:
        raise ValueError("--minutes belongs to --samples auto.")
    budget = _MINUTES if minutes is None else minutes
    if not 0 < budget < math.inf:
        raise ValueError(f"--minutes must be a finite number above 0, not {budget:g}.")
    work = Work(recipe, (wanted or 0) if text else 0, length, offload=offload is not None)
    if dry_run:
        if wanted is None and text:
            work = replace(work, samples=_affordable(job, work, budget))
        _show_forecast(job, work)
        return
    texts = _open_texts(text or ())
    asked = f"auto, {budget:g} minutes" if wanted is None else wanted
    made_with = {
        **job.made_with(), **_text_facts(texts, asked, length, sample_seed), "recipe": recipe,
        "act_norms": None if act_norms is None else str(act_norms),
    }  # fmt: skip

    def prepare(tokenizer: Any, store: LayerStore) -> Callable[[Any], None]:
        windows: list[Tensor] = []
        if texts:
            number = wanted
            if number is None:
                number = store.get_samples() or _affordable(job, work, budget)
                store.put_samples(number)
            windows = _windows(tokenizer, texts, number, length, sample_seed)
        common: dict[str, Any] = {
            "overrides": overrides, "min_coverage": min_coverage, "work_dir": store, **settings,
        }  # fmt: skip

        def compress_loaded(loaded: Any) -> None:
            found = norms
            if recipe == "paper" and found is None:
                ones = {
                    name: torch.ones(linear.in_features)
                    for name, linear in decoder_linears(loaded).items()
                }
                plan_compression(
                    loaded, ones, (method, settings), left_dense, overrides, min_coverage
                )
                found = _calibrate(loaded, windows, store).act_norms()
            with process_group() as group, progress_bar(_err) as progress:
                if found is None:
                    compress_blocks(
                        loaded, torch.cat(windows), method, left_dense, codebook_scope=scope,
                        offload_dir=offload, progress=progress, group=group, **common,
                    )  # fmt: skip
                else:
                    compress_model(loaded, found, method, left_dense, progress=progress, **common)

        return compress_loaded

    report, left_out = job.run(
        prepare, named_options(made_with), resume=resume, loading=loading(_err, model),
        # Layers stay on disk, but where calibration goes through all of them for every window.
        in_memory=recipe == "paper" and norms is None,
    )  # fmt: skip
    _out.print(report_table(report))
    if report.stages:
        _out.print(stages_text(report), soft_wrap=True)
    if 0 < report.tokens_per_input < _FEW_TOKENS:
        _err.print(
            f"The calibration text has {report.calibration_tokens} tokens, "
            f"{report.tokens_per_input:.1f} for each input of the widest layer: with {_FEW_TOKENS} "
            "or more the model will be better on text that it was not calibrated on.",
            soft_wrap=True,
        )
    if report.dead_inputs:
        layers = sum(layer.dead_inputs > 0 for layer in report.layers)
        _err.print(
            f"{report.dead_inputs} inputs of {layers} layers are 0 on all of the calibration text: "
            "give more or more varied text if they matter.",
            soft_wrap=True,
        )
    for name, reason in left_out.items():
        _err.print(f"{name} was not copied: {reason}.", soft_wrap=True)
    _out.print(f"The checkpoint, report.json and layers.csv are in {job.target}.", soft_wrap=True)


def _help_compress(
    model: str, output: Path, dtype: str, trust_remote_code: bool, *args: Any, **kwargs: Any
) -> None:
    """What a process of torchrun does whose rank is not 0: no more than compress along."""
    with process_group() as group:
        kept = work_directory(Path(os.path.realpath(output)))
        # Another host may not have the disk that the output goes to.
        room = kept if kept.is_dir() else Path(tempfile.gettempdir())
        try:
            with temporary_directory(room, "converted") as converted:
                loaded, _ = open_dense_model(
                    model, dtype, offload_folder=converted, trust_remote_code=trust_remote_code
                )
                compress_blocks(loaded, None, *args, group=group, **kwargs)
        except BaseException as stop:
            if LayerStore(kept).keeps_something():
                stop.kept = kept  # type: ignore[attr-defined]
            raise


def _outline(job: Job, option: str) -> Any:
    """The model without its weights, checked; ValueError where only loading it tells."""
    model = job.outline()
    if model is None:
        raise ValueError(
            f"{option}: {job.source} brings Python code of its own, so that nothing can be said "
            "of it before it is loaded."
        )
    job.check(model)
    return model


def _affordable(job: Job, work: Work, minutes: float) -> int:
    """How many windows of text so much time is enough for: no fewer than without asking."""
    model = _outline(job, "--samples auto")
    least = _SAMPLES[work.recipe]
    affordable = affordable_samples(
        model, job.layers, job.ignore, job.codebook_scope, work, 60 * minutes
    )
    if affordable < least:
        _err.print(
            f"{minutes:g} minutes are enough for {affordable} windows of text here: {least} are "
            "read all the same, with fewer the model would be of little use.",
            soft_wrap=True,
        )
    return max(affordable, least)


def _show_forecast(job: Job, work: Work) -> None:
    model = _outline(job, "--dry-run")
    taken = forecast(model, job.layers, job.ignore, job.codebook_scope, job.sizes(model), work)
    for part in forecast_tables(taken):
        _out.print(part)
    windows = f"{work.samples} windows of {work.length} tokens" if work.samples else "norms"
    _out.print(f"From {windows}, by --recipe {work.recipe}. Nothing was written.", soft_wrap=True)


def _settings(**given: Any) -> dict[str, Any]:
    """The settings that were given."""
    settings = {name: value for name, value in given.items() if value is not None}
    if "bits" in settings and settings["bits"].is_integer():
        settings["bits"] = int(settings["bits"])
    return settings


def _recipe(recipe: str | None, act_norms: Path | None, text: Sequence[Path] | None) -> str:
    """Which recipe it is; raises unless there is what it needs."""
    if recipe is not None and recipe not in _SAMPLES:
        raise ValueError(f"--recipe must be one of {', '.join(_SAMPLES)}, not {recipe!r}.")
    if (act_norms is None) == (not text):
        raise ValueError(
            "give either --text FILE, or --act-norms FILE (see `nowag-ext calibrate`)."
        )
    if recipe == "feedback" and act_norms is not None:
        raise ValueError("--recipe feedback reads the text itself: give --text, not --act-norms.")
    return recipe or ("paper" if act_norms is not None else "feedback")


def _open_texts(paths: Sequence[Path]) -> list[Text]:
    with of_argument("text"):
        return [Text(path) for path in paths]


def _text_facts(
    texts: Sequence[Text], samples: int | str, length: int, seed: int | None
) -> dict[str, Any]:
    """What results follow from where there are texts, by argument."""
    if not texts:
        return {}
    return {
        "text": [f"of SHA-256 {text.digest}..." for text in texts],
        "samples": samples, "length": length, "sample_seed": seed,
        "OMP_NUM_THREADS": torch.get_num_threads(), "processes": launched(),
        "torch": str(torch.__version__),
    }  # fmt: skip


def _windows(
    tokenizer: Any, texts: Sequence[Text], samples: int, length: int, seed: int | None
) -> list[Tensor]:
    """Windows of the texts, as many of each, and says so."""
    # Windows at random are of the whole text.
    enough = samples * length if seed is None else None
    with of_argument("text"):
        tokens = [text.tokens(tokenizer, enough) for text in texts]
    windows = mixed_batches(tokens, samples=samples, length=length, seed=seed)
    which = "the first of the text" if seed is None else f"taken at random (seed {seed})"
    of = "" if len(texts) == 1 else f", from {len(texts)} texts in turn"
    _out.print(f"Calibrating on {len(windows)} windows of {length} tokens, {which}{of}.")
    if len(windows) < samples:
        _err.print(f"The text has no more: {samples} were asked for.")
    return windows


# What keeping the statistics so far may cost, as a share of the time that measuring them takes.
_KEEPING = 0.05


def _calibrate(model: Any, windows: Sequence[Tensor], store: LayerStore) -> CalibrationStatistics:
    """The statistics of the windows, from where an earlier run was; kept now and then."""
    _advise_dtype(model, "nowag-ext calibrate --dtype float32")
    key = run_key({}, windows=torch.cat(list(windows)), **dict(model.named_parameters()))
    statistics, done = store.get_statistics(key)
    kept, took = time.monotonic(), 0.0
    with progress_bar(_err) as progress:
        for number, window in enumerate(windows[done:], done + 1):
            collect_statistics(model, [window], statistics=statistics)
            progress("calibrate", number, len(windows))
            now = time.monotonic()
            if number == len(windows) or took <= _KEEPING * (now - kept):
                store.put_statistics(key, statistics, number)
                kept = time.monotonic()
                took = kept - now
    return statistics


def _advise_dtype(model: Any, command: str) -> None:
    """Says how to save time where many tokens are slow in the model's dtype."""
    if gemm_dtype(model.dtype, model.device) != model.dtype:
        _err.print(
            f"This CPU multiplies slowly in {dtype_name(model.dtype)}: `{command}` takes a "
            "fraction of the time, and twice the memory.",
            soft_wrap=True,
        )


@app.command("eval")
@_reported
def evaluate(
    model: options.Model,
    text: options.Text,
    window: options.Window = 1024,
    windows: options.Windows = None,
    dtype: options.Dtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Perplexity of a model, compressed or dense, on a text file."""
    (document,) = _open_texts([text])
    tokenizer = open_tokenizer(model, trust_remote_code=trust_remote_code)
    with of_argument("text"):
        tokens = document.tokens(tokenizer, None if windows is None else windows * window)
    split_windows(tokens, window, windows)  # raises for what cannot be, before weights are read
    with loading(_err, model):
        loaded, _ = open_model(
            model, dtype, tokenizer=tokenizer, trust_remote_code=trust_remote_code
        )
    _advise_dtype(loaded, "nowag-ext eval --dtype float32")
    with progress_bar(_err) as progress:
        result = perplexity(loaded, tokens, window=window, windows=windows, progress=progress)
    _out.print(f"perplexity {result.perplexity:.4f}")
    _out.print(f"{result.protocol()}; {dtype_name(loaded.dtype)}; {text}", soft_wrap=True)


@app.command()
@_reported
def generate(
    model: options.Model,
    prompt: options.Prompt,
    max_new_tokens: options.MaxNewTokens = 64,
    chat: options.Chat = False,
    temperature: options.Temperature = 0.0,
    seed: options.GenerationSeed = 0,
    dtype: options.Dtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Text from a model, compressed or dense, and its speed."""
    check_generation(max_new_tokens, temperature)
    tokenizer = open_tokenizer(model, trust_remote_code=trust_remote_code)
    ids = encode_prompt(tokenizer, prompt, chat=chat)
    with loading(_err, model):
        loaded, _ = open_model(
            model, dtype, tokenizer=tokenizer, trust_remote_code=trust_remote_code
        )
    run = generate_text(
        loaded, tokenizer, ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    )
    _out.print(run.text, soft_wrap=True)
    _err.print(
        f"{run.tokens} tokens in {run.seconds:.2f} s: {run.tokens_per_second:.1f} tokens/s, "
        f"reading the {ids.shape[1]} of the prompt included; {dtype_name(loaded.dtype)}",
        soft_wrap=True,
    )


@app.command()
@_reported
def env() -> None:
    """Versions, which backends run, what is missing and how to get it."""
    environment = describe_environment()
    for part in environment_tables(environment):
        _out.print(part)
    for sentence in environment.missing:
        _out.print(f"- {sentence}", soft_wrap=True)
    if not environment.missing:
        _out.print("Nothing is missing.")
