"""What operations demand of their operands, each in one sentence, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nowag_ext import _cpu

DTYPES = {
    torch.float32: _cpu.float32,
    torch.float16: _cpu.float16,
    torch.bfloat16: _cpu.bfloat16,
}


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def dtype_code(tensor: Tensor, what: str) -> int:
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{what} must be torch.float32, torch.float16 or torch.bfloat16, not {tensor.dtype}."
        )
    return DTYPES[tensor.dtype]


def check(tensor: Tensor, what: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
    """Raises unless ``tensor`` is contiguous, aligned and of this dtype and shape."""
    if tensor.dtype != dtype:
        raise TypeError(f"{what} must be {dtype}, not {tensor.dtype}.")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{what} must have shape {tuple(shape)}, not {tuple(tensor.shape)}.")
    require(tensor.is_contiguous(), f"{what} must be contiguous.")
    check_aligned(tensor, what)
    if tensor.is_cuda and dtype == torch.uint8:
        check_words(what, tensor.data_ptr(), shape[-1])


def check_aligned(tensor: Tensor, what: str) -> None:
    """Raises where elements do not begin at multiples of their size, as of ``torch.frombuffer``."""
    if tensor.data_ptr() % tensor.dtype.itemsize:
        raise ValueError(
            f"{what} must begin at a multiple of the {tensor.dtype.itemsize} bytes of an element, "
            f"not at {tensor.data_ptr():#x}: pass a clone()."
        )


def check_words(what: str, address: int, row_bytes: int) -> None:
    """Raises where CUDA kernels could not read rows of bytes in words, as wide as rows allow."""
    multiple = math.gcd(row_bytes, 16)
    require(
        address % multiple == 0,
        f"{what} must start at a multiple of {multiple} bytes in the device's memory, not at "
        f"{address:#x}: pass a clone().",
    )


def same_device(device: torch.device, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} must be on {device}, not on {tensor.device}.")


def check_features(tensor: Tensor, what: str, features: int) -> None:
    if tensor.dim() == 0 or tensor.shape[-1] != features:
        raise ValueError(
            f"{what} must have {features} features in its last dimension, "
            f"not shape {tuple(tensor.shape)}."
        )
