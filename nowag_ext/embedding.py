"""VQEmbedding: rows of a vector quantised head by token id, where it is tied to the embedding."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nowag_ext import ops
from nowag_ext.linear import VQLinear
from nowag_ext.ops.checks import DTYPES
from nowag_ext.packed import Form, PackedModule, check_vq_content, vq_form
from nowag_ext.vq import VQWeight

if TYPE_CHECKING:
    from typing_extensions import Self

_TENSORS = ("codes", "codebook", "row_norms", "col_norms")


class VQEmbedding(PackedModule):
    """Looks token ids up in a vector quantised weight, in place of an ``nn.Embedding``.

    Args:
        embedding: what it stands for, of whose weight nothing but the shape is looked at. Of the
            subclasses of ``nn.Embedding`` those will do that multiply by an ``embed_scale``.
        d, code_bits: of the codes.
        dtype: of the rows that are looked up; it follows ``.to(dtype)``.
        device: of everything, "meta" too.

    Packed tensors: those of ``VQLinear``, for num_embeddings outputs and embedding_dim inputs; they
    are a head's too (``tie_head``). Its ``scale``, [], what rows are multiplied by, is its first
    parameter and so says to transformers of what dtype the model is.

    Raises:
        TypeError: another module than such an embedding.
    """

    outline: nn.Module
    scale: nn.Parameter
    codes: nn.Parameter
    codebook: nn.Parameter
    row_norms: nn.Parameter
    col_norms: nn.Parameter

    def __init__(
        self,
        embedding: nn.Module,
        *,
        d: int,
        code_bits: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None:
            raise TypeError(
                "a packed embedding stands for an nn.Embedding without max_norm, not for a "
                f"{type(embedding).__name__}."
            )
        self.num_embeddings = embedding.num_embeddings
        self.embedding_dim = embedding.embedding_dim
        self.d, self.code_bits = d, code_bits
        # What rows are multiplied by: nothing, a number, or, None, a tensor of the model's dtype.
        self._factor = None if isinstance(_own_scale(embedding), Tensor) else _scale(embedding)
        # No submodule: nothing of it is a part of the packed model.
        self.__dict__["outline"] = _with_weight(
            embedding, nn.Parameter(torch.empty(self.weight_shape, device="meta"), False)
        )
        scale = torch.full((), _scale(embedding) or 1.0, dtype=dtype, device=device)
        self.register_parameter("scale", nn.Parameter(scale, requires_grad=False))
        self._set_packed(
            {
                name: torch.zeros(shape, dtype=kind, device=device)
                for name, (shape, kind) in self._expected().items()
            }
        )

    @classmethod
    def from_weight(cls, embedding: nn.Module, weight: VQWeight, dtype: torch.dtype) -> Self:
        """A packed embedding in a dense one's place, sharing a weight's tensors."""
        device = weight.codes.device
        layer = cls(embedding, d=weight.d, code_bits=weight.code_bits, dtype=dtype, device=device)
        layer._set_packed(weight.tensors())
        layer.validate()
        return layer

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def restore_scale(self) -> None:
        """The scale as the dense embedding's class has it, which a low dtype has rounded."""
        self.scale.requires_grad_(False)
        known = _scale(self.outline)
        if known is not None:
            self.scale.fill_(known)

    def weight_form(self) -> VQWeight:
        tensors = {name: getattr(self, name).detach() for name in _TENSORS}
        return VQWeight(**tensors, shape=self.weight_shape)

    def to_dense(self, weight: nn.Parameter) -> nn.Module:
        dense = _with_weight(self.outline, weight)
        for name, buffer in dense._buffers.items():
            if buffer is not None and buffer.is_meta:
                dense._buffers[name] = self.scale.detach().to(weight.device, copy=True)
        return dense

    def forward(self, input: Tensor) -> Tensor:
        """Token ids [...] -> [..., embedding_dim] of ``scale``'s dtype."""
        packed: Any = self._parameters
        scale = packed["scale"]
        kind = scale.dtype if scale.dtype in DTYPES else torch.float32
        rows = ops.vq_gather(
            input, packed["codes"], packed["codebook"], packed["row_norms"], packed["col_norms"],
            kind,
        )  # fmt: skip
        rows = rows.to(scale.dtype)
        if self._factor == 1:
            return rows
        return rows * (scale if self._factor is None else self._factor)

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, d={self.d}, code_bits={self.code_bits}"
        )

    def _check_content(self, tensors: dict[str, Tensor]) -> None:
        check_vq_content(tensors)

    def _expected(self) -> Form:
        return vq_form(*self.weight_shape, self.d, self.code_bits)


def _with_weight(embedding: nn.Module, weight: nn.Parameter) -> nn.Module:
    """The embedding with another weight, and without hooks; all else is the same."""
    other = copy.copy(embedding)
    state = vars(other)
    for name in ("forward", "_old_forward", "_hf_hook"):  # accelerate's, of the embedding itself
        state.pop(name, None)
    for name, value in state.items():
        if "_hooks" in name and isinstance(value, dict):
            state[name] = type(value)()
    other._parameters = {**embedding._parameters, "weight": weight}
    other._buffers = dict(embedding._buffers)
    return other


def _own_scale(embedding: nn.Module) -> Any:
    return 1.0 if type(embedding) is nn.Embedding else getattr(embedding, "embed_scale", None)


def _scale(embedding: nn.Module) -> float | None:
    """What an embedding multiplies rows by, None where only the checkpoint knows."""
    if type(embedding) is nn.Embedding:
        return 1.0
    for name in ("scalar_embed_scale", "embed_scale"):
        value = getattr(embedding, name, None)
        if isinstance(value, int | float) or (isinstance(value, Tensor) and not value.is_meta):
            return float(value)
    return None


def check_embedding(name: str, embedding: nn.Module) -> None:
    """Raises ValueError for a dense embedding that a packed one cannot stand for."""
    unfit = f"{name} is a {type(embedding).__name__}"
    if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None:
        raise ValueError(f"{unfit}, not an nn.Embedding without max_norm: it cannot be packed.")
    scale = _scale(embedding)
    if embedding.weight.is_meta:
        return
    ids = torch.arange(min(2, embedding.num_embeddings), device=embedding.weight.device)
    with torch.no_grad():
        rows = embedding(ids)
        expected = embedding.weight[ids] * (math.nan if scale is None else scale)
    if rows.shape != expected.shape or not torch.allclose(rows, expected, rtol=0.01):
        raise ValueError(
            f"{unfit}, which does more than look rows up and multiply by embed_scale: it cannot be "
            "packed."
        )


def tie_head(model: Any, embedding: str, head: str) -> None:
    """Makes the head's packed tensors the embedding's, and has transformers keep it so.

    Args:
        model: a causal LM of transformers.
        embedding, head: names of its VQEmbedding and the VQLinear.
    """
    owner: VQEmbedding = model.get_submodule(embedding)
    linear: VQLinear = model.get_submodule(head)
    for name in _TENSORS:
        linear.register_parameter(name, owner.get_parameter(name))
    gone = {f"{embedding}.weight", f"{head}.weight"}
    tied = {f"{head}.{name}": f"{embedding}.{name}" for name in _TENSORS}

    def changed(known: Mapping[str, str] | None) -> dict[str, str]:
        others = (known or {}).items()
        return {**{k: v for k, v in others if gone.isdisjoint((k, v))}, **tied}

    model._tied_weights_keys = changed(model._tied_weights_keys)  # of this model, not its class
    model.all_tied_weights_keys = changed(model.all_tied_weights_keys)


def untie_head(model: Any) -> None:
    """Has transformers tie the dense embedding and head again as their class says."""
    vars(model).pop("_tied_weights_keys", None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
