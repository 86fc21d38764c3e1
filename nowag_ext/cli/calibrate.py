"""``nowag-ext calibrate``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nowag_ext.calibrate import (
    CalibrationStatistics,
    check_statistics_file,
    collect_statistics,
)
from nowag_ext.cli import options
from nowag_ext.cli.base import advise_dtype, app, err, out, reported
from nowag_ext.cli.sentences import named_options
from nowag_ext.cli.texts import calibration_windows, open_texts, text_facts
from nowag_ext.disk import kept, of_argument, source_facts
from nowag_ext.render import loading, progress_bar
from nowag_ext.resume import LayerStore, run_key
from nowag_ext.source import open_dense_model, open_tokenizer

# What keeping the statistics so far may cost, as a share of the time that measuring them takes.
_KEEPING = 0.05


def measured(model: Any, windows: Sequence[Tensor], store: LayerStore) -> CalibrationStatistics:
    """The statistics of the windows, from where an earlier run was; kept now and then."""
    advise_dtype(model, "nowag-ext calibrate --dtype float32")
    key = run_key({}, windows=torch.cat(list(windows)), **dict(model.named_parameters()))
    statistics, done = store.get_statistics(key)
    kept, took = time.monotonic(), 0.0
    with progress_bar(err) as progress:
        for number, window in enumerate(windows[done:], done + 1):
            collect_statistics(model, [window], statistics=statistics)
            progress("calibrate", number, len(windows))
            now = time.monotonic()
            if number == len(windows) or took <= _KEEPING * (now - kept):
                store.put_statistics(key, statistics, number)
                kept = time.monotonic()
                took = kept - now
    return statistics


@app.command()
@reported
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
        texts = open_texts(text)
        facts = text_facts(texts, samples, length, seed)
        store.begin(named_options({**source_facts(model, dtype), **facts}))
        tokenizer = open_tokenizer(model, trust_remote_code=trust_remote_code)
        windows, _ = calibration_windows(tokenizer, texts, samples, length, seed)
        with loading(err, model):
            loaded, _ = open_dense_model(
                model, dtype, tokenizer=tokenizer, trust_remote_code=trust_remote_code
            )
        statistics = measured(loaded, windows, store)
        statistics.save(target)
        store.clear()
    out.print(f"The statistics of {len(statistics.tokens)} linear layers are in {output}.")
