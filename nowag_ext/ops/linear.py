"""Linear layers in packed form: what vq_linear and sparse_linear share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nowag_ext import _cpu
from nowag_ext.gemm import gemm_dtype
from nowag_ext.ops.checks import DTYPES, check, check_features, dtype_code, same_device
from nowag_ext.ops.format import TILE_ROWS

GEMV_MAX_TOKENS: int = _cpu.vq_gemv_max_tokens
VQ_MAX_MEMBERS: int = _cpu.vq_max_members

# Dense rows made at a time when many tokens come. On a CPU enough for the GEMM to run at full
# speed, small beside a layer; on a GPU about what its L2 cache has room for: each launch more costs
# as much as some megabytes.
_TILE_BYTES = 8 << 20
_DEVICE_TILE_BYTES = 64 << 20

DequantizeRows = Callable[[int, int, Tensor], None]


def check_linear(
    x: Tensor, bias: Tensor | None, rows: int, cols: int, weight: Tensor
) -> tuple[Tensor, int, Tensor | None]:
    """(x, number of tokens, bias) of a linear layer: checked, x and bias contiguous.

    ``weight`` is one of the packed tensors. Run for every token of every layer: a device is more
    to ask for than whether it is the CPU.
    """
    if x.dtype not in DTYPES:
        dtype_code(x, "x")
    if x.dim() == 0 or x.shape[-1] != cols:
        check_features(x, "x", cols)
    if not (x.is_cpu and weight.is_cpu) and x.device != weight.device:
        raise ValueError(f"x must be on {weight.device}, not on {x.device}.")
    if bias is not None:
        same_device(weight.device, bias=bias)
        bias = bias.contiguous()
        check(bias, "bias", x.dtype, (rows,))
    return x.contiguous(), x.numel() // cols, bias


def _tile_rows(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a dense tile: whole code tiles, and of equal tiles the fewest that are not too large.

    No more than ``rows``.
    """
    most = _TILE_BYTES if device.type == "cpu" else _DEVICE_TILE_BYTES
    code_tiles = -(-rows // TILE_ROWS)
    of_tile = max(1, most // (cols * dtype.itemsize * TILE_ROWS))
    tiles = -(-code_tiles // of_tile)
    return min(-(-code_tiles // tiles) * TILE_ROWS, rows)


def tiled_linear(x: Tensor, bias: Tensor | None, rows: int, dequantize: DequantizeRows) -> Tensor:
    """x W^T + bias by a dense GEMM on one tile of W's rows after another."""
    cols, dtype = x.shape[-1], gemm_dtype(x.dtype, x.device)
    inputs = x.view(-1, cols).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    outputs = inputs.new_empty((inputs.shape[0], rows))
    step = _tile_rows(rows, cols, dtype, x.device)
    tile = inputs.new_empty((step, cols))
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        dequantize(begin, end, tile)
        weight = tile[: end - begin].t()
        if bias is None:
            torch.mm(inputs, weight, out=outputs[:, begin:end])
        else:
            torch.addmm(bias[begin:end], inputs, weight, out=outputs[:, begin:end])
    return outputs.to(x.dtype).view(*x.shape[:-1], rows)


def tiled_linear_grad(grad_y: Tensor, cols: int, dequantize: DequantizeRows) -> Tensor:
    """grad_y W, the gradient of x, tile by tile; summed over tiles in float32."""
    rows, dtype = grad_y.shape[-1], gemm_dtype(grad_y.dtype, grad_y.device)
    outputs = grad_y.reshape(-1, rows).to(dtype)
    grad_x = grad_y.new_zeros((outputs.shape[0], cols), dtype=torch.float32)
    step = _tile_rows(rows, cols, dtype, grad_y.device)
    tile = outputs.new_empty((step, cols))
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        dequantize(begin, end, tile)
        grad_x += outputs[:, begin:end] @ tile[: end - begin]
    return grad_x.to(grad_y.dtype).view(*grad_y.shape[:-1], cols)
