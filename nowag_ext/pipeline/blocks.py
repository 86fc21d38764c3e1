"""The decoder layers ("blocks") of a causal LM, run one at a time on hidden states.

Nothing that a model does around its layers is written again here. Position embeddings, masks and
whatever else a layer takes are what the model's own forward has given it, for windows of one length
without padding, whose arguments are all the same.

Which linears read the same input, and where a linear's output meets the residual stream, is found
by running a layer and looking.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nowag_ext.decoder import decoder_layers, vocabulary_size
from nowag_ext.grad_mode import ordinary_tensors
from nowag_ext.offload import copied, device_of
from nowag_ext.pipeline.capture import (
    Call,
    Stop,
    check_calls,
    evaluating,
    first_hidden,
    output_tensor,
    record_calls,
    replaced_forwards,
    with_tensor,
)
from nowag_ext.pipeline.taps import Change, Look, See, find_tap, trace_layer

_NONE: Mapping[str, Any] = MappingProxyType({})

# Tokens that tell where outputs are added to the residual stream: a window's first, which see no
# others.
_TRACE_TOKENS = 64

Kinds = type[nn.Module] | tuple[type[nn.Module], ...]


@dataclass(frozen=True)
class Group:
    """Linears of one layer that read the very same tensor.

    Attributes:
        names: full module names, in order of execution.
        in_features: of all of them.
        taps: for each linear, the tensor that shows the residual stream with the linear's output
            added as it is: the full name of the module whose input that is, or the layer's own name
            for the layer's output. None if there is no such tensor; for all if several of them have
            one.
        ends: for each linear, the full name of the outermost module around it that returns the
            linear's output as it is, or None if there is none. Once the linear's weight is final,
            so is what that module returns.
    """

    names: tuple[str, ...]
    in_features: int
    taps: tuple[str | None, ...]
    ends: tuple[str | None, ...]


class Taps(NamedTuple):
    """What a run of a layer shows of a group (``Blocks.taps``).

    Attributes:
        inputs: what the group reads, [tokens, in_features].
        sums: by the name of each linear that has a tap, [tokens, out_features].
        ends: what the modules that end with a linear of the group have returned, by their names.
    """

    inputs: Tensor
    sums: dict[str, Tensor]
    ends: dict[str, Any]


class Blocks:
    """The decoder layers of a model, and how the model itself calls them.

    Every method takes hidden states [windows, length, hidden_size] where the layer's weights are,
    runs in eval mode and, but for ``recorded``, without gradients, and leaves the model as it was,
    after an exception too.
    A layer's modules may be replaced by others of the same names at any time.

    Attributes:
        layers: the layers' full names, in order.
        length: tokens a window.
        known_groups: by the index of a layer, what ``groups`` has found: finding it costs as much
            as some windows do.
    """

    @ordinary_tensors
    def __init__(self, model: Any, length: int) -> None:
        """Records the arguments of every layer; of the layers, only the first is run.

        Args:
            model: a Hugging Face causal LM whose decoder layers are one ``nn.ModuleList``.
            length: tokens a window, the same for all that is run later.

        Raises:
            ValueError: the model cannot be run layer by layer, because its layers are not called
                one after another or their arguments are not the same for all windows.
        """
        if length < 1:
            raise ValueError(f"windows must have at least 1 token, not {length}.")
        self._layers = _one_list(model)
        self._own = dict(self._layers)  # the model's own, whatever is copied
        self._body = getattr(model, "base_model", model)
        self._embeddings: nn.Module = model.get_input_embeddings()
        self.layers: tuple[str, ...] = tuple(self._layers)
        self.length = length
        self.known_groups: dict[int, list[Group]] = {}
        self._device = device_of(self._embeddings)
        vocabulary = vocabulary_size(model)
        ids = torch.arange(length, device=self._device)
        one, two, three = ((ids + shift) % vocabulary for shift in range(3))
        self._calls, output = self._record(one[None])
        check_calls(self._calls, self._record(torch.stack([two, three]))[0])
        self._output = with_tensor(output, output_tensor(output)[:0])  # for its structure
        self._short: Blocks | None = None  # the same for a window's first tokens
        if length > _TRACE_TOKENS:
            self._short = copy.copy(self)
            self._short.length = _TRACE_TOKENS
            self._short._calls, _ = self._record(one[None, :_TRACE_TOKENS])

    def _record(self, ids: Tensor) -> tuple[dict[str, Call], Any]:
        with evaluating(self._body):
            return record_calls(self._layers, partial(self._body, input_ids=ids, use_cache=False))

    @ordinary_tensors
    def embed(self, ids: Tensor) -> Tensor:
        """What the first layer receives for token ids [windows, length]."""
        if ids.dim() != 2 or ids.shape[1] != self.length:
            raise ValueError(
                f"token ids must have shape [windows, {self.length}], not {tuple(ids.shape)}."
            )
        body = partial(self._body, input_ids=ids.to(self._device), use_cache=False)
        with evaluating(self._body):
            return first_hidden(self.layers[0], self._own[self.layers[0]], body)

    def copied(self, index: int) -> Blocks:
        """The same blocks with a copy of one layer, in fp32 and in memory, free to be changed."""
        name = self.layers[index]
        layer = copied(self._layers[name]).float().requires_grad_(False)
        other = self._with_layer(name, layer)
        if self._short is not None:
            other._short = self._short._with_layer(name, layer)
        return other

    def _with_layer(self, name: str, layer: nn.Module) -> Blocks:
        """The same blocks but for one, in fp32."""
        other = copy.copy(self)
        other._layers = {**self._layers, name: layer}
        other._calls = {**self._calls, name: self._calls[name].to(torch.float32)}
        return other

    def run(
        self,
        index: int,
        hidden: Tensor,
        looks: Mapping[str, Look] = _NONE,
        given: Mapping[str, Any] = _NONE,
    ) -> Tensor:
        """The layer's output [windows, length, hidden_size].

        ``looks`` are called with what the modules of these full names read. Modules of which it is
        ``given`` what they return are not run.
        """
        return self._forward(index, hidden, looks, given=given)

    def recorded(
        self, index: int, hidden: Tensor, forwards: Mapping[str, Callable[[Tensor], Tensor]]
    ) -> Tensor:
        """``run``, recorded for a backward; modules of these full names do this instead."""
        layer = self.layers[index]
        self._check_hidden(hidden)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(evaluating(self._layers[layer]))
            for name, part in self._parts(index):
                if name in forwards:
                    instead = partial(_does, forwards[name])
                    stack.enter_context(replaced_forwards({name: part}, instead))
            # A copy: layers may write into what they are given, which may be a leaf.
            return output_tensor(self._calls[layer](self._layers[layer], hidden.clone()))

    @contextmanager
    def skipped(self, hidden: Tensor) -> Iterator[None]:
        """The model's own layers return these hidden states, whatever they are given."""
        output = with_tensor(self._output, hidden)
        with replaced_forwards(self._own, lambda *args, **kwargs: output):
            yield

    def linear(self, index: int, name: str, inputs: Tensor) -> Tensor:
        """The output [tokens, out_features] of one of the layer's linears."""
        parts = dict(self._parts(index))
        with torch.no_grad():
            output: Tensor = parts[name](inputs)
        return output

    def linears(self, index: int, kinds: Kinds = nn.Linear) -> tuple[str, ...]:
        """Full names of all modules of these types in the layer, in the model's order."""
        parts = self._parts(index)
        return tuple(name for name, part in parts if isinstance(part, kinds))

    def bias(self, index: int, name: str) -> Tensor | None:
        """The bias of one of the layer's linears, dense or packed."""
        part: Any = dict(self._parts(index))[name]
        bias: Tensor | None = part.bias
        return bias

    def weights(self, index: int) -> dict[str, Tensor]:
        """By full name, the weights of the layer's linears themselves."""
        parts = self._parts(index)
        return {name: part.weight for name, part in parts if isinstance(part, nn.Linear)}

    def _parts(self, index: int) -> Iterator[tuple[str, nn.Module]]:
        """The layer and its submodules by their full names."""
        layer = self.layers[index]
        for name, part in self._layers[layer].named_modules():
            yield (f"{layer}.{name}" if name else layer), part

    def groups(self, index: int, hidden: Tensor, kinds: Kinds = nn.Linear) -> list[Group]:
        """The layer's linears by what they read, in order of execution.

        One window is enough: it costs a run of the layer, and runs of its first tokens, one for
        each linear whose output has the shape of the hidden states. A linear that is not called, an
        expert that no token is routed to say, is in no group: ``linears`` names it all the same.

        Raises:
            ValueError: a linear is called twice, so that it has no one input.
        """
        names = [name for name, _ in self._parts(index)]
        linears = self.linears(index, kinds)
        run = partial(self._forward, index, hidden)
        trace = trace_layer(run, hidden, names, linears)
        looked_at = trace
        if self._short is not None:
            first = hidden[:, : self._short.length]
            short_run = partial(self._short._forward, index, first)
            short = trace_layer(short_run, first, names, linears)
            if list(short.outputs) == list(trace.outputs):  # not where few tokens reach fewer
                run, looked_at = short_run, short
        groups = []
        for names in trace.shared.values():
            taps = [find_tap(run, looked_at, name) for name in names]
            none = (None,) * len(taps)
            groups.append(
                Group(
                    names=tuple(names),
                    in_features=trace.reads[names[0]].shape[-1],
                    taps=tuple(taps) if taps.count(None) >= len(taps) - 1 else none,
                    ends=tuple(trace.ends.get(name) for name in names),
                )
            )
        return groups

    def taps(
        self,
        index: int,
        hidden: Tensor,
        group: Group,
        given: Mapping[str, Any] = _NONE,
        *,
        silent: bool = False,
    ) -> Taps:
        """What the group reads, what shows its outputs in the residual stream, and what ends there.

        The layer is run no further than the last of them, and modules of which it is ``given`` what
        they return are not run; nor, if ``silent``, the linears that have taps, which then return
        their bias, or nothing but zeros.
        """
        reads = {group.names[0], *group.taps} - {None}
        ends = set(group.ends) - {None}
        seen: dict[str | None, Tensor] = {}
        returned: dict[str, Any] = {}

        def stop() -> None:
            if len(seen) == len(reads) and len(returned) == len(ends):
                raise Stop

        def look(name: str, tensor: Tensor) -> None:
            # A copy: what comes after may write into the tensor, or keep it alive for longer.
            seen[name] = tensor.reshape(-1, tensor.shape[-1]).clone()
            stop()

        def see(name: str, output: Any) -> None:
            returned[name] = with_tensor(output, output_tensor(output).clone())
            stop()

        with suppress(Stop):
            self._forward(
                index,
                hidden,
                {name: partial(look, name) for name in reads if name is not None},
                sees={name: partial(see, name) for name in ends if name is not None},
                given=given,
                silent=[
                    name
                    for name, tap in zip(group.names, group.taps, strict=True)
                    if silent and tap is not None
                ],
            )
        # Experts that no token is routed to read nothing.
        inputs = seen.get(group.names[0], hidden.new_empty(0, group.in_features))
        named = zip(group.names, group.taps, strict=True)
        return Taps(inputs, {name: seen[tap] for name, tap in named if tap is not None}, returned)

    def _check_hidden(self, hidden: Tensor) -> None:
        if hidden.dim() != 3 or hidden.shape[1] != self.length:
            raise ValueError(
                f"hidden states must have shape [windows, {self.length}, hidden_size], "
                f"not {tuple(hidden.shape)}."
            )

    @ordinary_tensors
    def _forward(
        self,
        index: int,
        hidden: Tensor,
        looks: Mapping[str, Look] = _NONE,
        changes: Mapping[str, Change] = _NONE,
        sees: Mapping[str, See] = _NONE,
        given: Mapping[str, Any] = _NONE,
        silent: Collection[str] = (),
    ) -> Tensor:
        """The layer's output; others are called on the way (``taps.Run``), or not (``taps``)."""
        layer = self.layers[index]
        self._check_hidden(hidden)
        with ExitStack() as stack:
            stack.enter_context(evaluating(self._layers[layer]))
            for name, part in self._parts(index):
                if name in given:
                    stack.enter_context(replaced_forwards({name: part}, _gives(given[name])))
                if name in silent:
                    stack.enter_context(replaced_forwards({name: part}, partial(_bias, part)))
                look, change, see = looks.get(name), changes.get(name), sees.get(name)
                if look is not None and name != layer:
                    hook = part.register_forward_pre_hook(_reads(look), with_kwargs=True)
                    stack.callback(hook.remove)
                if change is not None:
                    stack.callback(part.register_forward_hook(_returns(change)).remove)
                if see is not None:
                    stack.callback(part.register_forward_hook(_shows(see)).remove)
            output = output_tensor(self._calls[layer](self._layers[layer], hidden))
        if layer in looks:
            looks[layer](output)
        return output


def _reads(look: Look) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args, *kwargs.values())
        tensor = next((value for value in given if isinstance(value, Tensor)), None)
        if tensor is not None:
            look(tensor)

    return hook


def _returns(change: Change) -> Callable[..., Tensor | None]:
    # Llama 4's routers are linears that return a tuple.
    return lambda module, args, output: change(output) if isinstance(output, Tensor) else None


def _shows(see: See) -> Callable[..., None]:
    return lambda module, args, output: see(output)


def _gives(output: Any) -> Callable[..., Any]:
    # A copy: layers may write into what their modules return.
    return lambda *args, **kwargs: with_tensor(output, output_tensor(output).clone())


def _does(instead: Callable[[Tensor], Tensor], *args: Any) -> Tensor:
    """Of a module's name, its own forward and what it reads, that alone matters."""
    return instead(args[-1])


def _bias(linear: Any, name: str, forward: Callable[..., Any], inputs: Tensor) -> Tensor:
    """What a linear returns without its weight."""
    output = inputs.new_zeros((*inputs.shape[:-1], linear.out_features))
    bias = linear.bias
    return output if bias is None else output.add_(bias)


def _one_list(model: Any) -> dict[str, nn.Module]:
    """The decoder's layers; raises unless they are one list that the model calls on token ids."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            "the model has an encoder and a decoder: only causal language models can be run layer "
            "by layer."
        )
    layers = decoder_layers(model)
    lists = list(dict.fromkeys(name.rpartition(".")[0] for name in layers))
    if len(lists) != 1:
        found = f"it has {len(lists)} ({', '.join(lists)})" if lists else "it has none"
        raise ValueError(
            f"the model's decoder layers must be the entries of one nn.ModuleList, but {found}: "
            "it cannot be run layer by layer."
        )
    return layers
