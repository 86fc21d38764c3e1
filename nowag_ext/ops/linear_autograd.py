"""Gradients, tangents and vmap of linear operations, alone and under the transforms of torch.func.

As for torch's own operations there is one kernel for the Autograd key: it records the operation at
the level of differentiation at hand and hands it down to the next, so that levels nest in any
order. ``torch.library.register_autograd`` makes kernels that the transforms refuse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from nowag_ext.ops.registry import LIBRARY, is_transformed


def register_linear_autograd(
    linear: Any, linear_grad: Any, grad_settings: Callable[[Tensor], tuple[int, ...]]
) -> None:
    """All derivatives of ``linear(x, *packed, bias)`` and of ``linear_grad``; vmap of both.

    ``linear_grad(grad_y, *packed, *grad_settings(x))`` is grad_y W. The packed weight is constant.
    """

    class Linear(_SingleLevelFunction):
        @staticmethod
        def forward(keyset: Any, *operands: Any) -> Tensor:
            return _below_autograd(linear, keyset, operands)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            _, x, *packed, _bias = inputs
            # The gradient of bias alone needs none of them, which may be inference tensors.
            _save(ctx, packed if ctx.needs_input_grad[1] or is_transformed() else [])
            ctx.settings, ctx.shape = grad_settings(x), output.shape

        @staticmethod
        def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
            _, wants_x, *wants_packed, wants_bias = ctx.needs_input_grad
            _require_constant(wants_packed)
            rows = grad_y.shape[-1]
            grad_x = linear_grad(grad_y, *ctx.saved_tensors, *ctx.settings) if wants_x else None
            grad_bias = grad_y.reshape(-1, rows).sum(0) if wants_bias else None
            return (None, grad_x, *[None] * len(wants_packed), grad_bias)

        @staticmethod
        def jvp(ctx: Any, _: None, x: Tensor | None, *others: Tensor | None) -> Tensor:
            *packed, bias = others
            _require_constant([tangent is not None for tangent in packed])
            if x is not None:
                return linear(x, *ctx.saved_tensors, bias)
            assert bias is not None
            return bias.expand(ctx.shape)

    class LinearGrad(_SingleLevelFunction):
        @staticmethod
        def forward(keyset: Any, *operands: Any) -> Tensor:
            return _below_autograd(linear_grad, keyset, operands)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            _save(ctx, [value for value in inputs[2:] if isinstance(value, Tensor)])
            ctx.settings = tuple(value for value in inputs[2:] if not isinstance(value, Tensor))

        @staticmethod
        def backward(ctx: Any, grad_grad_x: Tensor) -> tuple[Tensor | None, ...]:
            constants = len(ctx.saved_tensors) + len(ctx.settings)
            grad_grad_y = linear(grad_grad_x, *ctx.saved_tensors, None)
            return (None, grad_grad_y, *[None] * constants)

        @staticmethod
        def jvp(ctx: Any, _: None, grad_y: Tensor, *constants: None) -> Tensor:
            return linear_grad(grad_y, *ctx.saved_tensors, *ctx.settings)

    def map_linear(info: Any, dims: tuple[int | None, ...], *operands: Any) -> tuple[Tensor, int]:
        if any(dim is not None for dim in dims[1:-1]):
            return _one_by_one(linear, info, dims, operands)
        x, *packed, bias = _batch_first(dims, operands)
        if dims[-1] is None:
            return linear(x, *packed, bias), 0
        y = linear(x, *packed, None)
        if dims[0] is None:
            y = y.unsqueeze(0)
        return y + bias.view(bias.shape[0], *[1] * (y.dim() - 2), bias.shape[1]), 0

    def map_grad(info: Any, dims: tuple[int | None, ...], *operands: Any) -> tuple[Tensor, int]:
        if any(dim is not None for dim in dims[1:]):
            return _one_by_one(linear_grad, info, dims, operands)
        return linear_grad(*_batch_first(dims, operands)), 0

    for operation, function, mapped in (
        (linear, Linear, map_linear),
        (linear_grad, LinearGrad, map_grad),
    ):
        LIBRARY.impl(
            operation._opname, _autograd_kernel(operation, function), "Autograd", with_keyset=True
        )
        torch.library.register_vmap(
            operation.name(), _with_defaults(operation, mapped), lib=LIBRARY
        )


def _autograd_kernel(operation: Any, function: type[_SingleLevelFunction]) -> Callable[..., Any]:
    count = len(operation._schema.arguments)

    def kernel(keyset: Any, *operands: Any) -> Any:
        recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(*operands)
        if not (recorded or is_transformed()):
            with torch._C._AutoDispatchBelowAutograd():
                return operation.redispatch(keyset & torch._C._after_autograd_keyset, *operands)
        with enable_single_level_autograd_function():
            return function.apply(  # type: ignore[attr-defined]
                keyset, *operands, *[None] * (count - len(operands))
            )

    return kernel


def _below_autograd(operation: Any, keyset: Any, operands: tuple[Any, ...]) -> Any:
    """The operation at the next level, where differentiation goes on: here it is switched off."""
    with (
        torch.enable_grad(),
        forward_ad._set_fwd_grad_enabled(True),
        torch._C._AutoDispatchBelowAutograd(),
    ):
        return operation.redispatch(keyset & torch._C._after_autograd_keyset, *operands)


def _save(ctx: Any, packed: list[Tensor]) -> None:
    ctx.save_for_backward(*packed)
    ctx.save_for_forward(*packed)
    ctx.set_materialize_grads(False)


def _require_constant(wanted: list[bool]) -> None:
    if any(wanted):
        raise NotImplementedError(
            "the packed weight of a compressed linear is constant: only its input and its bias "
            "have derivatives. dequantize() gives a dense weight, which can be trained."
        )


def _with_defaults(operation: Any, mapped: Callable[..., Any]) -> Callable[..., Any]:
    """``mapped``, given operands that were left out because they are None."""
    count = len(operation._schema.arguments)

    def call(info: Any, dims: tuple[int | None, ...], *operands: Any) -> Any:
        missing = [None] * (count - len(operands))
        return mapped(info, (*dims, *missing), *operands, *missing)

    return call


def _batch_first(dims: tuple[int | None, ...], operands: tuple[Any, ...]) -> list[Any]:
    return [
        operand if dim is None else operand.movedim(dim, 0)
        for dim, operand in zip(dims, operands, strict=True)
    ]


def _one_by_one(
    operation: Any, info: Any, dims: tuple[int | None, ...], operands: tuple[Any, ...]
) -> tuple[Tensor, int]:
    """Where weights differ, there is no operation for all of them at once."""
    pairs = list(zip(dims, _batch_first(dims, operands), strict=True))
    results = [
        operation(*(o if dim is None else o[index].contiguous() for dim, o in pairs))
        for index in range(info.batch_size)
    ]
    return torch.stack(results), 0
