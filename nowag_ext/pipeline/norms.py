"""Activation norms from a run through the dense blocks."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from nowag_ext.calibrate import CalibrationStatistics, column_squares
from nowag_ext.pipeline.blocks import Blocks
from nowag_ext.pipeline.ranks import Ranks
from nowag_ext.pipeline.streams import embedded
from nowag_ext.report import Progress


def activation_norms(
    blocks: Blocks, windows: Tensor, ranks: Ranks, progress: Progress | None
) -> dict[str, Tensor]:
    """act_norms, fp32 [in_features], of every linear that the windows reach, by its name."""
    statistics = CalibrationStatistics()

    def look(name: str, inputs: Tensor) -> None:
        rows = inputs.reshape(-1, inputs.shape[-1])
        statistics.add(name, column_squares(name, rows), len(rows))

    hidden = embedded(blocks, windows[ranks.share(len(windows))])
    for index in range(len(blocks.layers)):
        if progress is not None:
            progress("activation norms", index, len(blocks.layers))
        block = blocks.copied(index)
        looks = {name: partial(look, name) for name in block.linears(index)}
        for window in hidden.split(1):
            window.copy_(block.run(index, window, looks))
    said = (ranks.tell((statistics.tensors(), None), rank) for rank in range(ranks.count))
    parts = [CalibrationStatistics.of_tensors("statistics", tensors) for tensors, _ in said]
    return CalibrationStatistics().merge(*parts).act_norms()
