"""Streams of hidden states: what is kept of a layer is what running it again would give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import assert_same_bits, assert_within
from tiny_models import ARCHITECTURES, tiny_model, tiny_tokens

from nowag_ext.decoder import decoder_linears
from nowag_ext.pipeline import streams
from nowag_ext.pipeline.blocks import Blocks

LENGTH, WINDOWS = 24, 3


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


def room_for(windows: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few enough bytes that not every window is kept: q/k/v, o, gate/up, down and their sums."""
    monkeypatch.setattr(streams, "_SEEN_BYTES", int(windows * LENGTH * 4 * (3 * 64 + 104 + 2 * 64)))


@pytest.mark.parametrize("kept", [0, 1, WINDOWS])
def test_dense_stream(model: Any, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    room_for(kept, monkeypatch)
    blocks = Blocks(model, LENGTH)
    hidden = blocks.embed(tiny_tokens(WINDOWS, LENGTH))
    stream = streams.DenseStream(hidden.clone())
    stream.blocks = blocks
    groups = blocks.groups(0, hidden[:1])
    stream.enter(0, groups)
    for window in range(WINDOWS):
        for group in groups:
            got, wanted = stream.taps(0, window, group), blocks.taps(0, hidden[window, None], group)
            assert_same_bits(got[0], wanted[0], group.names)
            assert list(got[1]) == list(wanted[1])
            for name, sums in wanted[1].items():
                assert_same_bits(got[1][name], sums, name)
    stream.advance(0)
    for window in range(WINDOWS):
        assert_same_bits(stream.hidden[window, None], blocks.run(0, hidden[window, None]), window)


@pytest.mark.parametrize("kept", [0, 1, WINDOWS])
@pytest.mark.parametrize("look", [False, True])
def test_compressed_stream_adds_what_changed(
    model: Any, kept: int, look: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last linear changed after it was looked at: as if the layer had run with it."""
    room_for(kept, monkeypatch)
    blocks = Blocks(model, LENGTH).copied(0)
    hidden = blocks.embed(tiny_tokens(WINDOWS, LENGTH))
    stream = streams.CompressedStream(hidden.clone())
    stream.blocks = blocks
    groups = blocks.groups(0, hidden[:1])
    stream.enter(0, groups, decoder_linears(model))
    for group in groups:
        if look:
            stream.look(0, group)
        else:
            for window in range(WINDOWS):
                stream.taps(0, window, group)
        for name in group.names:
            weight = blocks.weights(0)[name]
            stream.replace(name, weight, weight + 0.1 * torch.randn_like(weight))
    stream.advance(0)
    for window in range(WINDOWS):
        wanted = blocks.run(0, hidden[window, None])
        bound = 1e-5 * float(wanted.abs().max())
        assert_within(stream.hidden[window, None], wanted, bound, window)


def test_layers_that_are_not_changed_as_a_whole_are_run(model: Any) -> None:
    blocks = Blocks(model, LENGTH).copied(0)
    hidden = blocks.embed(tiny_tokens(WINDOWS, LENGTH))
    stream = streams.CompressedStream(hidden.clone())
    stream.blocks = blocks
    groups = blocks.groups(0, hidden[:1])
    units = [name for name in decoder_linears(model) if not name.endswith("down_proj")]
    stream.enter(0, groups, units)
    for window in range(WINDOWS):
        stream.taps(0, window, groups[-1])
    blocks.weights(0)["model.layers.0.mlp.down_proj"].mul_(2)
    stream.advance(0)
    for window in range(WINDOWS):
        assert_same_bits(stream.hidden[window, None], blocks.run(0, hidden[window, None]), window)
