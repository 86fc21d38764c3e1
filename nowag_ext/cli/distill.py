"""``nowag-ext distill``."""

from __future__ import annotations

import torch

from nowag_ext.checkpoint import is_compressed, load, model_bytes, save_compressed
from nowag_ext.cli import options
from nowag_ext.cli.base import app, err, out, reported
from nowag_ext.cli.sentences import named_options
from nowag_ext.cli.texts import open_texts, text_facts, text_windows
from nowag_ext.disk import check_offload, kept, of_argument, source_facts
from nowag_ext.environment import named_device
from nowag_ext.files import check_apart, check_vacant, require_space, temporary_directory
from nowag_ext.offload import share_tensors
from nowag_ext.pipeline.distill import check_distillation
from nowag_ext.pipeline.distill import distill as distill_model
from nowag_ext.render import loading, progress_bar
from nowag_ext.report import distillation_text
from nowag_ext.source import check_found, named_dtype, open_dense_model, open_tokenizer


@app.command()
@reported
def distill(
    compressed: options.Compressed,
    dense: options.Dense,
    text: options.DistillTexts,
    output: options.Output,
    passes: options.Passes = 1,
    learning_rate: options.LearningRate = 3e-3,
    seed: options.OrderSeed = 0,
    samples: options.DistillSamples = 64,
    skip: options.Skip = 0,
    length: options.DistillLength = 512,
    sample_seed: options.DistillSampleSeed = None,
    dtype: options.Dtype = "auto",
    device: options.CompressDevice = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
    resume: options.Resume = True,
    offload: options.DistillOffload = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Tunes a compressed model to predict what the dense one predicts, at the same bits."""
    check_distillation(passes, learning_rate, seed)
    stored = named_dtype(dtype)
    place = named_device(device)
    check_offload(offload, place)
    with of_argument("output"):
        target = check_vacant(output, overwrite=overwrite)
        for source in (compressed, dense):
            check_apart(target, source)
    for source in (compressed, dense):
        check_found(source)
    if not is_compressed(compressed):
        raise ValueError(f"{compressed} is not compressed: compress it first.")
    if is_compressed(dense):
        raise ValueError(f"--dense {dense} is itself compressed: the dense model is needed.")
    with (
        kept(target, resume=resume) as store,
        temporary_directory(store.directory, "converted") as converted,
    ):
        texts = open_texts(text)
        made_with = {
            **source_facts(dense, dtype), "compressed": source_facts(compressed, dtype)["model"],
            **text_facts(texts, samples, length, sample_seed),
            "skip": skip,
            "passes": passes,
            "learning_rate": learning_rate, "seed": seed, "device": place.type,
        }  # fmt: skip
        store.begin(named_options(made_with))
        tokenizer = open_tokenizer(compressed, trust_remote_code=trust_remote_code)
        windows = text_windows(tokenizer, texts, samples, length, sample_seed, skip=skip)
        with loading(err, compressed):
            model = load(compressed, dtype=stored, trust_remote_code=trust_remote_code).to(place)
        with of_argument("output"):
            require_space(target, model_bytes(model))
        with loading(err, dense):
            teacher, _ = open_dense_model(
                dense, dtype, offload_folder=converted, device=place,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
        share_tensors(teacher, model)
        with progress_bar(err) as progress:
            learnt = distill_model(
                model, teacher, torch.cat(windows), passes=passes, learning_rate=learning_rate,
                seed=seed, work_dir=store, offload_dir=offload, progress=progress,
            )  # fmt: skip
        left_out = save_compressed(model, tokenizer, target, overwrite=overwrite)
        store.clear()
    out.print(f"{distillation_text(learnt)}. {learnt.seconds:.1f} seconds.", soft_wrap=True)
    if learnt.divergences[-1] > learnt.divergences[0]:
        err.print(
            "The last pass was farther from the dense model than the first: use a lower "
            "--learning-rate, or leave COMPRESSED as it is.",
            soft_wrap=True,
        )
    for name, reason in left_out.items():
        err.print(f"{name} was not copied: {reason}.", soft_wrap=True)
    out.print(f"The checkpoint is in {target}.", soft_wrap=True)
