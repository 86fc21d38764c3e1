"""Linears that read the same input, as one launch: one run of a step shows them to the next.

Names and classes say nothing here: whichever packed linears are given the very same tensor are
siblings. That holds for queries, keys and values, for a gate and what it gates, for a layer's
attention and MLP side by side, in any model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nowag_ext import ops
from nowag_ext.dispatched import storages, tensors_in, written

_LINEAR = torch.ops.nowag.vq_linear.default

# A linear's arguments but for its input, and what tells it from others for an input's dtype.
_Weight = tuple[Any, ...]
_Key = tuple[Any, ...]
Siblings = Mapping[_Key, Sequence[_Weight]]


@dataclass
class _Read:
    """An input, alive so that no other tensor takes its place in memory, and who has read it.

    Attributes:
        written: where something has been written since.
    """

    x: Tensor
    place: tuple[Any, ...]
    members: list[_Weight]
    written: set[int]


class Learning(TorchDispatchMode):
    """Notices while a step runs which linears read one tensor, and nothing writes to it between.

    Nor to their weights. What writes past torch's dispatcher is not seen.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._groups: list[_Read] = []
        self._open: list[_Read] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _LINEAR and _may_join(args, kwargs):
            self._note(args[0], args[1:])
        places = _places_written(func, args, kwargs)
        if places is None:
            self._open = []
        elif places:
            self._open = [one for one in self._open if not storages([one.x]) & places]
            for one in self._open:
                one.written |= places
        return func(*args, **kwargs)

    def _note(self, x: Tensor, weight: _Weight) -> None:
        place, reads = _place(x), storages(tensors_in(weight))
        for one in self._open:
            room = len(one.members) < ops.VQ_MAX_MEMBERS
            if one.place == place and room and not one.written & reads:
                one.members.append(weight)
                return
        self._groups.append(_Read(x, place, [weight], set()))
        self._open.insert(0, self._groups[-1])

    def siblings(self) -> Siblings:
        """Groups of linears, each by the key of the one that was called first."""
        return {
            _key(group.x, group.members[0]): group.members
            for group in self._groups
            if len(group.members) > 1
        }


class Joining(TorchDispatchMode):
    """Computes, where the first of some siblings is called, what the others will be asked for."""

    supports_higher_order_operators = True

    def __init__(self, siblings: Siblings) -> None:
        super().__init__()
        self._siblings = siblings
        # What was read, and what was computed of it and is not asked for yet: by key the weight
        # and the output.
        self._ahead: list[tuple[Tensor, tuple[Any, ...], dict[_Key, tuple[_Weight, Tensor]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _LINEAR and _may_join(args, kwargs):
            return self._linear(args[0], args[1:])
        places = _places_written(func, args, kwargs)
        if places is None:
            self._ahead = []
        elif places:
            self._ahead = [one for one in self._ahead if not storages([one[0]]) & places]
            for _, _, computed in self._ahead:
                for key, (weight, _) in list(computed.items()):
                    if storages(tensors_in(weight)) & places:
                        del computed[key]
        self._ahead = [one for one in self._ahead if one[2]]
        return func(*args, **kwargs)

    def _linear(self, x: Tensor, weight: _Weight) -> Tensor:
        key, place = _key(x, weight), _place(x)
        for _, known, computed in self._ahead:
            if known == place and key in computed:
                return computed.pop(key)[1]
        members = self._siblings.get(key)
        if members is None:
            return _LINEAR(x, *weight)
        lists = zip(*(_filled(member) for member in members), strict=True)
        outputs = ops.vq_gemv_group(x, *map(list, lists))
        computed = {
            _key(x, member): (member, output)
            for member, output in zip(members, outputs, strict=True)
        }
        self._ahead.append((x, place, computed))
        return computed.pop(key)[1]


def _places_written(func: Any, args: Any, kwargs: Any) -> set[int] | None:
    """The storages that an operation writes to in place; None where it does not say."""
    if not hasattr(func, "_schema"):  # of a higher order
        return None
    return storages(tensors_in(written(func, args, kwargs)))


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


def _key(x: Tensor, weight: Sequence[Any]) -> _Key:
    """A weight may be a part of another: addresses do not tell them apart."""
    tensors = (None if one is None else (one.data_ptr(), one.shape) for one in _filled(weight))
    return (x.dtype, *tensors)


def _place(x: Tensor) -> tuple[Any, ...]:
    """What is alike for the very same input; on a GPU read in the same stream."""
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    return x.data_ptr(), x.shape, x.stride(), x.dtype, stream
