"""What a model makes of what its last decoder layer returns: final norm, logits, what else it does.

None of it is written again: the model's own forward runs, with layers that pass on what they are to
return.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from nowag_ext.pipeline.blocks import Blocks
from nowag_ext.pipeline.capture import evaluating


class Head:
    """Logits of a model from the hidden states that its last layer returns, in fp32.

    Args:
        model: a Hugging Face causal LM, whose layers may be on disk.
        blocks: its layers.
    """

    def __init__(self, model: Any, blocks: Blocks) -> None:
        self._model, self._blocks = model, blocks
        within = tuple(f"{name}." for name in blocks.layers)
        self._parameters = {
            name: _ordinary(parameter.detach().float())
            for name, parameter in model.named_parameters()
            if not name.startswith(within) and parameter.is_floating_point()
        }

    def tensors(self) -> Iterable[Tensor]:
        """All that the logits follow from beside the hidden states."""
        return self._parameters.values()

    def __call__(self, hidden: Tensor) -> Tensor:
        """fp32 [windows, length, vocabulary] of [windows, length, hidden_size], any length.

        Recorded for a backward to the hidden states, if gradients are on.
        """
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        with evaluating(self._model), self._blocks.skipped(hidden):
            given = {"input_ids": ids, "use_cache": False, "return_dict": True}
            logits: Tensor = functional_call(self._model, self._parameters, (), given).logits
        return logits


def _ordinary(tensor: Tensor) -> Tensor:
    """A tensor that a backward takes, which one made in inference mode is not."""
    return tensor.clone() if tensor.is_inference() else tensor
