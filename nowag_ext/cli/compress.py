"""``nowag-ext compress``."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nowag_ext.calibrate import load_act_norms
from nowag_ext.cli import options
from nowag_ext.cli.base import app, err, out, reported
from nowag_ext.cli.calibrate import measured
from nowag_ext.cli.sentences import named_options
from nowag_ext.cli.texts import calibration_windows, has_self, open_texts_or_self, text_facts
from nowag_ext.cost import Work, affordable_samples, forecast
from nowag_ext.decoder import decoder_linears
from nowag_ext.disk import Job, add_stage, distill_compressed, of_argument
from nowag_ext.files import temporary_directory
from nowag_ext.model import compress_model
from nowag_ext.offload import twin
from nowag_ext.pipeline.codebooks import SharedCodebooks
from nowag_ext.pipeline.compress import compress as compress_blocks
from nowag_ext.pipeline.ranks import (
    launched,
    launched_rank,
    own_device,
    process_group,
    threads_of_all,
)
from nowag_ext.plan import plan_compression
from nowag_ext.render import forecast_tables, loading, progress_bar, report_table, stages_text
from nowag_ext.report import distillation_text
from nowag_ext.resume import LayerStore, work_directory
from nowag_ext.sampling import self_text
from nowag_ext.source import open_dense_model

# For each input of a layer; its Hessian follows the text by chance if there are fewer.
_FEW_TOKENS = 8

# Windows of calibration text that each recipe reads unless told otherwise.
_SAMPLES = {"feedback": 32, "paper": 128}

# Windows of text that the result is tuned on unless told otherwise, and the most tokens of one.
_DISTILLED = {"vq": 48, "prune": 0}
_DISTILLED_LENGTH = 512

# What --samples auto may take.
_MINUTES = 10.0


@app.command()
@reported
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
    head: options.Head = None,
    min_coverage: options.MinCoverage = 0.8,
    checkpoint_format: options.Format = "nowag",
    dtype: options.Dtype = "auto",
    device: options.CompressDevice = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
    resume: options.Resume = True,
    offload: options.Offload = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    samples: options.CompressSamples = None,
    minutes: options.Minutes = None,
    length: options.Length = 1024,
    sample_seed: options.SampleSeed = None,
    distill: options.CompressDistill = None,
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
    head_form = None if head is None else options.parse_head(head)
    if recipe == "paper" and head is not None:
        raise ValueError("--head belongs to --recipe feedback: paper leaves the head dense.")
    if recipe == "paper" and offload is not None:
        raise ValueError("--offload belongs to --recipe feedback: paper keeps no hidden states.")
    if recipe == "paper" and distill:
        raise ValueError("--distill belongs to --recipe feedback: paper looks at each layer alone.")
    scope = SharedCodebooks(codebook_scope or ("model" if recipe == "feedback" else "layer")).scope
    if recipe == "paper" and launched() > 1:
        raise ValueError("torchrun is for --recipe feedback alone: start this without it.")
    if dry_run and launched() > 1:
        raise ValueError("--dry-run is for one process: start it without torchrun.")
    if launched_rank() > 0:
        _help_compress(
            model, output, dtype, device, trust_remote_code, method, left_dense,
            codebook_scope=scope, offload_dir=offload, head=head_form, overrides=overrides,
            min_coverage=min_coverage, **settings,
        )  # fmt: skip
        return
    job = Job(
        model, output, method, settings, overrides, left_dense,
        scope, head_form,
        dtype=dtype, device=device, offload_dir=offload, checkpoint_format=checkpoint_format,
        trust_remote_code=trust_remote_code, overwrite=overwrite,
    )  # fmt: skip
    norms = None
    if act_norms is not None:
        with of_argument("act_norms"):
            norms = load_act_norms(act_norms)
    wanted = _SAMPLES[recipe] if samples is None else options.parse_samples(samples)
    if wanted is None and job.place.type != "cpu":
        raise ValueError(
            f"--samples auto goes by how fast the CPU is: on {job.place} give a number of windows."
        )
    if minutes is not None and wanted is not None:
        raise ValueError("--minutes belongs to --samples auto.")
    if length < 1:
        raise ValueError(f"--length must be at least 1, not {length}.")
    budget = _MINUTES if minutes is None else minutes
    if not 0 < budget < math.inf:
        raise ValueError(f"--minutes must be a finite number above 0, not {budget:g}.")
    if distill is None:
        distill = _DISTILLED[method] if recipe == "feedback" else 0
    distilled = {"distilled": distill, "distilled_length": min(_DISTILLED_LENGTH, length)}
    work = Work(
        recipe, (wanted or 0) if text else 0, length, offload is not None, job.head_settings,
        **distilled, texts=len(text or ()), writes=has_self(text or ()),
    )  # fmt: skip
    if dry_run:
        if wanted is None and text:
            work = replace(work, samples=_affordable(job, work, budget))
        _show_forecast(job, work)
        return
    texts = open_texts_or_self(text or ())
    asked = f"auto, {budget:g} minutes" if wanted is None else wanted
    made_with = {
        **job.made_with(), **text_facts(texts, asked, length, sample_seed), "recipe": recipe,
        "act_norms": None if act_norms is None else str(act_norms),
    }  # fmt: skip

    def prepare(tokenizer: Any, store: LayerStore) -> Callable[[Any], None]:
        windows: list[Tensor] = []
        more: list[Tensor] = []
        wrote = 0.0

        def write(count: int) -> Tensor:
            nonlocal wrote
            began = time.perf_counter()
            text = _self_text(job, tokenizer, store, length, sample_seed, count)
            wrote = time.perf_counter() - began
            return text

        if texts:
            number = wanted
            if number is None:
                number = store.get_samples() or _affordable(job, work, budget)
                store.put_samples(number)
            windows, more = calibration_windows(
                tokenizer, texts, number, length, sample_seed, write, leaving=wanted is None,
                **distilled,
            )  # fmt: skip
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
                found = measured(loaded, windows, store).act_norms()
            dense = twin(loaded) if more else None
            with process_group() as group, progress_bar(err) as progress:
                if found is None:
                    compress_blocks(
                        loaded, torch.cat(windows), method, left_dense, codebook_scope=scope,
                        offload_dir=offload, head=head_form, progress=progress, group=group,
                        **common,
                    )  # fmt: skip
                else:
                    compress_model(loaded, found, method, left_dense, progress=progress, **common)
            if wrote:
                add_stage(loaded, "writing text", wrote)
            if more:
                with threads_of_all(), progress_bar(err) as progress:
                    distill_compressed(loaded, dense, torch.cat(more), store, offload, progress)

        return compress_loaded

    report, left_out = job.run(
        prepare, named_options(made_with), resume=resume, loading=loading(err, model),
        # Layers stay on disk, but where calibration goes through all of them for every window.
        in_memory=recipe == "paper" and norms is None,
    )  # fmt: skip
    out.print(report_table(report))
    if report.stages:
        out.print(stages_text(report), soft_wrap=True)
    if report.distillation is not None:
        out.print(f"Distilled: {distillation_text(report.distillation)}.", soft_wrap=True)
    if 0 < report.tokens_per_input < _FEW_TOKENS:
        err.print(
            f"The calibration text has {report.calibration_tokens} tokens, "
            f"{report.tokens_per_input:.1f} for each input of the widest layer: with {_FEW_TOKENS} "
            "or more the model will be better on text that it was not calibrated on.",
            soft_wrap=True,
        )
    if report.dead_inputs:
        layers = sum(layer.dead_inputs > 0 for layer in report.layers)
        err.print(
            f"{report.dead_inputs} inputs of {layers} layers are 0 on all of the calibration text: "
            "give more or more varied text if they matter.",
            soft_wrap=True,
        )
    for name, reason in left_out.items():
        err.print(f"{name} was not copied: {reason}.", soft_wrap=True)
    out.print(f"The checkpoint, report.json and layers.csv are in {job.target}.", soft_wrap=True)


def _help_compress(
    model: str, output: Path, dtype: str, device: str, trust_remote_code: bool, *args: Any,
    **kwargs: Any,
) -> None:  # fmt: skip
    """What a process of torchrun does whose rank is not 0: no more than compress along."""
    place = own_device(device)
    with process_group() as group:
        kept = work_directory(Path(os.path.realpath(output)))
        # Another host may not have the disk that the output goes to.
        room = kept if kept.is_dir() else Path(tempfile.gettempdir())
        try:
            with temporary_directory(room, "converted") as converted:
                loaded, _ = open_dense_model(
                    model, dtype, offload_folder=converted, device=place,
                    trust_remote_code=trust_remote_code,
                )  # fmt: skip
                compress_blocks(loaded, None, *args, group=group, **kwargs)
        except BaseException as stop:
            if LayerStore(kept).keeps_something():
                stop.kept = kept  # type: ignore[attr-defined]
            raise


def _self_text(
    job: Job, tokenizer: Any, store: LayerStore, length: int, seed: int | None, windows: int
) -> Tensor:
    """What the model that is to be compressed writes; it is loaded whole for that."""
    outline = job.outline()
    needed = 0 if outline is None else sum(one.nbytes for one in outline.parameters())
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with of_argument("text"):
        if needed > there:
            raise ValueError(
                f"to write text the model must be in memory, and its {needed / 1e9:.1f} GB do not "
                f"fit into the {there / 1e9:.1f} GB of this machine: give other text."
            )
        with loading(err, job.source):
            dense, _ = open_dense_model(
                job.source, str(job.dtype), tokenizer=tokenizer, device=job.place,
                trust_remote_code=job.trust_remote_code,
            )  # fmt: skip
        with progress_bar(err) as progress:
            return self_text(
                dense, windows, length, seed=(seed or 0) % 2**62, work_dir=store, progress=progress
            )


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
        err.print(
            f"{minutes:g} minutes are enough for {affordable} windows of text here: {least} are "
            "read all the same, with fewer the model would be of little use.",
            soft_wrap=True,
        )
    return max(affordable, least)


def _show_forecast(job: Job, work: Work) -> None:
    model = _outline(job, "--dry-run")
    taken = forecast(model, job.layers, job.ignore, job.codebook_scope, job.sizes(model), work)
    for part in forecast_tables(taken):
        out.print(part)
    windows = f"{work.samples} windows of {work.length} tokens" if work.samples else "norms"
    out.print(f"From {windows}, by --recipe {work.recipe}. Nothing was written.", soft_wrap=True)
    if job.place.type != "cpu":
        out.print(f"Time and memory are the CPU's: what {job.place} takes is not known.")


def _settings(**given: Any) -> dict[str, Any]:
    """The settings that were given."""
    settings = {name: value for name, value in given.items() if value is not None}
    if "bits" in settings:
        settings["bits"] = options.whole(settings["bits"])
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
