"""Codebooks that several linears share, and the module under which a model owns them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nowag_ext import ops

# The submodule of a model that owns its shared codebooks, so that each has one stable name.
OWNER = "nowag_codebooks"


@dataclass(frozen=True, eq=False, repr=False)
class Codebook:
    """Entries that the sub-vectors of several weights are taken from.

    The entries stand for sub-vectors of sqrt(in_features) * Wn, whose size does not depend on the
    layer's; a weight's row norms take the factor back.

    Attributes:
        entries: fp16 [K, d], K = 2^code_bits, finite.
        name: under which a model stores it: letters, digits, "_" and "-".

    Raises:
        TypeError: entries are not a floating-point tensor.
        ValueError: a shape that no code can address, values not finite in fp16, or a name that a
            parameter of a module cannot have.
    """

    entries: Tensor
    name: str = "model"

    def __post_init__(self) -> None:
        if not isinstance(self.entries, Tensor) or not self.entries.is_floating_point():
            raise TypeError("the entries of a codebook must be a floating-point torch.Tensor.")
        check_name(self.name)
        shape = tuple(self.entries.shape)
        if (
            len(shape) != 2
            or shape[0] not in {2**bits for bits in range(1, ops.MAX_CODE_BITS + 1)}
            or not 1 <= shape[1] <= ops.MAX_SUBVECTOR
        ):
            raise ValueError(
                f"a codebook has 2^b entries, b from 1 to {ops.MAX_CODE_BITS}, of 1 to "
                f"{ops.MAX_SUBVECTOR} values, not the shape {shape}."
            )
        half = self.entries
        if half.dtype != torch.float16 or not half.is_contiguous():
            half = half.detach().half().contiguous()
            object.__setattr__(self, "entries", half)
        if not half.is_meta and not torch.isfinite(half).all():
            raise ValueError("the entries of a codebook must be finite in fp16.")

    @property
    def d(self) -> int:
        """Length of a sub-vector."""
        return self.entries.shape[1]

    @property
    def code_bits(self) -> int:
        """Bits of one code."""
        return self.entries.shape[0].bit_length() - 1

    def __repr__(self) -> str:
        return f"Codebook({self.name!r}, {len(self.entries)} entries of {self.d})"


def check_name(name: object) -> None:
    """Raises ValueError unless ``name`` can be that of a codebook, and so of a parameter."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(
            f'the name of a codebook consists of letters, digits, "_" and "-", not {name!r:.200}.'
        )
    if hasattr(nn.Module(), name):
        raise ValueError(f"a codebook cannot be called {name!r}: modules of torch have one.")


def keep_dtypes(
    fn: Callable[[Tensor], Tensor], parameters: Collection[Tensor]
) -> Callable[[Tensor], Tensor]:
    """``fn`` of ``nn.Module._apply``, moving these parameters without converting them."""

    def apply(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        if result.dtype != tensor.dtype and any(tensor is fixed for fixed in parameters):
            return tensor.to(result.device)
        return result

    return apply


class Codebooks(nn.Module):
    """The shared codebooks of a model, one parameter each, without gradient, under its name."""

    def __init__(self, codebooks: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, entries in codebooks.items():
            self.register_parameter(name, nn.Parameter(entries, requires_grad=False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codebooks:
        """Moves as any module; the dtype is part of the form and stays."""
        super()._apply(keep_dtypes(fn, list(self.parameters())), recurse)
        return self

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={tuple(p.shape)}" for name, p in self.named_parameters())


def adopt_codebooks(model: nn.Module) -> Codebooks | None:
    """Gives the model what its linears share, each codebook once, and ties the linears to it.

    The base model owns them, so that it can be saved and loaded without its head.

    Raises:
        ValueError: linears that name the same codebook have different ones.
    """
    found: dict[str, Tensor] = {}
    for module_name, linear in _sharing(model).items():
        entries = linear.codebook
        first = found.setdefault(linear.codebook_name, entries)
        same = first.shape == entries.shape and (
            first.is_meta or first is entries or torch.equal(first.to(entries.device), entries)
        )
        if not same:
            raise ValueError(
                f"{module_name} has another codebook {linear.codebook_name!r} than the linears "
                "before it: a name stands for one codebook in a model."
            )
    if not found:
        return None
    owner = Codebooks(found)
    _base(model).add_module(OWNER, owner)
    tie_codebooks(model)
    return owner


def tie_codebooks(model: nn.Module) -> None:
    """Makes every linear that shares a codebook refer to the model's own of that name."""
    sharing = _sharing(model)
    if sharing:
        owner = getattr(_base(model), OWNER).requires_grad_(False)
        for linear in sharing.values():
            linear.refer_to_codebook(getattr(owner, linear.codebook_name))


def disown_codebooks(model: nn.Module) -> None:
    """Takes the codebooks from a model none of whose linears needs them any more."""
    if hasattr(_base(model), OWNER):
        delattr(_base(model), OWNER)


def _sharing(model: nn.Module) -> dict[str, Any]:
    named = model.named_modules()
    return {name: m for name, m in named if getattr(m, "codebook_name", None) is not None}


def _base(model: nn.Module) -> nn.Module:
    base = getattr(model, "base_model", model)
    return base if isinstance(base, nn.Module) else model
