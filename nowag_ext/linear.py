"""Linear layers whose weight stays in its packed form: VQLinear and SparseLinear."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from nowag_ext import ops
from nowag_ext.codebook import check_name
from nowag_ext.ops.checks import check_features
from nowag_ext.packed import Form, PackedModule, check_vq_content, require_finite, vq_form
from nowag_ext.prune import SparseWeight, kept_weights
from nowag_ext.vq import VQWeight, check_code

PackedWeight = VQWeight | SparseWeight

if TYPE_CHECKING:
    from typing_extensions import Self


class PackedLinear(PackedModule):
    """A linear layer with a packed weight.

    ``.to(torch.bfloat16)`` and the like convert the bias and leave the packed tensors alone.
    """

    method: ClassVar[str]
    in_features: int
    out_features: int
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(
                f"in_features and out_features must be positive, not {in_features} and "
                f"{out_features}."
            )
        self.in_features = in_features
        self.out_features = out_features
        self._few = in_features * ops.GEMV_MAX_TOKENS
        empty = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", nn.Parameter(empty) if empty is not None else None)

    def _set_bias(self, bias: Tensor | None) -> None:
        """Takes ``bias`` as this layer's parameter: itself if it is one, else one on its data."""
        if bias is None:
            return
        if tuple(bias.shape) != (self.out_features,):
            raise ValueError(
                f"bias must have shape ({self.out_features},), not {tuple(bias.shape)}."
            )
        if not bias.is_floating_point():
            raise TypeError(f"bias must be of a floating-point dtype, not {bias.dtype}.")
        if not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
        self.bias = bias

    @classmethod
    @abstractmethod
    def from_weight(cls, weight: Any, bias: Tensor | None = None) -> Self:
        """The layer of a compressed weight, sharing its tensors. ``bias`` is [out_features]."""

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @abstractmethod
    def weight_form(self) -> PackedWeight:
        """The weight in its packed form, sharing this layer's tensors."""

    def to_dense(self, weight: nn.Parameter) -> nn.Linear:
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = weight
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def _bias_as(self, dtype: torch.dtype) -> Tensor | None:
        bias = self._parameters["bias"]
        return bias if bias is None or bias.dtype == dtype else bias.to(dtype)

    def _input(self, x: Tensor) -> Tensor:
        """x in autocast's dtype where that is on, as for nn.Linear; raises for a wrong width."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            check_features(x, "x", self.in_features)
        if x.is_cpu or x.is_cuda:
            kind = "cpu" if x.is_cpu else "cuda"
            if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
                return x.to(torch.get_autocast_dtype(kind))
        return x

    def _is_plain_call(self, x: Tensor) -> bool:
        """Whether the kernel for few tokens will do: without a gradient and torch's dispatcher."""
        if x.numel() > self._few or torch.compiler.is_compiling() or ops.needs_dispatcher(x):
            return False
        if not torch.is_grad_enabled():
            return True
        if x.requires_grad:
            return False
        for parameter in self._parameters.values():  # for each token: any(...) takes longer
            if parameter is not None and parameter.requires_grad:
                return False
        return True

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}"


class VQLinear(PackedLinear):
    """y = x W^T + bias with W vector quantised (NoWag-VQ), in place of a trained nn.Linear.

    Few tokens go through a kernel that reads the packed codes, many through dense tiles and a GEMM.
    Gradients flow to x and bias; the weight is constant.

    Args:
        in_features, out_features: as in nn.Linear.
        d: sub-vector length, 1 to 8.
        bits: bits per weight; d * bits, the bits of one code, is an integer from 1 to 16.
        bias: whether there is a bias.
        dtype: of the bias; the packed tensors' dtypes are fixed by the format.
        device: of everything, "meta" too.
        codebook_name: the name of the ``Codebook`` it is to share, None for its own.

    Packed tensors: codes uint8 [ceil(out_features / 32), ceil(in_features / d), 4 * d * bits],
    codebook fp16 [2^(d * bits), d], row_norms fp16 [out_features], col_norms fp16 [in_features].
    """

    method = "vq"

    codes: nn.Parameter
    codebook: nn.Parameter
    row_norms: nn.Parameter
    col_norms: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        d: int,
        bits: float,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        codebook_name: str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, dtype, device)
        self.code_bits = check_code(d, bits)
        self.d = d
        self.bits = bits
        if codebook_name is not None:
            check_name(codebook_name)
        self.codebook_name = codebook_name
        self._copy: tuple[Any, Tensor] | None = None
        self._set_packed(
            {
                name: torch.zeros(shape, dtype=dtype, device=device)
                for name, (shape, dtype) in self._expected().items()
            }
        )

    def _set_packed(self, tensors: dict[str, Tensor]) -> None:
        if self.codebook_name is None:
            super()._set_packed(tensors)
        else:
            super()._set_packed({n: tensor for n, tensor in tensors.items() if n != "codebook"})
            self.refer_to_codebook(tensors["codebook"])

    def refer_to_codebook(self, entries: Tensor) -> None:
        """Uses a codebook that another module owns, which moves and stores it."""
        self._parameters.pop("codebook", None)
        self.__dict__["codebook"] = entries

    @classmethod
    def from_weight(cls, weight: VQWeight, bias: Tensor | None = None) -> Self:
        out_features, in_features = weight.shape
        layer = cls(in_features, out_features, d=weight.d, bits=weight.bits, device="meta")
        layer.codebook_name = weight.codebook_name
        layer._set_packed(weight.tensors())
        layer.validate()
        layer._set_bias(bias)
        return layer

    def weight_form(self) -> VQWeight:
        return VQWeight(
            codes=self.codes.detach(),
            codebook=self.codebook.detach(),
            row_norms=self.row_norms.detach(),
            col_norms=self.col_norms.detach(),
            shape=(self.out_features, self.in_features),
            codebook_name=self.codebook_name,
        )

    def _check_content(self, tensors: dict[str, Tensor]) -> None:
        check_vq_content(tensors)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features], fp32, fp16 or bf16 -> [..., out_features] of x's dtype."""
        x = self._input(x)
        packed: Any = self._parameters  # nn.Module's attribute access takes a detour
        codes = packed["codes"]
        codebook = packed["codebook"] if self.codebook_name is None else self._shared(codes.device)
        op = ops.run_vq_gemv if self._is_plain_call(x) else ops.vq_linear
        return op(
            x, codes, codebook, packed["row_norms"], packed["col_norms"], self._bias_as(x.dtype)
        )

    def _shared(self, device: torch.device) -> Tensor:
        """The shared codebook; where its owner is on another device, a copy that is made once."""
        source = self.codebook
        if source.device == device:
            return source
        version = 0 if source.is_inference() else source._version
        key = (device, source.data_ptr(), version)
        if self._copy is None or self._copy[0] != key:
            self._copy = key, source.detach().to(device)
        return self._copy[1]

    def extra_repr(self) -> str:
        shared = "" if self.codebook_name is None else f", codebook={self.codebook_name!r}"
        return f"{super().extra_repr()}, d={self.d}, bits={self.bits}{shared}"

    def _expected(self) -> Form:
        return vq_form(self.out_features, self.in_features, self.d, self.code_bits)


class SparseLinear(PackedLinear):
    """y = x W^T + bias with W pruned (NoWag-P), unstructured or N:M, in place of nn.Linear.

    Few tokens go through a kernel that reads the sparse form, many through dense tiles and a GEMM.
    Gradients flow to x and bias; the weight is constant.

    Args:
        in_features, out_features: as in nn.Linear.
        sparsity: fraction pruned, in [0, 1); numel - int(sparsity * numel) weights are kept.
        pattern: "N:M", N kept of every M consecutive inputs; instead of sparsity.
        bias: whether there is a bias.
        dtype: of values and bias; the values keep it through ``.to(dtype)``.
        device: of everything, "meta" too.

    Packed tensors: bitmap uint8 [out_features, 8 * ceil(in_features / 64)], values [nnz],
    row_offsets int32 [out_features + 1].
    """

    method = "prune"

    bitmap: nn.Parameter
    values: nn.Parameter
    row_offsets: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sparsity: float | None = None,
        pattern: str | None = None,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, dtype, device)
        self.pattern = pattern
        kept = kept_weights(in_features, out_features, sparsity, pattern)
        shape = ops.bitmap_shape(out_features, in_features)
        self._set_packed(
            {
                "bitmap": torch.zeros(shape, dtype=torch.uint8, device=device),
                "values": torch.zeros(kept, dtype=dtype, device=device),
                "row_offsets": torch.zeros(out_features + 1, dtype=torch.int32, device=device),
            }
        )

    @classmethod
    def from_weight(cls, weight: SparseWeight, bias: Tensor | None = None) -> Self:
        out_features, in_features = weight.shape
        layer = cls(in_features, out_features, sparsity=0.0, device="meta")
        layer.pattern = weight.pattern
        layer._set_packed(weight.tensors())
        layer.validate()
        layer._set_bias(bias)
        return layer

    def weight_form(self) -> SparseWeight:
        return SparseWeight(
            bitmap=self.bitmap.detach(),
            values=self.values.detach(),
            row_offsets=self.row_offsets.detach(),
            shape=(self.out_features, self.in_features),
            pattern=self.pattern,
        )

    def _check_content(self, tensors: dict[str, Tensor]) -> None:
        bitmap, values, row_offsets = (tensors[n] for n in ("bitmap", "values", "row_offsets"))
        whole_bytes, bits = divmod(self.in_features, 8)
        tail = bitmap[:, whole_bytes:]
        if (tail[:, :1] >> bits).any() or tail[:, 1:].any():
            raise ValueError(f"bitmap must not have bits set past in_features {self.in_features}.")
        offsets = ops.sparse_offsets(bitmap.contiguous(), self.in_features)
        if not torch.equal(offsets, row_offsets):
            raise ValueError("row_offsets must be the running popcount of bitmap, but they differ.")
        if int(offsets[-1]) != values.numel():
            raise ValueError(
                f"values must hold the {int(offsets[-1])} weights that bitmap keeps, not "
                f"{values.numel()}."
            )
        require_finite("values", values)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features], fp32, fp16 or bf16 -> [..., out_features] of x's dtype."""
        x = self._input(x)
        packed: Any = self._parameters
        op = ops.run_sparse_gemv if self._is_plain_call(x) else ops.sparse_linear
        return op(
            x, packed["bitmap"], packed["values"], packed["row_offsets"], self._bias_as(x.dtype)
        )

    def extra_repr(self) -> str:
        kept = self.values.numel() / (self.in_features * self.out_features)
        pattern = f"pattern={self.pattern!r}" if self.pattern else f"sparsity={1 - kept:.4g}"
        return f"{super().extra_repr()}, {pattern}"

    def _expected(self) -> Form:
        rows, cols = self.out_features, self.in_features
        return {
            "bitmap": (ops.bitmap_shape(rows, cols), torch.uint8),
            "values": ((self.values.numel(),), self.values.dtype),
            "row_offsets": ((rows + 1,), torch.int32),
        }
