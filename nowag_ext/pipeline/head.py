"""What a model makes of what its last decoder layer returns: final norm, logits, what else it does.

None of it is written again: the model's own forward runs, with layers that pass on what they are to
return.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nowag_ext.offload import equal_bits
from nowag_ext.packed import PackedModule
from nowag_ext.pipeline.blocks import Blocks
from nowag_ext.pipeline.capture import Stop, evaluating, replaced_forwards


class Head:
    """Logits of a model from the hidden states that its last layer returns, in fp32.

    Args:
        model: a Hugging Face causal LM, whose layers may be on disk.
        blocks: its layers.
        logits: False: it is to be asked for ``inputs`` alone.
        like: of another model; what is equal in both is held once.
    """

    def __init__(
        self, model: Any, blocks: Blocks, *, logits: bool = True, like: Head | None = None
    ) -> None:
        self._model, self._blocks = model, blocks
        self._embedding = model.get_input_embeddings()
        output = model.get_output_embeddings()
        # What is not run needs no copy, and these are the largest of all.
        idle = [part for part in model.modules() if isinstance(part, PackedModule)]
        if output is not None:
            idle += [self._embedding] if logits else [self._embedding, output]
        left_out = {id(parameter) for part in idle for parameter in part.parameters()}
        if logits and output not in (None, *idle):  # it may be tied to the embedding
            left_out -= {id(parameter) for parameter in output.parameters()}
        within = tuple(f"{name}." for name in blocks.layers)
        parameters = {
            name: parameter.detach()
            for name, parameter in model.named_parameters()
            if not name.startswith(within)
            and id(parameter) not in left_out
            and parameter.is_floating_point()
        }
        on_disk = [name for name, parameter in parameters.items() if parameter.is_meta]
        if on_disk:
            raise ValueError(
                f"{on_disk[0]} is on disk: all but the decoder layers must be in memory."
            )
        self._own = parameters
        self._parameters: dict[str, Tensor] = {
            name: like._parameters[name]
            if like is not None and name in like._own and equal_bits(one, like._own[name])
            else _ordinary(one.float())
            for name, one in parameters.items()
        }

    def tensors(self) -> Iterable[Tensor]:
        """All that the logits follow from beside the hidden states."""
        return self._parameters.values()

    def __call__(self, hidden: Tensor) -> Tensor:
        """fp32 [windows, length, vocabulary] of [windows, length, hidden_size], any length.

        Recorded for a backward to the hidden states, if gradients are on.
        """
        logits: Tensor = self._run(hidden).logits
        return logits

    @torch.no_grad()
    def inputs(self, hidden: Tensor) -> Tensor:
        """What the head itself reads, fp32 [windows, length, in_features]."""
        seen: list[Tensor] = []

        def look(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0].float())
            raise Stop

        hook = self._model.get_output_embeddings().register_forward_pre_hook(look)
        try:
            with suppress(Stop):
                self._run(hidden)
        finally:
            hook.remove()
        return seen[0]

    def _run(self, hidden: Tensor) -> Any:
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        # Nobody looks at what the tokens are: the layers pass on other states.
        embedded = hidden.new_zeros(*ids.shape, self._embedding.embedding_dim)
        with (
            evaluating(self._model),
            self._blocks.skipped(hidden),
            replaced_forwards({"": self._embedding}, lambda *_, **__: embedded),
        ):
            given = {"input_ids": ids, "use_cache": False, "return_dict": True}
            return functional_call(self._model, self._parameters, (), given)


def _ordinary(tensor: Tensor) -> Tensor:
    """A tensor that a backward takes, which one made in inference mode is not."""
    return tensor.clone() if tensor.is_inference() else tensor
