"""Sparse GEMV at 50 % unstructured and 2:4, against torch's dense GEMV and its CSR product."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import harness
import torch
from torch import Tensor

from nowag_ext import ops, reference

SHAPES = [(4096, 11008), (4096, 4096), (11008, 4096), (576, 1536)]
TOKENS = [1, 2, 4, 8, 16]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Sparse = tuple[Tensor, Tensor, Tensor]


def pack(weight: Tensor, bitmap: Tensor) -> Sparse:
    offsets = ops.sparse_offsets(bitmap, weight.shape[1])
    return bitmap, ops.sparse_pack(weight, bitmap, offsets, int(offsets[-1])), offsets


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def validate(x: Tensor, sparse: Sparse) -> None:
    """The error bound of sparse_gemv.h, and the rounding of the result."""
    bitmap, values, offsets = sparse
    error = (ops.sparse_gemv(x, *sparse).double() - reference.sparse_linear(x, *sparse)).abs()
    sizes = reference.sparse_linear(x.abs(), bitmap, values.abs(), offsets)
    assert (error <= (8e-6 + torch.finfo(x.dtype).eps) * sizes).all()


def calls(function: Callable[[Any], Any], copies: list[Any]) -> list[Callable[[], Any]]:
    """One closure for each copy of the weight."""
    return [lambda copy=copy: function(copy) for copy in copies]


class Layer:
    """One weight in every form.

    The contenders take turns, so that between two uses of an operand all the others are read:
    copies are counted such that together they exceed the caches.
    """

    ROUND_BYTES = 21  # a weight: dense fp32 and bf16, 50 % and 2:4 in three dtypes, CSR

    def __init__(self, shape: tuple[int, int]) -> None:
        rows, cols = shape
        h = torch.ones(cols)
        self.weight = torch.randn(shape)
        self.half = ops.prune_select(self.weight, h, rows * cols // 2)
        self.pattern = ops.prune_select_nm(self.weight, h, 2, 4)
        self.copies = harness.rotation_count(self.ROUND_BYTES * rows * cols)

    def dense(self, dtype: torch.dtype) -> list[Tensor]:
        return [self.weight.to(dtype, copy=True) for _ in range(self.copies)]

    def sparse(self, dtype: torch.dtype, bitmap: Tensor) -> list[Sparse]:
        bitmap, values, offsets = pack(self.weight.to(dtype), bitmap)
        return [(bitmap.clone(), values.clone(), offsets.clone()) for _ in range(self.copies)]

    def csr(self) -> list[Tensor]:
        sparse = pack(self.weight, self.half)
        pruned = ops.sparse_dequantize(*sparse, self.weight.shape[1], torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch says that its CSR is in beta
            return [pruned.to_sparse_csr() for _ in range(self.copies)]


def bench(report: harness.Report, layer: Layer, tokens: int, seconds: float) -> None:
    contenders: dict[str, list[Callable[[], Any]]] = {}
    cost: dict[str, dict[str, int]] = {}
    rows, cols = layer.weight.shape
    flops = 2 * tokens * layer.weight.numel()
    linear = torch.nn.functional.linear
    for name, dtype in DTYPES.items():
        x = torch.randn(tokens, cols).to(dtype)
        for kind, bitmap in (("50 %", layer.half), ("2:4", layer.pattern)):
            copies = layer.sparse(dtype, bitmap)
            validate(x, copies[0])
            contenders[f"{kind} {name}"] = calls(lambda w, x=x: ops.sparse_gemv(x, *w), copies)
            cost[f"{kind} {name}"] = {"bytes": nbytes(*copies[0]), "flops": flops // 2}
        if name != "fp16":
            dense = layer.dense(dtype)
            contenders[f"dense {name}"] = calls(lambda w, x=x: linear(x, w), dense)
            cost[f"dense {name}"] = {"bytes": dense[0].nbytes, "flops": flops}
    column = torch.randn(cols, tokens)
    csr = layer.csr()
    contenders["torch CSR fp32"] = calls(lambda w: w @ column, csr)
    csr_bytes = nbytes(csr[0].values(), csr[0].col_indices(), csr[0].crow_indices())
    cost["torch CSR fp32"] = {"bytes": csr_bytes, "flops": flops // 2}
    timings = harness.compare(contenders, seconds)
    peers = ["dense fp32", "dense bf16", "torch CSR fp32"]
    report.add(f"{rows}x{cols}, {tokens}", timings, peers, cost)


def main() -> None:
    options = harness.arguments(__doc__).parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    report = harness.Report("sparse_gemv")
    for shape in SHAPES:
        layer = Layer(shape)
        for tokens in TOKENS if shape == SHAPES[0] else [1]:
            bench(report, layer, tokens, options.seconds)
    if options.json:
        report.write(options.json)


if __name__ == "__main__":
    main()
