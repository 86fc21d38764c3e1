"""Text files, read and tokenised in pieces: no more is read, and in memory, than is needed."""

from __future__ import annotations

import hashlib
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from nowag_ext.evaluate import tokenize

# Characters: tokenizers take about 200 bytes for each. A text that is no longer is tokenised whole.
_PIECE = 1 << 20


class Text:
    """A UTF-8 text: of a file, a pipe, "-" for standard input; or ``file``, to be called so.

    It is opened, and its first piece read, at once; the rest when it is asked for, and only once.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is not UTF-8.
    """

    def __init__(self, path: str | os.PathLike[str], file: TextIO | None = None) -> None:
        self.name = os.fspath(path)
        self._file = _open(path) if file is None else file
        self._first = self._read()

    @property
    def fact(self) -> str:
        """Of the first piece: tells texts apart without reading all of them."""
        return f"of SHA-256 {hashlib.sha256(self._first.encode()).hexdigest()[:12]}..."

    def _read(self) -> str:
        try:
            return self._file.read(_PIECE)
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.name} is not UTF-8 text: {error}.") from None

    def pieces(self) -> Iterator[str]:
        """The text, cut before spaces where it is long, which pre-tokenizers would do as well."""
        text = self._first
        while more := self._read():
            cut = _border(text)
            yield text[:cut]
            text = text[cut:] + more
        yield text

    def tokens(self, tokenizer: Any, enough: int | None = None) -> Tensor:
        """Its tokens, int64 [n], without special ones; of a long text until there are enough.

        Where a long text is cut, tokens may differ from those of the whole.

        Raises:
            ValueError: there is none, or the text is not UTF-8.
        """
        found: list[Tensor] = []
        count = 0
        for piece in self.pieces():
            if piece:
                found.append(tokenize(tokenizer, piece))
                count += len(found[-1])
            if enough is not None and count >= enough:
                break
        if not found:
            raise ValueError(f"{self.name} is empty: it holds no tokens.")
        return torch.cat(found)


def read_text(path: str | os.PathLike[str]) -> str:
    """A whole text; raises OSError or ValueError with the file's name."""
    return "".join(Text(path).pieces())


def _open(path: str | os.PathLike[str]) -> TextIO:
    if os.fspath(path) == "-":
        return io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8")
    try:
        return Path(path).open(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no text file {path}.") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"{path} is a directory: a text file is needed.") from None


def _border(text: str) -> int:
    """Where to cut: before the last space after something else, or what comes nearest to it."""
    for pattern in (r"\S ", r"\S\s"):
        # Backwards, by pieces: what is looked for is rarely far from the end.
        for start in range(len(text) - 1000, -1000, -1000):
            found = [
                m.start() + 1 for m in re.finditer(pattern, text[max(0, start) : start + 1001])
            ]
            if found:
                return max(0, start) + found[-1]
    return len(text)
