"""Calibration text from files: opened, named for a resumed run, cut into windows."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nowag_ext.cli.base import err, out
from nowag_ext.demo_text import demo_text
from nowag_ext.disk import of_argument
from nowag_ext.pipeline.ranks import launched
from nowag_ext.sampling import windows_to_write
from nowag_ext.source import mixed_batches, windows_of_each
from nowag_ext.text import Text

# In a file's place: half of Python's language reference, as it comes with Python (PSF licence); and
# what the model that is to be compressed writes.
PYTHON_DOCS = "python-docs"
SELF = "self"


class SelfText:
    """In a text's place, while there is none yet: what the model will have written."""

    name = SELF
    fact = "written by the model"


# Has the model write so many windows: int64 [windows, length].
Write = Callable[[int], Tensor]


def open_texts(paths: Sequence[Path]) -> list[Text]:
    with of_argument("text"):
        return [_open_text(path) for path in paths]


def open_texts_or_self(paths: Sequence[Path]) -> list[Text | SelfText]:
    """``open_texts``, of which one may be the model's own."""
    with of_argument("text"):
        if sum(map(_is_self, paths)) > 1:
            raise ValueError(f"{SELF} can be given once: --samples asks for more of it.")
        return [SelfText() if _is_self(path) else _open_text(path) for path in paths]


def has_self(paths: Sequence[Path]) -> bool:
    """Whether one of the texts is to be written by the model."""
    return any(map(_is_self, paths))


def _is_self(path: Path) -> bool:
    return str(path) == SELF and not path.exists()


def _open_text(path: Path) -> Text:
    if str(path) != PYTHON_DOCS or path.exists():
        return Text(path)
    return Text(path, io.StringIO(demo_text().calibration))


def text_facts(
    texts: Sequence[Text | SelfText], samples: int | str, length: int, seed: int | None
) -> dict[str, Any]:
    """What results follow from where there are texts, by argument."""
    if not texts:
        return {}
    return {
        "text": [text.fact for text in texts],
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
) -> list[Tensor]:
    """Windows of the texts to learn from, as many of each; and says so.

    Of each text the first ``skip`` tokens are left out.
    """
    if skip < 0:
        raise ValueError(f"--skip must not be negative, not {skip}.")
    found = _tokens(tokenizer, texts, skip + samples * length, seed)
    for text, tokens in zip(texts, found, strict=True):
        if skip and len(tokens) < skip + length:
            raise ValueError(
                f"--skip {skip} leaves less than a window of {text.name}, which has {len(tokens)} "
                "tokens: give more text, or skip less of it."
            )
    rest = [tokens[skip:] for tokens in found]
    after = f" after {skip} tokens that are skipped" if skip else ""
    return _windows("Learning from", rest, samples, length, seed, after)


def calibration_windows(
    tokenizer: Any,
    texts: Sequence[Text | SelfText],
    samples: int,
    length: int,
    seed: int | None,
    write: Write | None = None,
    *,
    distilled: int = 0,
    distilled_length: int = 1,
    leaving: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Windows to calibrate on, and others to learn from after that; and says so.

    The second are of what the first leave of each text, as far as it goes; where those are taken at
    random, of the whole text. ``leaving``: the first are fewer if it would not go far enough.
    ``write`` has the model write what is its own among the texts.
    """
    later = distilled * distilled_length
    read = [text for text in texts if isinstance(text, Text)]
    tokens = iter(_tokens(tokenizer, read, samples * length + later, seed))
    found = []
    for text in texts:
        if isinstance(text, Text):
            found.append(next(tokens))
        else:
            assert write is not None
            own = windows_to_write(samples, length, later, len(texts))
            found.append(write(own).flatten())
    if leaving and seed is None:
        samples = min(samples, max(1, (sum(map(len, found)) - later) // length))
    windows = _windows("Calibrating on", found, samples, length, seed)
    if not distilled:
        return windows, []
    if seed is None:
        taken = windows_of_each([len(tokens) // length for tokens in found], samples)
        found = [tokens[count * length :] for tokens, count in zip(found, taken, strict=True)]
        found = [tokens for tokens in found if len(tokens) >= distilled_length]
    else:
        seed = (seed + 1) % 2**63
    if not found:
        err.print(
            "The text has nothing left to learn from afterwards, which would take the model nearer "
            "to the dense one: give more of it.",
            soft_wrap=True,
        )
        return windows, []
    after = " after those" if seed is None else ""
    return windows, _windows("Then learning from", found, distilled, distilled_length, seed, after)


def _tokens(tokenizer: Any, texts: Sequence[Text], enough: int, seed: int | None) -> list[Tensor]:
    """Those of each text; enough of them, but all where windows are taken at random."""
    with of_argument("text"):
        return [text.tokens(tokenizer, enough if seed is None else None) for text in texts]


def _windows(
    doing: str,
    tokens: Sequence[Tensor],
    samples: int,
    length: int,
    seed: int | None,
    after: str = "",
) -> list[Tensor]:
    windows = mixed_batches(tokens, samples=samples, length=length, seed=seed)
    which = "the first of the text" if seed is None else f"taken at random (seed {seed})"
    of = "" if len(tokens) == 1 else f", from {len(tokens)} texts in turn"
    out.print(f"{doing} {len(windows)} windows of {length} tokens, {which}{after}{of}.")
    if len(windows) < samples:
        err.print(f"The text has no more: {samples} were asked for.")
    return windows
