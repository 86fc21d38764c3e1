"""In which dtype torch's dense products are fast: on most CPUs float32 alone."""

from __future__ import annotations

import functools

import torch


@functools.cache
def cpu_has_gemm(dtype: torch.dtype) -> bool:
    """Whether torch's GEMM has a fast kernel for a 16-bit dtype on this CPU: oneDNN's, if any.

    What torch falls back to takes 7 times as long as float32 (AVX2, 512 tokens).
    """
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return torch.backends.mkldnn.is_available() and supported is not None and bool(supported())


def gemm_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to multiply many tokens in: ``dtype``, or float32 where that is much faster."""
    if dtype == torch.float32 or device.type != "cpu" or cpu_has_gemm(dtype):
        return dtype
    return torch.float32
