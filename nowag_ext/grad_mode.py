"""The grad mode that the package's own work runs in, whatever the caller's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def ordinary_tensors(function: Function) -> Function:
    """Runs without gradients, and outside inference mode, whose tensors no later backward takes."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]
