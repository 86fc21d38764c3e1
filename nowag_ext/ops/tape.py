"""tape.h: small operations of torch on the very tensors that they once ran on, run again as one.

``tape_steps`` puts one call of an operation into steps, ``tape`` makes steps one call.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nowag_ext import _cpu
from nowag_ext.ops.checks import DTYPES
from nowag_ext.ops.registry import KernelCall

_DIMS = 4
_TYPES = {**DTYPES, torch.int64: _cpu.tape_int64, torch.bool: _cpu.tape_boolean}
_NO_OPERAND = [0, 0, *[0] * _DIMS]
_Strides = Sequence[int]

aten = torch.ops.aten


class _NotHereError(Exception):
    """An operation, or operands, that tapes do not have."""


class Step:
    """The words of one step, and the tensors whose addresses they hold."""

    def __init__(
        self,
        op: int,
        sizes: Sequence[int],
        operands: Sequence[tuple[Tensor, _Strides] | None],
        *,
        extent: int = 0,
        scale: float = 0.0,
    ) -> None:
        self.words = [op, *_padded(sizes, 1)]
        self.tensors: list[Tensor] = []
        for operand in (*operands, *[None] * (5 - len(operands))):
            if operand is None:
                self.words += _NO_OPERAND
                continue
            tensor, strides = operand
            address = tensor.data_ptr()
            if tensor.dtype not in _TYPES or address % tensor.dtype.itemsize:
                raise _NotHereError
            self.words += [address, _TYPES[tensor.dtype], *_padded(strides, 0)]
            self.tensors.append(tensor)
        self.words += [extent, *struct.unpack("q", struct.pack("d", scale))]
        assert len(self.words) == _cpu.tape_words


def tape(steps: Sequence[Step]) -> KernelCall:
    """Runs the steps in order, on what their tensors hold when it is called.

    It raises ValueError where an index is out of range; what comes before that step has run.
    """
    words = torch.tensor([step.words for step in steps], dtype=torch.int64, device="cpu")
    tensors = [words, *(tensor for step in steps for tensor in step.tensors)]
    return KernelCall(_cpu.tape_run, (words.data_ptr(), len(steps)), tensors)


def tape_steps(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], output: Any
) -> list[Step] | None:
    """Steps that do again what ``func(*args, **kwargs)``, an ATen operation, did.

    They write to ``output``, which it returned, and to what it wrote in place. Of several outputs
    they write the first alone. None where tapes have nothing that does the same.
    """
    encode = _ENCODERS.get(func)
    if encode is None:
        return None
    named = {argument.name: argument.default_value for argument in func._schema.arguments}
    named.update(zip(named, args, strict=False))
    named.update(kwargs)
    try:
        return encode(output, **named)
    except _NotHereError:
        return None


def _padded(numbers: Sequence[int], filling: int) -> list[int]:
    return [*[filling] * (_DIMS - len(numbers)), *numbers]


def _require(condition: bool) -> None:
    if not condition:
        raise _NotHereError


def _merged(sizes: Sequence[int], strides: Sequence[_Strides], most: int) -> list[list[int]]:
    """Sizes, then strides for each operand: dimensions that all walk through as one made one."""
    columns: list[list[int]] = []  # size, strides
    for column in zip(sizes, *strides, strict=True):
        if column[0] == 1:
            continue
        size, *inner = column
        if columns and [s * size for s in inner] == columns[-1][1:]:
            columns[-1] = [columns[-1][0] * size, *inner]
        else:
            columns.append(list(column))
    _require(len(columns) <= most)
    columns = [[1, *[0] * len(strides)]] * (not columns) + columns
    return [list(row) for row in zip(*columns, strict=True)]


def _operand(value: Any) -> Tensor:
    """A tensor as it is, a number as a tensor."""
    if isinstance(value, Tensor):
        return value
    whole = isinstance(value, int) and not isinstance(value, bool)
    return torch.tensor(value, dtype=torch.int64 if whole else torch.float32, device="cpu")


def _elementwise(op: int, output: Tensor, *values: Any) -> list[Step]:
    operands = [_operand(value) for value in values]
    _require(output.numel() > 0 and output.dtype != torch.bool)
    if output.dtype == torch.int64:
        _require(all(not operand.is_floating_point() for operand in operands))
        _require(op in (_cpu.tape_copy, _cpu.tape_add))
    strides = [output.stride(), *(operand.expand(output.shape).stride() for operand in operands)]
    sizes, *merged = _merged(output.shape, strides, _DIMS)
    return [Step(op, sizes, list(zip((output, *operands), merged, strict=True)))]


def _unary(op: int) -> Callable[..., list[Step]]:
    return lambda output, self: _elementwise(op, output, self)


def _sum(op: int) -> Callable[..., list[Step]]:
    def encode(output: Tensor, self: Tensor, other: Any, alpha: Any) -> list[Step]:
        _require(alpha == 1)
        _require_same_rounding(output, self)
        if output.is_floating_point() and _operand(other).dim() == 0:
            # torch rounds it to the output's type first, but where it multiplies.
            _require(not isinstance(other, Tensor) or other.dtype == output.dtype)
            other = torch.as_tensor(other, dtype=output.dtype)
        return _elementwise(op, output, self, other)

    return encode


def _product(op: int) -> Callable[..., list[Step]]:
    def encode(output: Tensor, self: Tensor, other: Any) -> list[Step]:
        _require_same_rounding(output, self)
        return _elementwise(op, output, self, other)

    return encode


def _require_same_rounding(output: Tensor, first: Tensor) -> None:
    """One number as the first operand is rounded to the output's type by torch, not by tapes."""
    _require(first.dim() > 0 or output.dim() == 0 or first.dtype == output.dtype)


def _copy(output: Tensor, self: Tensor, **_: Any) -> list[Step]:
    return _elementwise(_cpu.tape_copy, output, self)


def _copy_to(output: Tensor, self: Tensor, src: Tensor, non_blocking: bool) -> list[Step]:
    return _elementwise(_cpu.tape_copy, output, src)


def _power(output: Tensor, self: Tensor, exponent: Any) -> list[Step]:
    _require(exponent == 2)
    return _elementwise(_cpu.tape_multiply, output, self, self)


def _gelu(output: Tensor, self: Tensor, approximate: str) -> list[Step]:
    _require(approximate == "tanh")
    return _elementwise(_cpu.tape_gelu_tanh, output, self)


def _where(output: Tensor, condition: Tensor, self: Tensor, other: Tensor) -> list[Step]:
    return _elementwise(_cpu.tape_select, output, condition, self, other)


def _mean(output: Tensor, self: Tensor, dim: Any, keepdim: bool, dtype: Any) -> list[Step]:
    last = self.dim() - 1
    _require(
        last >= 0 and self.numel() > 0 and output.is_floating_point() and self.is_floating_point()
    )
    _require(dim is not None and [d % self.dim() for d in dim] == [last])
    rows = [output.stride()[:last], self.stride()[:last]]
    sizes, *strides = _merged(self.shape[:last], rows, _DIMS - 1)
    operands = [(output, [*strides[0], 0]), (self, [*strides[1], self.stride(last)])]
    return [Step(_cpu.tape_mean, [*sizes, self.shape[last]], operands)]


def _concatenation(output: Tensor, tensors: Sequence[Tensor], dim: int) -> list[Step]:
    steps, begin = [], 0
    for tensor in tensors:
        _require(tensor.dim() == output.dim() and tensor.numel() > 0)
        size = tensor.shape[dim]
        steps += _elementwise(_cpu.tape_copy, output.narrow(dim, begin, size), tensor)
        begin += size
    return steps


def _index_copy(
    output: Tensor, self: Tensor, dim: int, index: Tensor, source: Tensor
) -> list[Step]:
    _require(self.is_floating_point() and index.dim() == 1 and source.numel() > 0)
    ours, given = self.movedim(dim, 0), source.movedim(dim, 0)
    sizes, *strides = _merged(given.shape[1:], [ours.stride()[1:], given.stride()[1:]], _DIMS - 1)
    rows = [(self, ours.stride(0), strides[0]), (source, given.stride(0), strides[1])]
    operands: list[Any] = [(t, [first, *_padded(s, 0)[1:]]) for t, first, s in rows]
    operands.append((index, [index.stride(0), *[0] * (_DIMS - 1)]))
    sizes = [given.shape[0], *_padded(sizes, 1)[1:]]
    return [Step(_cpu.tape_index_copy, sizes, operands, extent=ours.shape[0])]


def _attention(
    output: tuple[Tensor, Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    attn_mask: Tensor | None,
    scale: float | None,
) -> list[Step]:
    batch, heads, queries, features = query.shape
    extent = key.shape[2]
    _require(dropout_p == 0 and not is_causal and output[0].numel() > 0 and extent > 0)
    _require(queries <= _cpu.tape_queries and features <= _cpu.tape_features)
    _require(key.shape == value.shape == (batch, heads, extent, features))
    operands = [(one, one.stride()) for one in (output[0], query, key, value)]
    if attn_mask is not None:
        _require(attn_mask.is_floating_point())
        seen = attn_mask.expand(batch, heads, queries, extent)
        operands.append((attn_mask, seen.stride()))
    scale = features**-0.5 if scale is None else scale
    return [Step(_cpu.tape_attention, query.shape, operands, extent=extent, scale=scale)]


_ENCODERS: dict[Any, Callable[..., list[Step]]] = {
    aten._to_copy.default: _copy,
    aten.clone.default: _copy,
    aten.copy_.default: _copy_to,
    aten.neg.default: _unary(_cpu.tape_negate),
    aten.rsqrt.default: _unary(_cpu.tape_reciprocal_sqrt),
    aten.silu.default: _unary(_cpu.tape_silu),
    aten.sigmoid.default: _unary(_cpu.tape_sigmoid),
    aten.tanh.default: _unary(_cpu.tape_tanh),
    aten.gelu.default: _gelu,
    aten.add.Tensor: _sum(_cpu.tape_add),
    aten.add_.Tensor: _sum(_cpu.tape_add),
    aten.sub.Tensor: _sum(_cpu.tape_subtract),
    aten.mul.Tensor: _product(_cpu.tape_multiply),
    aten.mul_.Tensor: _product(_cpu.tape_multiply),
    aten.div.Tensor: _product(_cpu.tape_divide),
    aten.pow.Tensor_Scalar: _power,
    aten.where.self: _where,
    aten.mean.dim: _mean,
    aten.cat.default: _concatenation,
    aten.index_copy_.default: _index_copy,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
}
