"""What is continuous in packed weights, while gradients move it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from nowag_ext.linear import PackedLinear, PackedWeight


class TunedTensors:
    """What is continuous in packed weights, each tensor as a step from where it began.

    A shared codebook moves once, for all weights that it serves.

    Attributes:
        steps: by name, fp32, beginning at 0, with the gradients of the weights added so far.
    """

    def __init__(self, weights: Mapping[str, PackedWeight]) -> None:
        self._weights = weights
        self._keys: dict[str, dict[str, str]] = {}  # by weight and part
        self._began: dict[str, tuple[Tensor, Tensor]] = {}  # and the size of a step
        self.steps: dict[str, Tensor] = {}
        for name, weight in weights.items():
            keys = self._keys[name] = {}
            for part, size in weight.step_sizes().items():
                shared = weight.shared.get(part)
                key = keys[part] = f"{name}.{part}" if shared is None else f"shared {shared}"
                if key not in self.steps:
                    tensor = weight.tensors()[part]
                    self._began[key] = tensor, size
                    zeros = torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device)
                    self.steps[key] = zeros
                    self.steps[key].grad = torch.zeros_like(self.steps[key])

    def _stored(self, key: str) -> Tensor:
        """Where a tensor is now, as it would be stored."""
        began, size = self._began[key]
        limit = torch.finfo(began.dtype).max
        moved = began.float().addcmul(self.steps[key], size)
        return moved.clamp_(-limit, limit).to(began.dtype)

    def weight(self, name: str) -> PackedWeight:
        """A weight as it would be stored now."""
        parts = {part: self._stored(key) for part, key in self._keys[name].items()}
        return replace(self._weights[name], **parts)  # type: ignore[arg-type]

    def add(self, name: str, weight: PackedWeight, weight_grad: Tensor) -> None:
        """Adds to the steps' gradients those of a weight, as it is now, from its dense form's."""
        for part, gradient in weight.gradients(weight_grad).items():
            key = self._keys[name][part]
            total = self.steps[key].grad
            assert total is not None
            total.addcmul_(gradient, self._began[key][1])

    def install(self, modules: Mapping[str, PackedLinear]) -> None:
        """Stores what has moved in the modules of the weights."""
        # All before any: what they began from may be the modules' very tensors.
        stored = {key: self._stored(key) for key in self.steps}
        for name, keys in self._keys.items():
            for part, key in keys.items():
                tensor = getattr(modules[name], part)
                with torch.inference_mode(tensor.is_inference()):
                    tensor.copy_(stored[key])
