"""Calibration text from files: opened, named for a resumed run, cut into windows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nowag_ext.cli.base import err, out
from nowag_ext.disk import of_argument
from nowag_ext.pipeline.ranks import launched
from nowag_ext.source import mixed_batches
from nowag_ext.text import Text


def open_texts(paths: Sequence[Path]) -> list[Text]:
    with of_argument("text"):
        return [Text(path) for path in paths]


def text_facts(
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


def text_windows(
    tokenizer: Any,
    texts: Sequence[Text],
    samples: int,
    length: int,
    seed: int | None,
    *,
    skip: int = 0,
    doing: str = "Calibrating on",
) -> list[Tensor]:
    """Windows of the texts, as many of each; and says so.

    Of each text the first ``skip`` tokens are left out.
    """
    if skip < 0:
        raise ValueError(f"--skip must not be negative, not {skip}.")
    # Windows at random are of the whole text.
    enough = skip + samples * length if seed is None else None
    with of_argument("text"):
        tokens = [text.tokens(tokenizer, enough) for text in texts]
    for text, found in zip(texts, tokens, strict=True):
        if skip and len(found) < skip + length:
            raise ValueError(
                f"--skip {skip} leaves less than a window of {text.name}, which has {len(found)} "
                "tokens: give more text, or skip less of it."
            )
    rest = [found[skip:] for found in tokens]
    windows = mixed_batches(rest, samples=samples, length=length, seed=seed)
    after = f" after {skip} tokens that are skipped" if skip else ""
    which = "the first of the text" if seed is None else f"taken at random (seed {seed})"
    of = "" if len(texts) == 1 else f", from {len(texts)} texts in turn"
    out.print(f"{doing} {len(windows)} windows of {length} tokens, {which}{after}{of}.")
    if len(windows) < samples:
        err.print(f"The text has no more: {samples} were asked for.")
    return windows
