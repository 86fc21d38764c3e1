"""Published GPU kernels for the same purposes, where they are installed and run here.

What cannot run is left out with its reason: these packages build or compile for few combinations of
Python, torch and CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gpu
import torch
from torch import Tensor

Call = Callable[[Tensor], Tensor]
DTYPE = torch.bfloat16


def _torch_2_4(rows: int, cols: int) -> tuple[Call, int]:
    """torch's semi-structured sparse product: 2 of 4 values and 2 bits each for where they are."""
    from torch.sparse import to_sparse_semi_structured

    mask = torch.tensor([1, 1, 0, 0], device="cuda", dtype=torch.bool).repeat(rows, cols // 4)
    weight = to_sparse_semi_structured(torch.randn(rows, cols, device="cuda", dtype=DTYPE) * mask)
    return lambda x: torch.nn.functional.linear(x, weight), rows * cols * 9 // 8


def _aqlm(rows: int, cols: int) -> tuple[Call, int]:
    """AQLM's 2 bits a weight: one codebook of 65536 entries of 8."""
    from aqlm import QuantizedLinear

    layer = QuantizedLinear(
        cols, rows, in_group_size=8, out_group_size=1, num_codebooks=1, nbits_per_codebook=16,
        bias=False, device="cuda", dtype=torch.float16,
    )  # fmt: skip
    return layer, rows * cols // 4


def _vptq(rows: int, cols: int) -> tuple[Call, int]:
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
    with torch.no_grad():
        layer.indices.copy_(torch.randint_like(layer.indices, 0, 2**31 - 1))
        layer.centroids.weight.normal_()
    return lambda x: layer(x[:, None])[:, 0], rows * cols // 4


GEMV = {"torch 2:4": _torch_2_4, "aqlm 1x16": _aqlm, "vptq 8x16": _vptq}
IN_HALF = {"cuBLAS fp16", "aqlm 1x16"}  # contenders that take float16 inputs


def inputs(name: str, x: Tensor) -> Tensor:
    """x as this contender takes it."""
    return x.half() if name in IN_HALF else x


def gemv(rows: int, cols: int) -> dict[str, tuple[list[Call], int]]:
    """Name -> (calls of a linear layer of this size, bytes of its weight)."""
    found: dict[str, tuple[list[Call], int]] = {}
    for name, make in GEMV.items():
        try:
            first = make(rows, cols)
            first[0](inputs(name, torch.randn(1, cols, device="cuda", dtype=DTYPE)))
            made = [first] + [make(rows, cols) for _ in range(gpu.copies(first[1]) - 1)]
        except Exception as reason:  # whatever it is: see the module's text
            print(f"{name} left out: {type(reason).__name__}: {str(reason)[:100]!r}")
        else:
            found[name] = ([call for call, _ in made], first[1])
    return found


def flash_kmeans(points: Tensor, codebook: Tensor, iterations: int) -> Callable[[], Any] | None:
    """Unweighted k-means iterations on points [n, d], update included; None where it cannot run."""
    try:
        from flash_kmeans import batch_kmeans_Euclid

        def run(count: int = iterations) -> Any:
            return batch_kmeans_Euclid(
                points[None], len(codebook), max_iters=count, init_centroids=codebook[None].clone()
            )

        run(1)
    except Exception as reason:  # whatever it is: see the module's text
        print(f"flash-kmeans left out: {type(reason).__name__}: {str(reason)[:100]!r}")
        return None
    return run
