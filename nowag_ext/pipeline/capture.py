"""How a model calls each of its decoder layers, recorded from the model's own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

Forward = Callable[..., Any]

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class Stop(Exception):
    """Ends a forward of which enough has been seen."""


@dataclass(frozen=True)
class Call:
    """The arguments that a model gives one of its layers, without the hidden states.

    Attributes:
        keyword: whether the hidden states are passed by name, not first.
        args, kwargs: all the others.
    """

    keyword: bool
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def to(self, dtype: torch.dtype) -> Call:
        """The same call with its floating-point tensors in another dtype."""

        def convert(value: Any) -> Any:
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype) if floating else value

        args, kwargs = tree_map(convert, (self.args, dict(self.kwargs)))
        return Call(self.keyword, args, kwargs)

    def __call__(self, layer: nn.Module, hidden: Tensor) -> Any:
        """What the layer returns for other hidden states."""
        if self.keyword:
            return layer(*self.args, hidden_states=hidden, **self.kwargs)
        return layer(hidden, *self.args, **self.kwargs)


def split_call(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Call]:
    """The hidden states among a layer's arguments, and the others."""
    keyword = "hidden_states" in kwargs
    hidden = kwargs["hidden_states"] if keyword else next(iter(args), None)
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        got = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise ValueError(
            f"the model must call {name} with hidden states [windows, length, hidden_size], first "
            f"or as hidden_states, not with {got}."
        )
    others = {key: value for key, value in kwargs.items() if key != "hidden_states"}
    return hidden, Call(keyword, args if keyword else args[1:], others)


def output_tensor(output: Any) -> Tensor:
    """The hidden states that a layer returns, alone or first in a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def with_tensor(output: Any, tensor: Tensor) -> Any:
    """What ``output`` is, of a tensor or a tuple, with other hidden states in it."""
    return tensor if isinstance(output, Tensor) else (tensor, *output[1:])


def record_calls(
    layers: Mapping[str, nn.Module], body: Callable[[], Any]
) -> tuple[dict[str, Call], Any]:
    """Runs ``body`` with every layer but the first replaced by a recorder of its arguments.

    Returns:
        The calls by layer, and what the first layer has returned.

    Raises:
        ValueError: ``body`` does not call the layers one after another, each once, each on exactly
            what the one before it has returned.
    """
    recorder = _Recorder(list(layers))
    with replaced_forwards(layers, recorder.record):
        body()
    if recorder.expected is not None:
        raise ValueError(
            f"the model never calls {recorder.expected}: it cannot be run layer by layer."
        )
    return recorder.calls, recorder.output


class _Recorder:
    """Stands in for the layers, whose hidden states it passes on in their own structure."""

    def __init__(self, names: Sequence[str]) -> None:
        self.calls: dict[str, Call] = {}
        self._names = names
        self.output: Any = None  # the first layer's
        self._passed: Tensor | None = None

    @property
    def expected(self) -> str | None:
        """The layer to be called next, if there is one more."""
        return next(iter(self._names[len(self.calls) :]), None)

    def record(self, name: str, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        hidden, call = split_call(name, args, kwargs)
        if name != self.expected:
            raise ValueError(
                f"the model calls {name} twice or out of order: it cannot be run layer by layer."
            )
        if self._passed is not None and not _same(hidden, self._passed):
            raise ValueError(
                f"what {name} reads is not what the layer before it returns: the model cannot be "
                "run layer by layer."
            )
        self.calls[name] = call
        if self._passed is None:
            # A tensor or a tuple: the loop that calls the layers takes the same of all of them.
            self.output = forward(*args, **kwargs)
        # Rolled, so that the check above sees a model that mixes in the hidden states of before.
        self._passed = hidden.roll(1, dims=-1)
        return with_tensor(self.output, self._passed)


def _same(one: Tensor, two: Tensor) -> bool:
    return one is two or (one.shape == two.shape and torch.equal(one, two))


def check_calls(one: Mapping[str, Call], two: Mapping[str, Call]) -> None:
    """Raises ValueError unless the calls of one batch of windows serve the other as they are.

    A tensor of ``one`` may be shorter where it broadcasts.
    """
    for name, call in one.items():
        leaves, structure = tree_flatten((call.args, dict(call.kwargs)))
        others, other = tree_flatten((two[name].args, dict(two[name].kwargs)))
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, *_PLAIN)):
                raise ValueError(
                    f"the model calls {name} with a {type(leaf).__name__}, which may change from "
                    "call to call: it cannot be run layer by layer."
                )
        if structure != other or not all(map(_serves, leaves, others)):
            raise ValueError(
                f"the arguments of {name} depend on the text or on the number of windows: the "
                "model cannot be run layer by layer."
            )


def _serves(one: Any, two: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(two, Tensor):
        return type(one) is type(two) and one == two
    if one.dtype != two.dtype or one.dim() != two.dim():
        return False
    if any(size not in (1, wanted) for size, wanted in zip(one.shape, two.shape, strict=True)):
        return False
    return torch.equal(one.expand_as(two), two)


def first_hidden(name: str, layer: nn.Module, body: Callable[[], Any]) -> Tensor:
    """What ``body`` gives its first layer; it is stopped there."""
    received: list[Tensor] = []

    def receive(name: str, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        received.append(split_call(name, args, kwargs)[0])
        raise Stop

    with replaced_forwards({name: layer}, receive), suppress(Stop):
        body()
    return received[0]


@contextmanager
def replaced_forwards(layers: Mapping[str, nn.Module], forward: Forward) -> Iterator[None]:
    """Layers whose forward is ``forward(name, own forward, ...)`` for as long as this is open."""
    with ExitStack() as stack:  # last replaced, first restored, if two names are of one layer
        for name, layer in layers.items():
            state = vars(layer)
            own = state.get("forward")  # a wrapper of accelerate's, say; most have the class's
            if own is None:
                stack.callback(state.pop, "forward")
            else:
                stack.callback(state.__setitem__, "forward", own)
            state["forward"] = partial(forward, name, layer.forward)
        yield


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A module in eval mode, and back in the modes it was in."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for part, training in modes:
            part.training = training
