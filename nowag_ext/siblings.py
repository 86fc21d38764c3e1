"""Linears that read the same input, as one launch: one run of a step shows them to the next.

Names and classes say nothing here: whichever packed linears are given the very same tensor are
siblings. That holds for queries, keys and values, for a gate and what it gates, for a layer's
attention and MLP side by side, in any model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nowag_ext import ops
from nowag_ext.dispatched import storages, tensors_in, written

_LINEAR = torch.ops.nowag.vq_linear.default

# A linear's arguments but for its input, and their addresses.
_Weight = tuple[Any, ...]
Siblings = Mapping[tuple[int, ...], Sequence[_Weight]]


class Learning(TorchDispatchMode):
    """Notices while a step runs which linears read one tensor, and nothing writes to it between."""

    def __init__(self) -> None:
        super().__init__()
        # Inputs stay alive, so that no other tensor takes their place in memory.
        self._groups: list[tuple[Tensor, list[_Weight]]] = []
        self._open: list[tuple[Tensor, list[_Weight]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _LINEAR and _may_join(args, kwargs):
            x, *weight = args
            members = next((group for known, group in self._open if _is_same(x, known)), None)
            if members is None or len(members) == ops.VQ_MAX_MEMBERS:
                members = []
                self._groups.append((x, members))
                self._open.insert(0, (x, members))
            members.append(tuple(weight))
        places = storages(tensors_in(written(func, args, kwargs)))
        if places:
            self._open = [group for group in self._open if not storages([group[0]]) & places]
        return func(*args, **kwargs)

    def siblings(self) -> Siblings:
        """Groups of linears, each by the addresses of the one that was called first."""
        return {_addresses(group[0]): group for _, group in self._groups if len(group) > 1}


class Joining(TorchDispatchMode):
    """Computes, where the first of some siblings is called, what the others will be asked for."""

    def __init__(self, siblings: Siblings) -> None:
        super().__init__()
        self._siblings = siblings
        # What was read, and what was computed of it and is not asked for yet.
        self._ahead: list[tuple[Tensor, dict[tuple[int, ...], Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _LINEAR and _may_join(args, kwargs):
            x, *weight = args
            return self._linear(x, tuple(weight))
        places = storages(tensors_in(written(func, args, kwargs)))
        self._ahead = [one for one in self._ahead if one[1] and not storages([one[0]]) & places]
        return func(*args, **kwargs)

    def _linear(self, x: Tensor, weight: _Weight) -> Tensor:
        key = _addresses(weight)
        for known, computed in self._ahead:
            if _is_same(x, known) and key in computed:
                return computed.pop(key)
        members = self._siblings.get(key)
        if members is None:
            return _LINEAR(x, *weight)
        lists = zip(*(_filled(member) for member in members), strict=True)
        outputs = ops.vq_gemv_group(x, *map(list, lists))
        computed = dict(zip(map(_addresses, members), outputs, strict=True))
        self._ahead.append((x, computed))
        return computed.pop(key)


def _may_join(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """A bias that is no parameter was made for one call alone."""
    if kwargs:
        return False
    x, *weight = args
    bias = _filled(weight)[-1]
    few = 0 < x.numel() <= ops.GEMV_MAX_TOKENS * x.shape[-1]
    return few and (bias is None or isinstance(bias, nn.Parameter))


def _filled(weight: Sequence[Any]) -> tuple[Any, ...]:
    """With None for a bias that was not given."""
    return (*weight, None) if len(weight) == 4 else tuple(weight)


def _addresses(weight: Sequence[Any]) -> tuple[int, ...]:
    return tuple(0 if one is None else one.data_ptr() for one in _filled(weight))


def _is_same(x: Tensor, known: Tensor) -> bool:
    return (x.data_ptr(), x.shape, x.stride(), x.dtype) == (
        known.data_ptr(), known.shape, known.stride(), known.dtype
    )  # fmt: skip
