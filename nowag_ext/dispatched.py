"""What operations that torch dispatches are given, and write to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Those among values, and in lists of them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


def storages(tensors: Iterable[Tensor]) -> set[int]:
    """Where they are in memory."""
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """The arguments that an operation writes to in place."""
    if not func._schema.is_mutable:
        return
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            if place < len(args):
                yield args[place]
            elif argument.name in kwargs:
                yield kwargs[argument.name]
