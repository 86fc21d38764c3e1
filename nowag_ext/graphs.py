"""What capturing a step gives, on any device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]


class NoGraphError(RuntimeError):
    """A step that cannot be captured; nothing of it has been done."""


@dataclass(frozen=True)
class Captured:
    """A step that has been done.

    Attributes:
        output: what it returned; each replay writes to the same tensors.
        replay: does it again, on what its tensors then hold; None if it was not captured.
        why: why it never can be, if that showed.
        second: does the step once more, which can then be captured; raises NoGraphError.
    """

    output: Any
    replay: Callable[[], None] | None = None
    why: str | None = None
    second: Callable[[Call, torch.device], Captured] | None = None
