"""Generation on a CUDA device under a CUDA graph.

A token of a large model is some hundreds of small kernels, which Python starts more slowly than a
GPU runs them. Captured once and replayed they take the time that they take on the device.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticCache, StaticLayer

# Arguments by which a graph's steps may not differ, and that compare.
_PLAIN = (bool, int, float, str, type(None))


class Graphs(Protocol):
    """How steps become graphs."""

    def rehearse(self, step: Callable[[], Any], device: torch.device) -> tuple[Any, str | None]:
        """Runs a step: what it returns, and why it can be no graph, if that shows."""

    def capture(
        self, step: Callable[[], Any], device: torch.device
    ) -> tuple[Callable[[], None], Any]:
        """What replays a step, and the output that each replay writes anew.

        Nothing that the step does has happened before the first replay.
        """


class CudaGraphs:
    """Those of CUDA, on the device given, whichever is current."""

    def rehearse(self, step: Callable[[], Any], device: torch.device) -> tuple[Any, str | None]:
        """A step that waits for the device cannot be captured, and trying it harms the process."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                output = step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
        waits = [one for one in caught if "synchronizing CUDA operation" in str(one.message)]
        for one in caught:
            if one not in waits:
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        if not waits:
            return output, None
        return output, f"{waits[0].filename}:{waits[0].lineno} waits for the device"

    def capture(
        self, step: Callable[[], Any], device: torch.device
    ) -> tuple[Callable[[], None], Any]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
        torch.cuda.synchronize(device)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            graph.capture_begin()
            try:
                output = step()
            except BaseException:
                with suppress(RuntimeError):  # which only says again that something went wrong
                    graph.capture_end()
                raise
            graph.capture_end()

        def replay() -> None:
            with torch.cuda.device(device):
                graph.replay()

        return replay, output


def decodes_under_graph(model: nn.Module) -> bool:
    """Whether ``decode_graph`` has something to gain: a decoder all of which is on one CUDA device.

    Its attention must be plain: a sliding window's cache counts tokens in Python, as a graph
    cannot. And nobody may have hooked its modules: a replay calls none of them.
    """
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1 or next(iter(devices)).type != "cuda" or hasattr(model, "_hf_hook"):
        return False
    if any(part._forward_hooks or part._forward_pre_hooks for part in model.modules()):
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
def decode_graph(model: Any, graphs: Graphs | None = None) -> Iterator[None]:
    """Within it the model's tokens after the first run as a CUDA graph.

    For ``model.generate(..., cache_implementation="static", disable_compile=True)``, any number of
    times: each is captured at its second new token, which takes about as long as an eager one.
    Whatever else the model is called with runs as ever: prompts, beams, other caches, hidden states
    that are asked for. So does everything where a token cannot be captured, after a warning.
    Weights may be changed in place, not replaced; hooks of submodules are not called in a replay.

    Args:
        model: a Hugging Face causal LM on one CUDA device (``decodes_under_graph``).
        graphs: how; None for CUDA graphs.
    """
    forward = model.forward
    decoder = _Decoder(forward, graphs or CudaGraphs())

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


def _is_plain(layer: Any) -> bool:
    return type(layer) is StaticLayer and isinstance(layer.cumulative_length, Tensor)


class _NoGraphError(RuntimeError):
    """A step that can be captured and not replayed."""


class _Decoder:
    """A forward that runs a token of a sequence eagerly once, then captures it, then replays."""

    def __init__(self, forward: Callable[..., Any], graphs: Graphs) -> None:
        self._forward = forward
        self._graphs = graphs
        self._kind: tuple[Any, ...] | None = None  # of the last token
        self._cache: Any = None  # of the last token: held, so that no other takes its place
        self._step: _Step | None = None
        self._failed = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kind = None if args or self._failed or torch.is_grad_enabled() else _kind(kwargs)
        if kind is None:
            return self._forward(*args, **kwargs)
        device = kwargs["input_ids"].device
        if kind != self._kind:
            # What this token allocates and looks up, a capture must find done.
            self._kind, self._cache, self._step = kind, kwargs[_cache_name(kwargs)], None
            output, why = self._graphs.rehearse(lambda: self._forward(**kwargs), device)
            if why is not None:
                self._give_up(why)
            return output
        if self._step is None:
            try:
                self._step = _Step(self._forward, kwargs, self._graphs, device)
            except RuntimeError as error:
                self._give_up(str(error))
                return self._forward(**kwargs)
        return self._step(kwargs)

    def _give_up(self, why: str) -> None:
        self._failed = True
        warnings.warn(
            f"a token could not be captured as a CUDA graph, and is not replayed: {why}",
            stacklevel=4,
        )


class _Step:
    """One token, captured: it reads its tensors where those of the first were copied to."""

    def __init__(
        self,
        forward: Callable[..., Any],
        inputs: Mapping[str, Any],
        graphs: Graphs,
        device: torch.device,
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
        self._replay, self._output = graphs.capture(lambda: forward(**own), device)
        cache = inputs[_cache_name(inputs)]
        for name, value in self._output.items():
            if not isinstance(value, Tensor) and value is not cache:
                raise _NoGraphError(f"{name} is returned, which later tokens would overwrite")

    def __call__(self, inputs: Mapping[str, Any]) -> Any:
        for place, tensor in _tensors(inputs).items():
            self._buffers[place].copy_(tensor)
        self._replay()
        # The next replay writes to the same tensors.
        return type(self._output)(
            **{
                name: value.clone() if isinstance(value, Tensor) else value
                for name, value in self._output.items()
            }
        )


def _tensors(inputs: Mapping[str, Any]) -> dict[tuple[str, str | None], Tensor]:
    """The tensors among a forward's arguments; attention masks may come in a dictionary."""
    found: dict[tuple[str, str | None], Tensor] = {}
    for name, given in inputs.items():
        for key, value in given.items() if isinstance(given, dict) else [(None, given)]:
            if isinstance(value, Tensor):
                found[name, key] = value
    return found


def _cache_name(inputs: Mapping[str, Any]) -> str:
    """The argument that is a static cache, "" if none is: releases name it differently."""
    return next((name for name, given in inputs.items() if type(given) is StaticCache), "")


def _kind(inputs: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """What must be alike for one graph to serve; None for what is not one token of a sequence."""
    ids, cache = inputs.get("input_ids"), inputs.get(_cache_name(inputs))
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] != 1 or cache is None:
        return None
    if getattr(cache, "offloading", False) or not all(
        _is_plain(layer) and getattr(layer, "is_initialized", False) for layer in cache.layers
    ):
        return None
    kind: list[Any] = [
        # Where a graph reads and writes them: beams replace the tensors of a cache.
        (layer.keys.data_ptr(), layer.values.data_ptr(), layer.cumulative_length.data_ptr())
        for layer in cache.layers
    ]
    for name, given in sorted(inputs.items()):
        if given is cache:
            continue
        for key, value in given.items() if isinstance(given, dict) else [(None, given)]:
            if isinstance(value, Tensor):
                kind.append((name, key, value.shape, value.dtype, value.device))
            elif isinstance(value, _PLAIN):
                kind.append((name, key, value))
            else:
                return None
    return tuple(kind)
