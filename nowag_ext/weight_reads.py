"""Linears whose weight the model's own code reads, which a packed layer does not have.

Mamba's step projection and the output projection of ``nn.MultiheadAttention`` are such. They are
found by running the model on two tokens and one more, not by their names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from nowag_ext.decoder import decoder_layers
from nowag_ext.grad_mode import ordinary_tensors


class _WeightRead(AttributeError):
    """What a packed layer would raise, with the layer."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__("weight")
        self.module = module


@ordinary_tensors
def weight_readers(model: Any, modules: Mapping[str, nn.Module]) -> list[str]:
    """The names of ``modules`` whose weight something but their own forward needs.

    Reads that make do without it do not count. With a layer all those count that are the same part
    of a module of the same class, an expert that no token came to say. A model that cannot be run
    on token ids alone, or not on the device it is on, has none that can be told. Of a model without
    data, one layer of each structure is run, in a copy: that shall not take long.

    Args:
        model: a causal LM; its modules are in eval mode meanwhile, and as they were afterwards.
        modules: its linears, dense or packed, by their full names.
    """
    parts = {name: _part(model, name) for name in modules}
    watched = modules
    if all(parameter.is_meta for parameter in model.parameters()):
        try:
            model = _one_layer_of_each(model)
        except Exception:  # some models cannot be copied
            return []
        kinds = {type(module) for module in modules.values()}
        watched = {name: m for name, m in model.named_modules() if type(m) in kinds}
    found: set[tuple[type[nn.Module], str]] = set()
    while True:
        unread = {name: m for name, m in watched.items() if _part(model, name) not in found}
        read = _first_read(model, unread)
        if read is None:
            return [name for name in modules if parts[name] in found]
        found.add(_part(model, read))


def _one_layer_of_each(model: nn.Module) -> nn.Module:
    """A copy with a decoder layer of each structure, the first of those that there are."""
    memo: dict[int, Any] = {}
    for name in {layer.rpartition(".")[0] for layer in decoder_layers(model)}:
        layers = model.get_submodule(name)
        first: dict[Any, nn.Module] = {}
        for layer in layers.children():
            structure = tuple((part, type(module)) for part, module in layer.named_modules())
            first.setdefault(structure, layer)
        memo[id(layers)] = copy.deepcopy(nn.ModuleList(first.values()), memo)
    return copy.deepcopy(model, memo)


def weight_readers_text(names: Sequence[str]) -> str:
    """The beginning of a sentence about what ``weight_readers`` found."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (
        f"the model's own code reads the weight of {names[0]}{more}, which a packed layer "
        "does not have"
    )


def _part(model: nn.Module, name: str) -> tuple[type[nn.Module], str]:
    parent, _, local = name.rpartition(".")
    return type(model.get_submodule(parent)), local


def _first_read(model: Any, modules: Mapping[str, nn.Module]) -> str | None:
    """The first of the modules without whose weight the model's code cannot go on."""
    names = {id(module): name for name, module in modules.items()}
    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        for module in modules.values():
            stack.enter_context(_weight_hidden(module))
        try:
            model.eval()
            _run(model)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, _WeightRead):
                cause = cause.__cause__ or cause.__context__
            return None if cause is None else names[id(cause.module)]
        finally:
            for module, training in modes:
                module.training = training
    return None


def _run(model: Any) -> None:
    device = next(model.get_input_embeddings().parameters(recurse=False)).device
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    output = model(input_ids=ids, use_cache=True)
    if any(parameter.is_meta for parameter in model.parameters()):
        return  # nothing is there to go on from, or what is on disk would be read again
    for name in ("past_key_values", "cache_params"):
        cache = getattr(output, name, None)
        if cache is not None:
            model(input_ids=ids[:, :1], use_cache=True, **{name: cache})


@contextmanager
def _weight_hidden(module: nn.Module) -> Iterator[None]:
    """Has a module raise for its weight while it is not itself running."""
    kind = type(module)
    running: list[None] = []

    def while_running(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            running.append(None)
            try:
                return call(*args, **kwargs)
            finally:
                running.pop()

        return run

    class Hiding(kind):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return while_running(super().__call__)(*args, **kwargs)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return while_running(super().forward)(*args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            if name == "weight" and not running:
                raise _WeightRead(self)
            return super().__getattr__(name)

    object.__setattr__(module, "__class__", Hiding)
    try:
        yield
    finally:
        object.__setattr__(module, "__class__", kind)
