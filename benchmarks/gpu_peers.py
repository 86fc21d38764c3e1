"""Published GPU kernels for the same purposes, where they are installed and run here.

What cannot run is left out with its reason: these packages build or compile for few combinations of
Python, torch and CUDA.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import gpu
import torch
from torch import Tensor

Call = Callable[[Tensor], Tensor]
DTYPE = torch.bfloat16


def torch_2_4(rows: int, cols: int) -> tuple[Call, int]:
    """torch's semi-structured sparse product: 2 of 4 values and 2 bits each for where they are."""
    from torch.sparse import to_sparse_semi_structured

    mask = torch.tensor([1, 1, 0, 0], device="cuda", dtype=torch.bool).repeat(rows, cols // 4)
    weight = to_sparse_semi_structured(torch.randn(rows, cols, device="cuda", dtype=DTYPE) * mask)
    return lambda x: torch.nn.functional.linear(x, weight), rows * cols * 9 // 8


def torch_int4(rows: int, cols: int) -> tuple[Call, int]:
    """torch's int4 product (tinygemm): 4 bits a weight, a scale and a zero for 128 of them."""
    group = 128
    weight = torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(weight, 8)
    scales = torch.randn(cols // group, rows, 2, device="cuda", dtype=DTYPE) / 100
    size = weight.numel() + scales.numel() * scales.element_size()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, group, scales), size


def aqlm_layer(rows: int, cols: int, codebooks: int, bits: int) -> tuple[Call, int]:
    """AQLM's 2 bits a weight: codebooks of entries of 8 that are added up."""
    # It compiles its kernels when it is first used.
    major, minor = torch.cuda.get_device_capability()
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
    from aqlm import QuantizedLinear

    layer = QuantizedLinear(
        cols, rows, in_group_size=8, out_group_size=1, num_codebooks=codebooks,
        nbits_per_codebook=bits, bias=False, device="cuda", dtype=torch.float16,
    )  # fmt: skip
    info = torch.iinfo(layer.codes.dtype)
    codes = torch.randint(info.min, info.max + 1, layer.codes.shape, device="cuda")
    layer.codes.copy_(codes.to(layer.codes.dtype))
    layer.codebooks.normal_()
    layer.scales.fill_(0.01)
    return layer, rows * cols * codebooks * bits // 64


def vptq_layer(rows: int, cols: int) -> tuple[Call, int]:
    """VPTQ's 2 bits a weight: one codebook of 65536 entries of 8, no residual, no outliers."""
    from vptq.layers.vqlinear import VQuantLinear
    from vptq.ops import quant_gemm

    if not vars(quant_gemm).get("__cuda_ops_installed"):
        raise RuntimeError("its CUDA kernels do not load, and it would fall back to PyTorch")

    layer = VQuantLinear(
        cols, rows, vector_lens=(-1, 8), num_centroids=(-1, 65536), num_res_centroids=(-1, -1),
        group_num=1, group_size=cols, outlier_size=0, indices_as_float=False,
        is_indice_packed=True, device="cuda", dtype=DTYPE, enable_proxy_error=False,
    )  # fmt: skip
    layer.indices.copy_(torch.randint_like(layer.indices, 0, 2**31 - 1))
    layer.centroids.weight.normal_()
    return lambda x: layer(x[:, None])[:, 0], rows * cols // 4


Make = Callable[[int, int], tuple[Call, int]]
TORCH: dict[str, Make] = {"torch int4": torch_int4, "torch 2:4": torch_2_4}
PUBLISHED: dict[str, Make] = {
    "aqlm 2x8": functools.partial(aqlm_layer, codebooks=2, bits=8),
    "aqlm 1x16": functools.partial(aqlm_layer, codebooks=1, bits=16),
    "vptq 8x16": vptq_layer,
}
IN_HALF = {"aqlm 2x8", "aqlm 1x16"}  # contenders that take float16 inputs
MOST_COPIES = 24  # their layers are slow to make; so many exceed a cache of 50 MB
_missing: set[str] = set()  # what failed once is not tried at every shape


def inputs(name: str, x: Tensor) -> Tensor:
    """x as this contender takes it."""
    return x.half() if name in IN_HALF else x


def layers(makers: dict[str, Make], rows: int, cols: int) -> dict[str, tuple[list[Call], int]]:
    """Name -> (calls of a linear layer of this size, bytes of its weight)."""
    found: dict[str, tuple[list[Call], int]] = {}
    for name, make in makers.items():
        x = inputs(name, torch.randn(1, cols, device="cuda", dtype=DTYPE))

        def copies(make: Make = make, x: Tensor = x) -> tuple[list[Call], int]:
            first, size = make(rows, cols)
            first(x)
            count = min(MOST_COPIES, gpu.copies(size))
            return [first] + [make(rows, cols)[0] for _ in range(count - 1)], size

        if name not in _missing:
            if made := gpu.attempt(name, copies):
                found[name] = made
            else:
                _missing.add(name)
    return found


def flash_kmeans(points: Tensor, codebook: Tensor, iterations: int) -> Callable[[], Any] | None:
    """Unweighted k-means iterations on points [n, d], update included; None where it cannot run."""

    def made() -> Callable[[], Any]:
        from flash_kmeans import batch_kmeans_Euclid

        def run(count: int = iterations) -> Any:
            return batch_kmeans_Euclid(
                points[None], len(codebook), max_iters=count, init_centroids=codebook[None].clone()
            )

        run(1)
        return run

    return gpu.attempt("flash-kmeans", made)
