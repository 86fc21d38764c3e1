"""Generation under a graph: one token's work, captured once and replayed for those that follow.

A token is some hundreds of small operations. On a GPU Python starts them more slowly than they run,
and on a CPU torch's dispatcher takes longer for one than its arithmetic does. CUDA graphs
(``cuda_graphs``) and recordings (``cpu_graphs``) leave that out.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticCache, StaticLayer, StaticSlidingWindowLayer

from nowag_ext.cpu_graphs import CpuGraphs
from nowag_ext.cuda_graphs import CudaGraphs
from nowag_ext.graphs import Call, Captured, NoGraphError

# Of a model's; a subclass may do anything with its operations.
_OWN_TENSORS = (Tensor, nn.Parameter)
# What marks a forward that is replayed.
_GRAPHED = "_nowag_graphed"
# Arguments by which a graph's steps may not differ, and that compare.
_PLAIN = (bool, int, float, str, type(None))


class Graphs(Protocol):
    """How steps become graphs: at once, or when they have been done before."""

    def first(self, step: Call, device: torch.device) -> Captured:
        """Does a step that may be the first of its kind."""


def decodes_under_graph(model: nn.Module, length: int = 1) -> bool:
    """Whether ``decode_graph`` has something to gain: a decoder all of which is on one device.

    That is a CPU or a GPU. Its authors must say that it does the same for every token, as torch
    compiles it whole. And nobody may have hooked its modules: a replay calls none of them.

    Args:
        model: a Hugging Face causal LM.
        length: of the text, prompt and new tokens: a window that slides must be as wide.
    """
    if not getattr(model, "_can_compile_fullgraph", False):
        return False
    tensors = [*model.parameters(), *model.buffers()]
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        return False
    if hasattr(model, "_hf_hook") or any(type(one) not in _OWN_TENSORS for one in tensors):
        return False
    if any(part._forward_hooks or part._forward_pre_hooks for part in model.modules()):
        return False
    return has_plain_cache(model.config, length)


def has_plain_cache(config: Any, length: int) -> bool:
    """Whether in a static cache of this configuration's models all tokens have places of their own.

    A graph writes to the one that a tensor names. A window that has begun to slide moves them.
    """
    try:
        layers = StaticCache(config, max_cache_len=length).layers
    except (AttributeError, KeyError, TypeError, ValueError):  # a model with a cache of its own
        return False
    return bool(layers) and all(_is_plain(layer, length) for layer in layers)


@contextmanager
def decode_graph(model: Any, graphs: Graphs | None = None) -> Iterator[None]:
    """Within it the model's tokens after the first run as a graph, which leaves Python out.

    For ``model.generate(..., cache_implementation="static", disable_compile=True)``, any number of
    times: each is captured at its second new token (on a GPU its third), which takes longer.
    Whatever else the model is called with runs as ever: prompts, beams, other caches, hidden states
    that are asked for. So does everything where a token cannot be captured, after a warning.
    Weights may be changed in place, not replaced; nothing else of the model, such as which adapter
    is on, may change between tokens. Hooks of submodules are not called in a replay.

    Args:
        model: a Hugging Face causal LM on one device (``decodes_under_graph``).
        graphs: how; None for CUDA graphs on a GPU, recorded operations on a CPU.
    """
    forward = model.forward
    if hasattr(forward, _GRAPHED):  # it is within another already, whose replays show no operations
        yield
        return
    decoder = _Decoder(model, graphs or _graphs_of(model))

    @functools.wraps(forward)
    def graphed(*args: Any, **kwargs: Any) -> Any:
        return decoder(*args, **kwargs)

    setattr(graphed, _GRAPHED, True)
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


def _graphs_of(model: nn.Module) -> Graphs:
    on_cpu = next(model.parameters()).is_cpu
    return CpuGraphs() if on_cpu else CudaGraphs()


def _is_plain(layer: Any, length: int) -> bool:
    """Whether a layer of a static cache has places for so many tokens, and a tensor to tell which.

    A window's counts its tokens in Python too.
    """
    if not isinstance(getattr(layer, "cumulative_length", None), Tensor):
        return False
    return type(layer) is StaticLayer or (_slides(layer) and layer.max_cache_len >= length)


def _slides(layer: Any) -> bool:
    return type(layer) is StaticSlidingWindowLayer and hasattr(layer, "cumulative_length_int")


def _tokens_in(layer: Any) -> int:
    return layer.cumulative_length_int if _slides(layer) else 0


class _Decoder:
    """A forward that captures a token of a sequence, at the first or the second, and replays it."""

    def __init__(self, model: Any, graphs: Graphs) -> None:
        self._model = model
        self._forward: Callable[..., Any] = model.forward
        self._graphs = graphs
        self._kind: tuple[Any, ...] | None = None  # of the last token
        self._cache: Any = None  # of the last token: held, so that no other takes its place
        self._step: _Step | None = None
        self._failed = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kind = None if args or self._failed or torch.is_grad_enabled() else _kind(kwargs)
        if kind is None:
            return self._forward(*args, **kwargs)
        kind = (self._model.training, *kind)
        if kind != self._kind:
            self._kind, self._cache = kind, kwargs[_cache_name(kwargs)]
            self._step = _Step(self._forward, kwargs, self._graphs)
        assert self._step is not None
        try:
            output = self._step(kwargs)
        except NoGraphError as error:
            self._give_up(str(error))
            return self._forward(**kwargs)
        if self._step.why is not None:
            self._give_up(self._step.why)
        return output

    def _give_up(self, why: str) -> None:
        self._failed = True
        warnings.warn(
            f"a token could not be captured as a graph, and is not replayed: {why}",
            stacklevel=4,
        )


class _Step:
    """One token: it reads its tensors where those of the first were copied to.

    Attributes:
        why: why it can be no graph, once that is known.
    """

    def __init__(
        self, forward: Callable[..., Any], inputs: Mapping[str, Any], graphs: Graphs
    ) -> None:
        self._buffers = {place: tensor.clone() for place, tensor in _tensors(inputs).items()}
        self._inputs: dict[str, Any] = {
            name: (
                {key: self._buffers.get((name, key), value) for key, value in given.items()}
                if isinstance(given, dict)
                else self._buffers.get((name, None), given)
            )
            for name, given in inputs.items()
        }
        self._forward, self._graphs = forward, graphs
        self._captured: Captured | None = None
        self.why: str | None = None

    def __call__(self, inputs: Mapping[str, Any]) -> Any:
        for place, tensor in _tensors(inputs).items():
            self._buffers[place].copy_(tensor)
        if self._captured is not None and self._captured.replay is not None:
            self._captured.replay()
            for layer in self._inputs[_cache_name(self._inputs)].layers:
                if _slides(layer):
                    layer.cumulative_length_int += 1
            return _copy(self._captured.output)
        do = self._graphs.first if self._captured is None else self._captured.second
        assert do is not None
        device = self._inputs["input_ids"].device
        self._captured = do(lambda: self._forward(**self._inputs), device)
        output = self._captured.output
        self.why = self._captured.why or _not_replayed(
            output, self._inputs[_cache_name(self._inputs)]
        )
        return output if self.why is not None else _copy(output)


def _copy(output: Any) -> Any:
    """What a replay gave, for the caller to keep: the next one writes to its own tensors."""
    return type(output)(
        **{
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in output.items()
        }
    )


def _not_replayed(output: Mapping[str, Any], cache: Any) -> str | None:
    """Why a step with this output cannot be a graph, if so."""
    for name, value in output.items():
        if not isinstance(value, Tensor) and value is not cache:
            return f"{name} is returned, which later tokens would overwrite"
    return None


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
        _is_plain(layer, _tokens_in(layer) + 1) and getattr(layer, "is_initialized", False)
        for layer in cache.layers
    ):
        return None
    if any(map(_slides, cache.layers)) and not (
        # Else the model goes by its own count of tokens, which is no tensor.
        isinstance(inputs.get("position_ids"), Tensor)
        and isinstance(inputs.get("attention_mask"), dict)
    ):
        return None
    kind: list[Any] = [
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(ids.device.type),
    ]
    kind += [
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
