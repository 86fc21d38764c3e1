"""Modules whose weight stays in its packed form: what they have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nowag_ext import ops
from nowag_ext.codebook import keep_dtypes

if TYPE_CHECKING:
    from typing_extensions import Self

# Shape and dtype of packed tensors by name.
Form = dict[str, tuple[tuple[int, ...], torch.dtype]]


class PackedModule(nn.Module, ABC):
    """A module whose weight is a set of tensors in the canonical form of csrc's format.h.

    They are parameters without gradient, as in transformers' own quantised layers: what moves,
    offloads or shards a model looks at its parameters. Their dtypes are part of the form:
    ``.to(torch.bfloat16)``, ``.half()`` and the like leave them alone.
    """

    def _set_packed(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if not isinstance(tensor, nn.Parameter):  # one that is may be other layers' as well
                tensor = nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(keep_dtypes(fn, self.packed_parameters().values()), recurse)
        return self

    def validate(self) -> None:
        """Raises ValueError unless the packed tensors are a weight: shapes, dtypes and content."""
        self._check_packed()
        self._check_content({name: getattr(self, name) for name in self._expected()})

    @property
    @abstractmethod
    def weight_shape(self) -> tuple[int, int]:
        """Of the dense weight."""

    @abstractmethod
    def weight_form(self) -> Any:
        """The weight in its packed form (``VQWeight``, ``SparseWeight``), sharing its tensors."""

    @abstractmethod
    def to_dense(self, weight: nn.Parameter) -> nn.Module:
        """The ordinary module with this dense weight in place of the packed one."""

    @abstractmethod
    def _check_content(self, tensors: dict[str, Tensor]) -> None:
        """Raises ValueError on packed tensors of the right shapes and dtypes that are no weight."""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        assign = local_metadata.get("assign_to_params_buffers", False)
        try:
            self._check_given(state_dict, prefix, assign)
        except ValueError as error:  # how load_state_dict reports what it did not load
            error_msgs.append(f"{prefix.removesuffix('.') or type(self).__name__}: {error}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _check_given(self, state_dict: dict[str, Any], prefix: str, assign: bool) -> None:
        """Raises ValueError if these packed tensors are no weight; some alone cannot tell."""
        expected, given = self._expected(), dict[str, Tensor]()
        for name in self.packed_parameters():
            shape, dtype = expected[name]
            tensor = state_dict.get(prefix + name)
            if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape or tensor.is_meta:
                return  # which is nn.Module's to report
            converts = not assign and tensor.is_floating_point() and dtype.is_floating_point
            if tensor.dtype != dtype and not converts:
                raise ValueError(f"{name} must be {dtype}, not {tensor.dtype}.")
            given[name] = tensor
        self._check_content(given)

    @abstractmethod
    def _expected(self) -> Form:
        """Shape and dtype of every packed tensor by its name."""

    def packed_parameters(self) -> dict[str, nn.Parameter]:
        """The packed tensors that are this layer's own, by name."""
        own = {name: self._parameters.get(name) for name in self._expected()}
        return {name: parameter for name, parameter in own.items() if parameter is not None}

    def _check_packed(self) -> None:
        """Raises ValueError unless every packed tensor has its shape and dtype and holds data."""
        for name, (shape, dtype) in self._expected().items():
            tensor = getattr(self, name)
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(
                    f"{name} must be {dtype} of shape {shape}, not {tensor.dtype} of shape "
                    f"{tuple(tensor.shape)}."
                )
            if tensor.is_meta:
                raise ValueError(f"{name} is on the meta device: it holds no data yet.")


def vq_form(rows: int, cols: int, d: int, code_bits: int) -> Form:
    """The tensors of a vector quantised weight [rows, cols]."""
    return {
        "codes": (ops.packed_shape(rows, cols, d, code_bits), torch.uint8),
        "codebook": ((2**code_bits, d), torch.float16),
        "row_norms": ((rows,), torch.float16),
        "col_norms": ((cols,), torch.float16),
    }


def check_vq_content(tensors: dict[str, Tensor]) -> None:
    """Raises ValueError for tensors of that form that are no weight."""
    # Every bit pattern is a legal code (format.h), so codes need no check.
    for name in tensors.keys() - {"codes"}:
        require_finite(name, tensors[name])


def require_finite(name: str, tensor: Tensor) -> None:
    """Raises ValueError for a floating-point tensor with a NaN or an infinity."""
    if not tensor.numel() or not tensor.is_floating_point():
        return
    # Looking at each takes 20 times as long as their extremes, which a NaN is, too.
    if not all(torch.isfinite(extreme) for extreme in tensor.detach().aminmax()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ValueError(f"{name} must be finite, but {bad} values are NaN or infinite.")
