"""Where in a decoder layer the output of a linear is added to the residual stream, by experiment.

The layer is run again with something random added to the linear's output. A tensor that moves by
just that, and is more than the output alone, is the residual stream with the output in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from nowag_ext.pipeline.capture import Stop

# How far a tap's move may be off, in units of the dtype's rounding: root mean square, relative to
# what was added, which is as large as the residual stream. Two roundings of a sum are half a unit.
_UNITS = 2

_SEED = 0


Look = Callable[[Tensor], None]
Change = Callable[[Tensor], Tensor | None]
See = Callable[[Any], None]

_NONE: Mapping[str, Any] = MappingProxyType({})


class Run(Protocol):
    """Runs a layer. ``looks`` see what the submodules named read, and under the layer's own name
    its output; ``changes`` return another output of a linear; ``sees`` see what submodules return,
    whatever it is."""

    def __call__(
        self,
        looks: Mapping[str, Look] = _NONE,
        changes: Mapping[str, Change] = _NONE,
        sees: Mapping[str, See] = _NONE,
    ) -> Tensor: ...


@dataclass
class Trace:
    """One run of a layer.

    Attributes:
        shared: the linears that were called, by what they have read; in order of execution.
        reads: that, for each of them.
        outputs: copies of what linears returned, and
        streams: of what the submodules called once have read and of the layer's output, in order of
            execution; where they have the size of the hidden states.
        ends: by linear, the outermost submodule around it that returns the linear's very output,
            alone or in a tuple with nothing else that is computed.
    """

    shared: dict[Any, list[str]] = field(default_factory=dict)
    reads: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    streams: dict[str, Tensor] = field(default_factory=dict)
    ends: dict[str, str] = field(default_factory=dict)


def trace_layer(
    run: Run, hidden: Tensor, names: Collection[str], linears: Collection[str]
) -> Trace:
    """Runs a layer, whose submodules and itself are ``names``.

    Raises:
        ValueError: a linear is called twice.
    """
    trace = Trace()
    calls: Counter[str] = Counter()
    returned: dict[Any, tuple[str, Tensor]] = {}  # linears and outputs, by identity

    def look(name: str, tensor: Tensor) -> None:
        calls[name] += 1
        if name in linears:
            if calls[name] > 1:
                raise ValueError(f"{name} is called twice in its layer: it has no one input.")
            trace.reads[name] = tensor  # for the whole run, lest another takes its place in memory
            trace.shared.setdefault(_identity(tensor), []).append(name)
        if _alike(tensor, hidden):
            trace.streams[name] = tensor.clone()

    def keep(name: str, output: Tensor) -> None:
        if _alike(output, hidden):
            trace.outputs[name] = output.clone()

    def see(name: str, output: Any) -> None:
        tensors = [value for value in _flat(output) if isinstance(value, Tensor)]
        if len(tensors) != 1 or not isinstance(output, (Tensor, tuple)):
            return
        if name in linears and isinstance(output, Tensor):
            returned[_identity(tensors[0])] = name, tensors[0]  # kept, as above
            return
        linear, _ = returned.get(_identity(tensors[0]), ("", None))
        if linear.startswith(f"{name}.") and _flat(output)[0] is tensors[0]:
            trace.ends[linear] = name

    run(
        {name: partial(look, name) for name in names},
        {name: partial(keep, name) for name in linears},
        {name: partial(see, name) for name in names},
    )
    for name, times in calls.items():
        if times > 1:
            trace.streams.pop(name, None)
    trace.ends = {one: end for one, end in trace.ends.items() if calls[end] == 1}
    return trace


def _flat(output: Any) -> list[Any]:
    return tree_flatten(output)[0]


def _alike(tensor: Tensor, hidden: Tensor) -> bool:
    """Whether it may be a part of the residual stream; some layers flatten that to rows."""
    return tensor.numel() == hidden.numel() and tensor.shape[-1:] == hidden.shape[-1:]


def find_tap(run: Run, trace: Trace, name: str) -> str | None:
    """The first of the trace's streams that is a sum of others and the linear's output as it is."""
    output = trace.outputs.get(name)
    if output is None:
        return None
    generator = torch.Generator().manual_seed(_SEED)
    noise = torch.randn(output.shape, generator=generator).to(output.device)
    scale = max(_rms(tensor) for tensor in (output, *trace.streams.values())) or 1.0
    changed = (output.float() + scale * noise).to(output.dtype)
    delta = (changed.float() - output.float()).flatten()
    taps: list[str] = []

    def look(stream: str, tensor: Tensor) -> None:
        before = trace.streams[stream]
        move = (tensor.float() - before.float()).flatten()
        rounding = max(torch.finfo(dtype).eps for dtype in (before.dtype, output.dtype))
        alone = torch.equal(before.flatten(), output.flatten())
        if not alone and _rms(move - delta) <= _UNITS * rounding * _rms(delta):
            taps.append(stream)
            raise Stop

    looks = {stream: partial(look, stream) for stream in trace.streams}
    try:
        run(looks, {name: lambda _: changed})
    except Stop:
        return taps[0]
    return None


def _rms(tensor: Tensor) -> float:
    return float(tensor.float().square().mean().sqrt())


def _identity(tensor: Tensor) -> Any:
    """Equal for tensors that are the very same memory, not written to in between."""
    version = None if tensor.is_inference() else tensor._version
    place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.device)
    return (*place, version, tensor.dtype, tensor.shape, tensor.stride())
