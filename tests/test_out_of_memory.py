"""Memory that the kernels ask for and do not get: a MemoryError, and nothing written.

Every call that the compiled module makes for memory while an operation runs is refused in turn, it
alone and it with all after it (failing_allocator.cpp). What torch, Python and the OpenMP runtime
ask for is not: the last ends the process where it cannot start a thread, and nothing can be done.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_same_bits
from torch import Tensor

import nowag_ext
from nowag_ext import _cpu, ops

COMPILER = shutil.which(os.environ.get("CXX", "c++"))

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler ($CXX, or c++)"),
    pytest.mark.skipif(
        platform.libc_ver()[0] != "glibc" or not platform.machine().endswith("64"),
        reason="only a 64-bit glibc loads modules as failing_allocator.cpp knows it",
    ),
]

NEVER = 2**62


class FailingAllocator:
    """Counts the calls that the compiled CPU module makes for memory, and refuses some."""

    def __init__(self, folder: Path) -> None:
        source = Path(__file__).with_name("failing_allocator.cpp")
        library = folder / "failing_allocator.so"
        command = [str(COMPILER), "-std=c++17", "-shared", "-fPIC", str(source)]
        subprocess.run([*command, "-o", str(library), "-ldl"], check=True)
        self._library = ctypes.CDLL(str(library))
        self._library.refuse.argtypes = [ctypes.c_int64, ctypes.c_int64]
        self._library.refuse.restype = None
        self._library.calls.restype = ctypes.c_int64
        self.refuse(NEVER, NEVER)
        assert self._library.take_over(os.fsencode(_cpu.__file__)) >= 2  # aligned_alloc, new

    def refuse(self, first: int, last: int) -> None:
        """From now on the calls of these numbers, from 0."""
        self._library.refuse(first, last)

    def count(self, call: Callable[[], Any]) -> int:
        """How many calls for memory there are in a call that gets it."""
        self.refuse(NEVER, NEVER)
        call()
        return int(self._library.calls())


@pytest.fixture(scope="module")
def allocator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FailingAllocator]:
    allocator = FailingAllocator(tmp_path_factory.mktemp("allocator"))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield allocator
    allocator.refuse(NEVER, NEVER)
    torch.set_num_threads(before)


def refuse_each(
    allocator: FailingAllocator, operands: list[Tensor], call: Callable[[], list[Tensor]]
) -> None:
    """Asserts that the call needs memory, fails without any part of it, and then works."""
    given = [operand.clone() for operand in operands]

    def restore() -> None:
        for operand, before in zip(operands, given, strict=True):
            operand.copy_(before)

    expected = [tensor.clone() for tensor in call()]
    restore()
    count = allocator.count(call)
    assert count > 0
    restore()
    for first in range(count):
        for last in (first, NEVER):
            allocator.refuse(first, last)
            with pytest.raises(MemoryError):
                call()
            allocator.refuse(NEVER, NEVER)
            for operand, before in zip(operands, given, strict=True):
                assert_same_bits(operand, before)
    for tensor, right in zip(call(), expected, strict=True):
        assert_same_bits(tensor, right)


ROWS, COLS = 40, 32
W = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(0))
NORMS = torch.linspace(0.5, 2, COLS)
HESSIAN = torch.diag(NORMS**2) + 0.1

METHODS: dict[str, Callable[[Tensor], Any]] = {
    "vq": lambda w: nowag_ext.vq_compress(w, NORMS, d=2, bits=1, iters=2),
    "vq of many entries": lambda w: nowag_ext.vq_compress(
        w, NORMS, d=1, bits=10, init="random", iters=1
    ),
    "vq under a Hessian": lambda w: nowag_ext.vq_compress(
        w, NORMS, d=8, bits=0.5, codebook=W.view(-1, 8)[:16], hessian=HESSIAN
    ),
    "prune": lambda w: nowag_ext.prune(w, NORMS, sparsity=0.5),
    "prune 2:4": lambda w: nowag_ext.prune(w, NORMS, pattern="2:4"),
    "prune under a Hessian": lambda w: nowag_ext.prune(w, NORMS, hessian=HESSIAN),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method(allocator: FailingAllocator, method: str) -> None:
    w = W.half()
    refuse_each(allocator, [w], lambda: list(METHODS[method](w).tensors().values()))


@pytest.mark.parametrize("method", ["vq", "vq of many entries", "prune"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_a_packed_weight(allocator: FailingAllocator, method: str, tokens: int) -> None:
    weight = METHODS[method](W)
    x = torch.randn(tokens, COLS, generator=torch.Generator().manual_seed(1)).bfloat16()
    linear = ops.vq_linear if isinstance(weight, nowag_ext.VQWeight) else ops.sparse_linear
    packed = list(weight.tensors().values())
    refuse_each(allocator, [x, *packed], lambda: [linear(x, *packed, None)])
    refuse_each(allocator, packed, lambda: [weight.dequantize(torch.float16)])


@pytest.mark.parametrize("code_bits", [4, 11])
@pytest.mark.parametrize("warm", [False, True])
def test_problems_that_share_a_codebook(
    allocator: FailingAllocator, warm: bool, code_bits: int
) -> None:
    """What is written in place is untouched, even where the memory runs out at the last problem."""
    d, generator = 2, torch.Generator().manual_seed(2)
    w = [torch.randn(rows, 10, generator=generator) for rows in (600, 9, 1100)]
    h = [torch.ones(10) for _ in w]
    old, new = torch.randn(2, 2**code_bits, d, generator=generator)
    codes = [torch.zeros(len(matrix), 5, dtype=torch.uint16) for matrix in w]
    gaps = [torch.zeros(len(matrix), 5) for matrix in w]
    sums = torch.zeros(2**code_bits, 2 * d + 1, dtype=torch.int64)
    shared, scale = [sums] * len(w), 2.0**30
    if warm:
        ops.kmeans_assign(w, h, [old] * 3, codes, shared, scale, False, None, gaps)

    def call() -> list[Tensor]:
        previous = [old] * 3 if warm else None
        changed = ops.kmeans_assign(w, h, [new] * 3, codes, shared, scale, warm, previous, gaps)
        return [changed, *codes, sums]

    refuse_each(allocator, [*codes, *gaps, sums], call)


def test_feedback(allocator: FailingAllocator) -> None:
    d, generator = 2, torch.Generator().manual_seed(3)
    x, carried = torch.randn(2, 90, 8, generator=generator)
    factor = torch.randn(8, 8, generator=generator).triu()
    codebook = torch.randn(32, d, generator=generator)
    codes = torch.zeros(90, 4, dtype=torch.uint16)
    sums = torch.zeros(32, ops.feedback_sums_columns(d), dtype=torch.int64)

    def call() -> list[Tensor]:
        ops.kmeans_feedback(x, carried, factor, codebook, codes, 2.0**20, sums)
        return [x, carried, codes, sums]

    refuse_each(allocator, [x, carried, codes, sums], call)


def test_arithmetic_of_a_codebook(allocator: FailingAllocator) -> None:
    codebook = torch.randn(16, 2, generator=torch.Generator().manual_seed(4))
    sums = torch.ones(16, 5, dtype=torch.int64)
    codes = torch.zeros(ROWS, COLS // 2, dtype=torch.uint16)
    h = torch.ones(COLS)

    def call() -> list[Tensor]:
        return [
            ops.kmeans_spread(W, h, codebook, codes, 2.0**30),
            ops.kmeans_merge_costs(sums, codebook, 2.0**30, torch.arange(16)),
            ops.kmeans_energy(W, h, 2),
        ]

    refuse_each(allocator, [codebook, sums, codes], call)
