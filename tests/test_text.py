"""Texts in pieces: the same tokens, no more read than needed, in bounded memory."""

from __future__ import annotations

import io
import os
import subprocess
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from fresh_process import fresh_python
from tiny_model import tiny_tokenizer

from nowag_ext import text as text_module
from nowag_ext.evaluate import tokenize
from nowag_ext.text import Text, read_text

SAMPLES = {
    "prose": "It was the best of times,  it was the worst.\n\nNew paragraph \n" * 30,
    "one line": "word " * 500,
    "one word": "x" * 1234,
    "spaces": " " * 777,
    "lines": "a\nb\r\n" * 200,
    "wide": "é日 本𝄞" * 100,
}


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("piece", [64, 1000])
def test_pieces_are_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, piece: int
) -> None:
    file = tmp_path / "text"
    file.write_bytes(SAMPLES[name].encode())
    expected = file.read_text(encoding="utf-8")
    monkeypatch.setattr(text_module, "_PIECE", piece)
    pieces = list(Text(file).pieces())
    assert "".join(pieces) == expected == read_text(file)
    assert max(map(len, pieces)) <= 2 * piece
    if " " in expected.strip():
        assert all(later[0] == " " and not earlier[-1].isspace()
                   for earlier, later in pairwise(pieces))  # fmt: skip
    tokens = Text(file).tokens(tiny_tokenizer())
    assert torch.equal(tokens, tokenize(tiny_tokenizer(), expected))


def test_stops_when_there_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "_PIECE", 100)
    file = tmp_path / "text"
    file.write_bytes(b"word " * 10_000 + b"\xff")  # what is not read may be anything
    tokens = Text(file).tokens(tiny_tokenizer(), enough=150)
    assert 150 <= len(tokens) <= 300
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        Text(file).tokens(tiny_tokenizer())


def test_a_short_text_is_tokenised_whole(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a  b\n" * 1000)
    assert list(Text(tmp_path / "text").pieces()) == ["a  b\n" * 1000]


def test_pipes_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: fifo.write_text("through a pipe"))
    writer.start()
    assert read_text(fifo) == "through a pipe"
    writer.join()
    assert fifo.is_fifo()
    read, write = os.pipe()
    os.write(write, b"substituted")
    os.close(write)
    assert read_text(f"/dev/fd/{read}") == "substituted"
    os.close(read)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"typed")))
    assert read_text("-") == "typed"


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no text file .*missing"):
        Text(tmp_path / "missing")
    with pytest.raises(IsADirectoryError, match="is a directory: a text file is needed"):
        Text(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty is empty: it holds no tokens"):
        Text(tmp_path / "empty").tokens(tiny_tokenizer())
    with pytest.raises(ValueError, match="null is empty"):
        Text("/dev/null").tokens(tiny_tokenizer())


MEASURE = """
import resource, sys
from nowag_ext.text import Text
from tiny_model import tiny_tokenizer
tokenizer = tiny_tokenizer()
tokenizer("warm " * 100)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tokens = Text(sys.argv[1]).tokens(tokenizer, 128)
assert len(tokens) >= 128
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_long_line_takes_little_memory(tmp_path: Path) -> None:
    """All of it at once would take gigabytes, one token a character."""
    (tmp_path / "line").write_bytes(b"word " * 10_000_000)
    run = subprocess.run(
        **fresh_python("-c", MEASURE, tmp_path / "line"), capture_output=True, check=True
    )
    assert int(run.stdout) < 600
