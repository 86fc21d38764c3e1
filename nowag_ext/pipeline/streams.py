"""Hidden states on their way through a model's layers: the dense ones, and the compressed ones."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nowag_ext.files import MARK, require_space
from nowag_ext.pipeline.blocks import Blocks, Group, Taps
from nowag_ext.pipeline.capture import output_tensor, with_tensor

# What each stream may keep of a layer while that is worked on; the rest is run again.
_SEEN_BYTES = 1 << 29


def embedded(
    blocks: Blocks, windows: Tensor, directory: str | os.PathLike[str] | None = None
) -> Tensor:
    """What the first layer receives, fp32 [windows, length, hidden_size].

    In a file of ``directory`` if there is one, mapped into memory. It has no name, so that the disk
    has its space back whenever and however the process ends.
    """
    states: Tensor | None = None
    for index, window in enumerate(windows.split(1)):
        hidden = blocks.embed(window).float()
        if states is None:
            states = _allocated((len(windows), *hidden.shape[1:]), directory, hidden.device)
        states[index] = hidden[0]
    assert states is not None
    return states


def _allocated(
    shape: tuple[int, ...], directory: str | os.PathLike[str] | None, device: torch.device
) -> Tensor:
    if directory is None:
        return torch.empty(shape, dtype=torch.float32, device=device)
    if device.type != "cpu":
        raise ValueError(f"offload_dir is for a model on the CPU, not on {device}.")
    size = math.prod(shape) * 4
    require_space(Path(directory), size)
    with tempfile.NamedTemporaryFile(dir=directory, prefix=MARK) as file:
        # Allocated now: a disk that is full later would end the process at a write to memory.
        os.posix_fallocate(file.fileno(), 0, size)
        return torch.from_file(
            file.name, shared=True, size=math.prod(shape), dtype=torch.float32
        ).view(shape)


class Stream:
    """Hidden states on their way through the model, and the blocks that they go through.

    A layer is run again for each of its groups, but modules that end with a group which is done
    with are not: what they return is kept, for as many windows as there is room for.
    """

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden  # fp32 [windows, length, hidden_size]
        self._given: list[dict[str, Any]] = []  # by window, what modules return

    def enter(self, index: int, blocks: Blocks, groups: Sequence[Group]) -> None:
        """Prepares for a layer, which the stream holds until it has advanced through it."""
        self.blocks = blocks
        self._given = [{} for _ in self.hidden]
        size = self._kept_features(groups) * self.hidden[0, :, 0].numel()
        self._room = _SEEN_BYTES // max(1, size * self.hidden.element_size())

    def _kept_features(self, groups: Sequence[Group]) -> int:
        """What is kept of a layer at most, a token."""
        ends = sum(len(set(group.ends) - {None}) for group in groups)
        return ends * self.hidden.shape[2]

    def taps(self, index: int, window: int, group: Group) -> Taps:
        """What a group reads and adds to (``Blocks.taps``) in one window."""
        return self._taps(index, window, group)

    def _taps(self, index: int, window: int, group: Group, *, silent: bool = False) -> Taps:
        given = self._given[window]
        hidden = self.hidden[window, None]
        taps = self.blocks.taps(index, hidden, group, given, silent=silent)
        if window < self._room:
            given.update(taps.ends)
        return taps

    def advance(self, index: int) -> None:
        """Through one layer, window by window."""
        for window, given in zip(self.hidden.split(1), self._given, strict=True):
            window.copy_(self.blocks.run(index, window, given=given))
        self._given = []
        del self.blocks


class CompressedStream(Stream):
    """The stream through the blocks compressed so far, whose weights change on the way.

    What a group adds to is shown without what its own linears add: that is about to change.
    """

    def enter(self, index: int, blocks: Blocks, groups: Sequence[Group]) -> None:
        super().enter(index, blocks, groups)
        self._inputs: dict[int, Tensor] = {}  # by window, of the group that is looked at

    def _kept_features(self, groups: Sequence[Group]) -> int:
        ending = [group.in_features for group in groups if set(group.ends) != {None}]
        return super()._kept_features(groups) + max(ending, default=0)

    def taps(self, index: int, window: int, group: Group) -> Taps:
        taps = self._taps(index, window, group, silent=True)
        if taps.ends and window < self._room:
            self._inputs[window] = taps.inputs
        return taps

    def look(self, index: int, group: Group) -> None:
        """Sees what ``taps`` would show, of a group that is not to be asked for it any more."""
        if set(group.ends) != {None}:
            for window in range(min(self._room, len(self.hidden))):
                self.taps(index, window, group)

    def replaced(self, index: int, group: Group) -> None:
        """Says that the group's weights are final now, and others than when it was looked at."""
        for window, inputs in self._inputs.items():
            given = self._given[window]
            for name, end in zip(group.names, group.ends, strict=True):
                if end is not None and end in given:
                    before = output_tensor(given[end])
                    after = self.blocks.linear(index, name, inputs).view_as(before)
                    given[end] = with_tensor(given[end], after)
        self._inputs = {}
