"""Streams of hidden states: what is kept of a layer is what running it again would give."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from compare import assert_same_bits
from tiny_models import ARCHITECTURES, tiny_model, tiny_tokens

from nowag_ext.pipeline import streams
from nowag_ext.pipeline.blocks import Blocks, Taps

LENGTH, WINDOWS = 24, 3
HIDDEN, INTERMEDIATE = 64, 104  # of the tiny models


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


def room_for(windows: float, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few enough bytes that not every window is kept, of ``kept`` numbers a token."""
    monkeypatch.setattr(streams, "_SEEN_BYTES", int(windows * LENGTH * 4 * kept))


def linears_called(blocks: Blocks) -> list[str]:
    """The names of the first layer's linears, whenever one is called from now on."""
    called: list[str] = []
    for name, part in blocks._parts(0):
        if name in blocks.linears(0):
            part.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    return called


def assert_same_taps(got: Taps, wanted: Taps, what: object) -> None:
    assert_same_bits(got.inputs, wanted.inputs, what)
    assert list(got.sums) == list(wanted.sums)
    for name, sums in wanted.sums.items():
        assert_same_bits(got.sums[name], sums, name)


@pytest.mark.parametrize("kept", [0, 1, WINDOWS])
def test_a_layer_that_does_not_change(
    model: Any, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    room_for(kept, 2 * HIDDEN, monkeypatch)
    blocks = Blocks(model, LENGTH).copied(0)
    hidden = blocks.embed(tiny_tokens(WINDOWS, LENGTH))
    stream = streams.Stream(hidden.clone())
    groups = blocks.groups(0, hidden[:1])
    stream.enter(0, blocks, groups)
    for window in range(WINDOWS):
        for group in groups:
            got, wanted = stream.taps(0, window, group), blocks.taps(0, hidden[window, None], group)
            assert_same_taps(got, wanted, group.names)
    stream.advance(0)
    for window in range(WINDOWS):
        assert_same_bits(stream.hidden[window, None], blocks.run(0, hidden[window, None]), window)


@pytest.mark.parametrize("kept", [0, 1, WINDOWS])
@pytest.mark.parametrize("look", [False, True])
def test_a_layer_that_changes_on_the_way(
    model: Any, kept: int, look: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept is, bit for bit, what the layer would give if it were run with its weights."""
    room_for(kept, 2 * HIDDEN + INTERMEDIATE, monkeypatch)
    blocks = Blocks(model, LENGTH).copied(0)
    hidden = blocks.embed(tiny_tokens(WINDOWS, LENGTH))
    stream = streams.CompressedStream(hidden.clone())
    groups = blocks.groups(0, hidden[:1])
    stream.enter(0, blocks, groups)
    for number, group in enumerate(groups):
        if look and number % 2 == 1:
            stream.look(0, group)
        else:
            for window in range(WINDOWS):
                wanted = blocks.taps(0, hidden[window, None], group, silent=True)
                assert_same_taps(stream.taps(0, window, group), wanted, group.names)
        for name in group.names:
            weight = blocks.weights(0)[name]
            weight += 0.1 * torch.randn_like(weight)
        stream.replaced(0, group)
    stream.advance(0)
    for window in range(WINDOWS):
        assert_same_bits(stream.hidden[window, None], blocks.run(0, hidden[window, None]), window)


@pytest.mark.parametrize("kind", [streams.Stream, streams.CompressedStream])
def test_modules_that_are_done_with_are_not_run_again(
    model: Any, kind: type[streams.Stream]
) -> None:
    blocks = Blocks(model, LENGTH).copied(0)
    hidden = blocks.embed(tiny_tokens(1, LENGTH))
    stream = kind(hidden.clone())
    groups = blocks.groups(0, hidden)
    called = linears_called(blocks)
    stream.enter(0, blocks, groups)
    for group in groups:
        stream.taps(0, 0, group)
        if isinstance(stream, streams.CompressedStream):
            stream.replaced(0, group)
    stream.advance(0)
    # Those that a run stops at are called (or nearly so) once more; so is, with a new weight, what
    # had been silent.
    again = 2 if kind is streams.CompressedStream else 1
    assert Counter(name.rpartition(".")[2] for name in called) == {
        **{"q_proj": 2, "k_proj": 1, "v_proj": 1, "o_proj": again},
        **{"gate_proj": 2, "up_proj": 1, "down_proj": again},
    }


def test_a_group_that_is_passed_over_is_run(model: Any) -> None:
    blocks = Blocks(model, LENGTH).copied(0)
    hidden = blocks.embed(tiny_tokens(WINDOWS, LENGTH))
    stream = streams.CompressedStream(hidden.clone())
    groups = blocks.groups(0, hidden[:1])
    stream.enter(0, blocks, groups)
    for window in range(WINDOWS):
        stream.taps(0, window, groups[0])
    blocks.weights(0)["model.layers.0.mlp.down_proj"].mul_(2)
    stream.advance(0)
    for window in range(WINDOWS):
        assert_same_bits(stream.hidden[window, None], blocks.run(0, hidden[window, None]), window)
