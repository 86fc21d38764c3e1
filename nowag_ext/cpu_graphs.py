"""Graphs on a CPU: the operations of a step, recorded once and run again on the same tensors.

What Python, torch's dispatcher and the allocator do in a step is done once. Small operations become
tapes (``ops/tape.py``), linears calls of their kernels; others go on through torch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nowag_ext import ops
from nowag_ext.dispatched import storages, tensors_in, written
from nowag_ext.graphs import Call, Captured
from nowag_ext.ops.tape import Step, tape, tape_steps

# Operations of which some calls with one x, so many at most, are one call of a kernel, and what
# makes that call.
_KERNELS: dict[Any, tuple[Any, int]] = {
    torch.ops.nowag.vq_linear.default: (ops.vq_linears_call, ops.VQ_MAX_MEMBERS),
    torch.ops.nowag.sparse_linear.default: (ops.sparse_linear_call, 1),
}


class CpuGraphs:
    """Those of steps on the CPU."""

    def first(self, step: Call, _: torch.device) -> Captured:
        """A step that looks into a tensor may do otherwise the next time; a recording does not."""
        with _Reads() as reads, _Recorder(reads) as recorder:
            output = step()
        if reads.why is not None:
            return Captured(output, why=reads.why)
        calls = _calls(recorder.operations)

        def replay() -> None:
            for call in calls:
                call()

        return Captured(output, replay)


class _Reads(TorchFunctionMode):
    """Notices where the content of a tensor becomes something of Python."""

    _READING: ClassVar = {
        Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__bool__, Tensor.__int__,
        Tensor.__float__, Tensor.__index__, Tensor.__complex__, Tensor.__contains__,
        Tensor.__dlpack__, Tensor.__deepcopy__, Tensor.__reduce_ex__,
    }  # fmt: skip
    _MAKING: ClassVar = {torch.tensor, torch.as_tensor, torch.asarray}

    def __init__(self) -> None:
        super().__init__()
        self.why: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made_of = (*args, *kwargs.values())
        if func in self._READING or (func in self._MAKING and _has_tensors_in_lists(made_of)):
            self.note(func.__name__)
        return func(*args, **kwargs)

    def note(self, name: str) -> None:
        self.why = self.why or f"it looks into a tensor ({name})"


def _has_tensors_in_lists(values: Iterable[Any]) -> bool:
    lists = [value for value in values if isinstance(value, (list, tuple))]
    return bool(tensors_in(lists))


class _Operation:
    """A call of an operation: what it was given and what it returned."""

    def __init__(self, func: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.func, self.args, self.kwargs, self.output = func, args, kwargs, output
        # Of what Python has made of numbers, before somebody writes to it.
        self.made = args[0].clone() if func is torch.ops.aten.lift_fresh.default else None
        self.outputs = tensors_in((output,))
        # Where they are in memory: who writes there what another reads.
        self.reads = storages(tensors_in((*args, *kwargs.values())))
        self.writes = storages(tensors_in(written(func, args, kwargs)))
        self.makes = storages(self.outputs)

    def is_view(self) -> bool:
        """Whether it gave nothing but other views of its inputs, which stay what they are."""
        return not self.writes and self.makes <= self.reads

    def is_constant(self) -> bool:
        """Whether it returns the same whenever it is called."""
        drawn = torch.Tag.nondeterministic_seeded in self.func.tags
        return not self.reads and not drawn


class _Recorder(TorchDispatchMode):
    """All operations of a step, in order; their tensors stay alive with it, each in its place."""

    def __init__(self, reads: _Reads) -> None:
        super().__init__()
        self.operations: list[_Operation] = []
        self._reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_composite(func):  # in inference mode they come whole
            with self:
                return func.decompose(*args, **kwargs)
        if not _gives_tensors(func):
            self._reads.note(str(func))
        output = func(*args, **kwargs)
        self.operations.append(_Operation(func, args, kwargs, output))
        return output


@functools.cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), torch._C.DispatchKey.CompositeImplicitAutograd
    )


@functools.cache
def _gives_tensors(func: Any) -> bool:
    """Those and nothing else, of sizes that follow from its operands' sizes."""
    tensors = all("Tensor" in str(result.type) for result in func._schema.returns)
    return tensors and torch.Tag.dynamic_output_shape not in func.tags


def _calls(operations: Sequence[_Operation]) -> list[Call]:
    """Calls that do again what the operations did, to the same tensors."""
    changing = {place for operation in operations for place in operation.writes}
    last_read = {
        place: index for index, operation in enumerate(operations) for place in operation.reads
    }
    calls: list[Call] = []
    steps: list[Step] = []
    siblings = _siblings(operations)
    done = {index for others in siblings.values() for index in others}

    def end_tape() -> None:
        if steps:
            calls.append(tape(steps))
            steps.clear()

    for index, operation in enumerate(operations):
        if operation.made is not None and operation.makes & changing:
            end_tape()
            calls.append(functools.partial(operation.output.copy_, operation.made))
            continue
        if operation.is_view() or (operation.is_constant() and not operation.makes & changing):
            continue
        if index in done:
            continue
        more = tape_steps(operation.func, operation.args, operation.kwargs, operation.output)
        beside = storages(operation.outputs[1:])  # which tapes do not write
        if more is not None and all(last_read.get(place, -1) <= index for place in beside):
            steps += more
        else:
            end_tape()
            others = [operations[other] for other in siblings.get(index, ())]
            calls.append(_kernel_call([operation, *others]) or _torch_call(operation))
    end_tape()
    return calls


def _siblings(operations: Sequence[_Operation]) -> dict[int, list[int]]:
    """Linears that read the same input: by the place of the first, those of the others.

    They are done with the first, so that what they read must have been there, and stay.
    """
    found: dict[int, list[int]] = {}
    first: dict[Any, int] = {}
    for index, operation in enumerate(operations):
        _, most = _KERNELS.get(operation.func, (None, 1))
        if most == 1 or _kernel_call([operation]) is None:
            continue
        x = operation.args[0]
        read = (operation.func, x.data_ptr(), x.shape, x.dtype)
        start = first.setdefault(read, index)
        others = found.setdefault(start, [])
        # What Python made is written again in each replay, where it changes.
        between = (
            one for one in operations[start:index] if one.made is not None or not one.is_view()
        )
        if len(others) == most - 1 or any(
            (one.writes | one.makes) & operation.reads for one in between
        ):
            first[read] = index
        elif start != index:
            others.append(index)
    return found


def _kernel_call(operations: Sequence[_Operation]) -> Call | None:
    """One call of the kernel that does some calls of one operation, with the same first operand."""
    bind, _ = _KERNELS.get(operations[0].func, (None, 1))
    if bind is None or any(operation.kwargs for operation in operations):
        return None
    return bind([(operation.output, operation.args) for operation in operations])


def _torch_call(operation: _Operation) -> Call:
    func, args, kwargs = operation.func, operation.args, operation.kwargs
    if operation.makes <= operation.writes:
        return functools.partial(func, *args, **kwargs)
    found = None if operation.writes else _out_variant(func)
    if found is not None and len(found[1]) == len(operation.outputs):
        variant, names = found
        outputs = dict(zip(names, operation.outputs, strict=True))
        return functools.partial(variant, *args, **kwargs, **outputs)

    def call() -> None:
        for old, new in zip(operation.outputs, tensors_in((func(*args, **kwargs),)), strict=True):
            if old.data_ptr() != new.data_ptr():  # not what it has written in place
                old.copy_(new)

    return call


@functools.cache
def _out_variant(func: Any) -> tuple[Any, list[str]] | None:
    """The overload that takes ``func``'s arguments and writes to given tensors, and their names."""
    wanted = [(argument.name, str(argument.type)) for argument in func._schema.arguments]
    packet = func._overloadpacket
    for name in packet.overloads():
        arguments = getattr(packet, name)._schema.arguments
        given = [(one.name, str(one.type)) for one in arguments if not one.is_out]
        outputs = [one for one in arguments if one.is_out]
        names = [one.name for one in outputs]
        if any(str(one.type) != "Tensor" for one in outputs):
            continue
        if names and given == wanted:
            return getattr(packet, name), names
    return None
