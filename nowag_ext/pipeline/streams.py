"""Hidden states on their way through a model's layers: the dense ones, and the compressed ones."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nowag_ext.files import MARK, require_space
from nowag_ext.pipeline.blocks import Blocks, Group, Taps

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
    """Hidden states on their way through the model, and the blocks that they go through."""

    blocks: Blocks

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden  # fp32 [windows, length, hidden_size]

    def taps(self, index: int, window: int, group: Group) -> Taps:
        """What a group reads and adds to (``Blocks.taps``) in one window."""
        return self.blocks.taps(index, self.hidden[window, None], group)

    def advance(self, index: int) -> None:
        """Through one layer, window by window."""
        for window in self.hidden.split(1):
            window.copy_(self.blocks.run(index, window))


class DenseStream(Stream):
    """The stream through dense blocks, which change no more: one run of a window serves all groups.

    What there is no room for is run again, group by group.
    """

    def __init__(self, hidden: Tensor) -> None:
        super().__init__(hidden)
        self._seen: dict[int, list[Taps]] = {}
        self._outputs: dict[int, Tensor] = {}

    def enter(self, index: int, groups: Sequence[Group]) -> None:
        """Runs a layer on as many windows as there is room for."""
        size = sum(
            group.in_features + self.hidden.shape[2] * len(set(group.taps) - {None})
            for group in groups
        )
        room = _SEEN_BYTES // (size * self.hidden.shape[1] * self.hidden.element_size())
        self._groups = list(groups)
        self._seen, self._outputs = {}, {}
        for window in range(min(room, len(self.hidden))):
            self._outputs[window], self._seen[window] = self.blocks.run_taps(
                index, self.hidden[window, None], groups
            )

    def taps(self, index: int, window: int, group: Group) -> Taps:
        if window not in self._seen:
            return super().taps(index, window, group)
        return self._seen[window][self._groups.index(group)]

    def advance(self, index: int) -> None:
        for window, hidden in enumerate(self.hidden.split(1)):
            output = self._outputs.get(window)
            hidden.copy_(self.blocks.run(index, hidden) if output is None else output)


class CompressedStream(Stream):
    """The stream through the blocks compressed so far.

    Linears whose outputs are added to the layer's own, as the last in a layer are, need no further
    run of it once they have changed: what they add changes by x~ times what their weights did.
    """

    def enter(self, index: int, groups: Sequence[Group], units: Collection[str]) -> None:
        """Prepares for a layer, of whose linears ``units`` will change."""
        last, output = groups[-1], self.blocks.layers[index]
        ends = set(last.taps) == {output} and set(last.names) <= set(units)
        self._last = last if ends else None
        size = (last.in_features + self.hidden.shape[2]) * self.hidden.element_size()
        self._room = _SEEN_BYTES // (size * self.hidden.shape[1])
        self._seen: dict[int, Taps] = {}
        self._changes: dict[str, Tensor] = {}

    def taps(self, index: int, window: int, group: Group) -> Taps:
        taps = super().taps(index, window, group)
        if group is self._last and window < self._room:
            self._seen[window] = taps
        return taps

    def look(self, index: int, group: Group) -> None:
        """Sees what ``taps`` would show, of a group that is not to be asked for it any more."""
        if group is self._last:
            for window in range(min(self._room, len(self.hidden))):
                self.taps(index, window, group)

    def replace(self, name: str, weight: Tensor, changed: Tensor) -> None:
        """Puts another weight into the layer."""
        if self._last is not None and name in self._last.names:
            self._changes[name] = changed - weight
        weight.copy_(changed)

    def advance(self, index: int) -> None:
        for window, hidden in enumerate(self.hidden.split(1)):
            if window not in self._seen:
                hidden.copy_(self.blocks.run(index, hidden))
                continue
            inputs, sums = self._seen[window]
            output = next(iter(sums.values()))
            for change in self._changes.values():
                output = torch.addmm(output, inputs, change.T)
            hidden.copy_(output.view_as(hidden))
