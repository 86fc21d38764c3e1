"""Generation on a CUDA device under a CUDA graph.

A token of a large model is some hundreds of small kernels, which Python starts more slowly than a
GPU runs them. Captured once and replayed they take the time that they take on the device.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticCache, StaticLayer

# Runs a step as a graph: what replays it, and the output that each replay writes anew. Nothing that
# the step does has happened before the first replay.
Capture = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]

# Arguments by which a graph's steps may not differ, and that compare.
_PLAIN = (bool, int, float, str, type(None))


def decodes_under_graph(model: nn.Module) -> bool:
    """Whether ``decode_graph`` has something to gain: a decoder all of which is on one CUDA device.

    Its attention must be plain: a sliding window's cache counts tokens in Python, as a graph
    cannot.
    """
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1 or next(iter(devices)).type != "cuda" or hasattr(model, "_hf_hook"):
        return False
    return has_plain_cache(model.config)


def has_plain_cache(config: Any) -> bool:
    """Whether a static cache of this configuration's models has tensors for all of its state."""
    try:
        layers = StaticCache(config, max_cache_len=1).layers
    except (AttributeError, KeyError, TypeError, ValueError):  # a model with a cache of its own
        return False
    return bool(layers) and all(_is_plain(layer) for layer in layers)


@contextmanager
def decode_graph(model: Any, capture: Capture | None = None) -> Iterator[None]:
    """Within it the model's tokens after the first run as a CUDA graph.

    For ``model.generate(..., cache_implementation="static", disable_compile=True)``, any number of
    times: each is captured at its second new token, which takes about as long as an eager one.
    Whatever else the model is called with runs as ever, and so does everything where a token cannot
    be captured, after a warning. Weights may be changed in place, not replaced.

    Args:
        model: a Hugging Face causal LM on one CUDA device (``decodes_under_graph``).
        capture: how; None for CUDA graphs.
    """
    forward = model.forward
    decoder = _Decoder(forward, capture or _cuda_graph)

    @functools.wraps(forward)
    def graphed(*args: Any, **kwargs: Any) -> Any:
        return decoder(*args, **kwargs)

    graphed.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    own = "forward" in vars(model)
    model.forward = graphed
    try:
        yield
    finally:
        if own:
            model.forward = forward
        else:
            del model.forward


def _cuda_graph(step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    return graph.replay, output


def _is_plain(layer: Any) -> bool:
    return type(layer) is StaticLayer and isinstance(layer.cumulative_length, Tensor)


class _Decoder:
    """A forward that runs a token of a sequence eagerly once, then captures it, then replays."""

    def __init__(self, forward: Callable[..., Any], capture: Capture) -> None:
        self._forward = forward
        self._capture = capture
        self._kind: tuple[Any, ...] | None = None  # of the last token
        self._cache: Any = None  # of the last token: held, so that no other takes its identity
        self._step: _Step | None = None
        self._failed = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kind = None if args or self._failed or torch.is_grad_enabled() else _kind(kwargs)
        if kind is None:
            return self._forward(*args, **kwargs)
        if kind != self._kind or kwargs["past_key_values"] is not self._cache:
            # What this token allocates and looks up, a capture must find done.
            self._kind, self._cache, self._step = kind, kwargs["past_key_values"], None
            return self._forward(**kwargs)
        if self._step is None:
            try:
                self._step = _Step(self._forward, kwargs, self._capture)
            except RuntimeError as error:
                self._failed = True
                warnings.warn(
                    f"a token could not be captured as a CUDA graph, so that it is not: {error}",
                    stacklevel=3,
                )
                return self._forward(**kwargs)
        return self._step(kwargs)


class _Step:
    """One token, captured: it reads its tensors where those of the first were copied to."""

    def __init__(
        self, forward: Callable[..., Any], inputs: Mapping[str, Any], capture: Capture
    ) -> None:
        self._buffers = {place: tensor.clone() for place, tensor in _tensors(inputs).items()}
        own = {
            name: (
                {key: self._buffers.get((name, key), value) for key, value in given.items()}
                if isinstance(given, dict)
                else self._buffers.get((name, None), given)
            )
            for name, given in inputs.items()
        }
        self._replay, self._output = capture(lambda: forward(**own))

    def __call__(self, inputs: Mapping[str, Any]) -> Any:
        for place, tensor in _tensors(inputs).items():
            self._buffers[place].copy_(tensor)
        self._replay()
        return self._output


def _tensors(inputs: Mapping[str, Any]) -> dict[tuple[str, str | None], Tensor]:
    """The tensors among a forward's arguments; attention masks may come in a dictionary."""
    found: dict[tuple[str, str | None], Tensor] = {}
    for name, given in inputs.items():
        for key, value in given.items() if isinstance(given, dict) else [(None, given)]:
            if isinstance(value, Tensor):
                found[name, key] = value
    return found


def _kind(inputs: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """What must be alike for one graph to serve; None for what is not one token of a sequence."""
    ids, cache = inputs.get("input_ids"), inputs.get("past_key_values")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] != 1:
        return None
    if type(cache) is not StaticCache or not all(
        _is_plain(layer) and getattr(layer, "is_initialized", False) for layer in cache.layers
    ):
        return None
    plain: list[Any] = []
    for name, given in sorted(inputs.items()):
        if name == "past_key_values":
            continue
        for key, value in given.items() if isinstance(given, dict) else [(None, given)]:
            if isinstance(value, Tensor):
                plain.append((name, key, value.shape, value.dtype, value.device))
            elif isinstance(value, _PLAIN):
                plain.append((name, key, value))
            else:
                return None
    return tuple(plain)
