"""The demo's text: Python's own language reference, cut by topic into two halves."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class DemoText:
    """Text for calibration, and text that calibration has not seen."""

    calibration: str
    held_out: str
    calibration_topics: int
    held_out_topics: int


def demo_text(topics: dict[str, str] | None = None) -> DemoText:
    """Splits ``pydoc_data.topics`` (or ``topics``) in two by a checksum of each topic's name.

    A topic falls into the same half in every version of Python. Topics repeat one another's
    paragraphs, so each paragraph is used once, and never in both halves.
    """
    if topics is None:
        from pydoc_data.topics import topics as python_topics

        topics = python_topics
    halves: tuple[list[str], list[str]] = ([], [])
    for name in sorted(topics):
        halves[zlib.crc32(name.encode()) & 1].append(name)
    seen: set[str] = set()
    texts = [_unique_paragraphs((topics[name] for name in half), seen) for half in halves]
    return DemoText(texts[0], texts[1], len(halves[0]), len(halves[1]))


def _unique_paragraphs(texts: Iterable[str], seen: set[str]) -> str:
    """The paragraphs not in ``seen``, to which they are added."""
    kept: list[str] = []
    for text in texts:
        for paragraph in (part.strip("\n") for part in text.split("\n\n")):
            if paragraph and paragraph not in seen:
                seen.add(paragraph)
                kept.append(paragraph)
    return "\n\n".join(kept) + "\n"
