"""VQ and sparse GEMV on a GPU against what torch has: cuBLAS, its int4 and its 2:4 product.

python benchmarks/bench_gpu_gemv.py --json out.json
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import gpu
import gpu_peers
import torch
from torch import Tensor

from nowag_ext import ops

# [out_features, in_features] of Llama-2-7B and Llama-3-8B, and two of Llama-2-70B.
SHAPES = [
    (4096, 4096), (11008, 4096), (4096, 11008), (1024, 4096), (14336, 4096), (4096, 14336),
    (28672, 8192), (8192, 28672),
]  # fmt: skip
QUICK = [(4096, 4096), (11008, 4096), (28672, 8192)]
TOKENS = [1, 2, 4, 8, 16]
VQ = {"vq d=6": (6, 12), "vq d=4": (4, 8)}
DTYPE = gpu_peers.DTYPE
DENSE = "cuBLAS bf16"

Call = gpu_peers.Call


def vq_weight(rows: int, cols: int, d: int, code_bits: int) -> list[Tensor]:
    """codes, codebook, row_norms, col_norms at random, on the device."""
    shape = ops.packed_shape(rows, cols, d, code_bits)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
    if rows % 32:
        raise ValueError("the shapes of this benchmark are whole tiles")
    codebook = (torch.randn(2**code_bits, d, device="cuda") / cols**0.5).half()
    norms = [(0.5 + torch.rand(n, device="cuda")).half() for n in (rows, cols)]
    return [codes, codebook, *norms]


def sparse_weight(rows: int, cols: int, pattern: str) -> list[Tensor]:
    """bitmap, values, row_offsets of a random weight, half of it kept."""
    weight = torch.randn(rows, cols, device="cuda")
    h = torch.ones(cols, device="cuda")
    if pattern == "2:4":
        bitmap = ops.prune_select_nm(weight, h, 2, 4)
    else:
        bitmap = ops.prune_select(weight, h, weight.numel() // 2)
    offsets = ops.sparse_offsets(bitmap, cols)
    return [bitmap, ops.sparse_pack(weight.to(DTYPE), bitmap, offsets, int(offsets[-1])), offsets]


def check(call: Call, dense: Tensor, cols: int, what: str) -> None:
    """The kernel computes its weight's product: validated before anything is timed."""
    for tokens in (1, 2, 3, 16):  # each is another kernel's
        x = torch.randn(tokens, cols, device="cuda", dtype=DTYPE)
        want = x.double() @ dense.double().T
        error = float((call(x).double() - want).norm() / want.norm())
        if not error < 5e-3:
            raise SystemExit(
                f"{what}, {tokens} tokens: relative error {error:.2e}, expected under 5e-3"
            )


Contenders = dict[str, tuple[list[Call], int]]  # one call an operand copy, bytes of one copy


def rotated(
    make: Callable[[], list[Tensor]], apply: Callable[..., Tensor]
) -> tuple[list[Call], int]:
    """A contender whose operands make() makes."""
    first = make()
    size = sum(tensor.numel() * tensor.element_size() for tensor in first)
    weights = [first] + [make() for _ in range(gpu.copies(size) - 1)]
    return [lambda x, w=w: apply(x, *w) for w in weights], size


def dense(rows: int, cols: int) -> tuple[list[Call], int]:
    def make() -> list[Tensor]:
        return [torch.randn(rows, cols, device="cuda", dtype=DTYPE)]

    return rotated(make, torch.nn.functional.linear)


def vq(rows: int, cols: int) -> Contenders:
    """Our VQ kernels, checked."""
    found = {}
    for name, (d, code_bits) in VQ.items():
        weight = vq_weight(rows, cols, d, code_bits)
        want = ops.vq_dequantize(*weight, torch.float32)
        check(lambda x, w=weight: ops.vq_gemv(x, *w), want, cols, name)
        found[name] = rotated(
            lambda d=d, bits=code_bits: vq_weight(rows, cols, d, bits), ops.vq_gemv
        )
    return found


def sparse(rows: int, cols: int) -> Contenders:
    """Our kernels for pruned weights, checked."""
    found = {}
    for pattern in ("50 %", "2:4"):
        weight = sparse_weight(rows, cols, pattern)
        want = ops.sparse_dequantize(*weight, cols, torch.float32)
        check(lambda x, w=weight: ops.sparse_gemv(x, *w), want, cols, pattern)
        # Copies of one weight: what is measured does not depend on which weights are kept.
        found[f"sparse {pattern}"] = rotated(
            lambda w=weight: [t.clone() for t in w], ops.sparse_gemv
        )
    return found


def bench(
    found: Contenders, shape: str, tokens: int, cols: int, bandwidth: float
) -> list[gpu.Line]:
    x = torch.randn(tokens, cols, device="cuda", dtype=DTYPE)
    calls = {
        name: [functools.partial(call, gpu_peers.inputs(name, x)) for call in some]
        for name, (some, _) in found.items()
    }
    sizes = {name: size for name, (_, size) in found.items()}
    return gpu.lines("gemv", shape, gpu.compare(calls), sizes, DENSE, bandwidth)


def main() -> None:
    options = gpu.arguments(__doc__ or "")
    bandwidth = gpu.copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    results: list[gpu.Line] = []
    for rows, cols in QUICK if options.quick else SHAPES:
        found = {DENSE: dense(rows, cols), **vq(rows, cols), **sparse(rows, cols)}
        found |= gpu_peers.layers(gpu_peers.TORCH, rows, cols)
        for tokens in TOKENS if (rows, cols) in QUICK else TOKENS[:1]:
            lines = bench(found, f"{rows}x{cols} tokens={tokens}", tokens, cols, bandwidth)
            gpu.print_lines(lines)
            results += lines
            gpu.write(options.json, results, copy_bandwidth=bandwidth)
        del found
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
