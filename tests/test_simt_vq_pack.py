"""Packing and dequantising codes on the host SIMT executor (simt_cases.py)."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same_bits
from simt_cases import (
    CODES,
    DTYPES,
    VQ_SHAPES,
    needs_compiler,
    poisoned,
    vq_weight,
)
from simt_host import Driver

from nowag_ext import ops, reference

pytestmark = needs_compiler


@pytest.mark.parametrize("code_bits", range(1, 17))
@pytest.mark.parametrize(("rows", "positions"), [(1, 1), (33, 70)])
def test_pack_and_unpack(driver: Driver, rows: int, positions: int, code_bits: int) -> None:
    generator = torch.Generator().manual_seed(110)
    codes = torch.randint(0, 2**code_bits, (rows, positions), generator=generator).to(torch.uint16)
    packed = poisoned(*ops.packed_shape(rows, positions, 1, code_bits), dtype=torch.uint8)
    assert driver.run("pack_codes", codes, rows, positions, code_bits, packed) == 0
    assert_same_bits(packed, reference.pack_codes(codes, code_bits))
    unpacked = torch.zeros_like(codes)
    assert driver.run("unpack_codes", packed, rows, positions, code_bits, unpacked) == 0
    assert_same_bits(unpacked, codes)


# Beside the shapes of all tests rows of whole pieces of 16 bytes: every d, codes that are and that
# are not whole bytes, a strip of columns and its tail, several strips, that begin and end within a
# position, more tiles than blocks, and codebooks for which shared memory has and has no room.
DEQUANTIZED = [
    (1, 8, 6, 12),
    (200, 88, 1, 3),
    (70, 528, 2, 4),
    (40, 520, 3, 7),
    (200, 1032, 4, 8),
    (70, 1048, 5, 11),
    (300, 1064, 6, 12),
    (70, 1040, 7, 9),
    (70, 1032, 8, 1),
    (33, 96, 1, 16),
    (33, 96, 8, 16),
    (33, 2056, 6, 13),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols", "d", "code_bits"), [*VQ_SHAPES, *DEQUANTIZED])
def test_vq_dequantize(
    driver: Driver, rows: int, cols: int, d: int, code_bits: int, dtype: torch.dtype
) -> None:
    """What lies between rows stays as it was."""
    vq = vq_weight(rows, cols, d, code_bits, seed=120)
    want = reference.vq_dequantize(*vq, dtype)
    apart = cols + (8 if cols % 8 == 0 else 2)
    for begin, end in {(0, rows), (0, min(rows, 64)), (rows // 64 * 32, rows)}:
        out = poisoned(end - begin, apart, dtype=dtype)
        arguments = [*vq, rows, cols, d, code_bits, begin, end, out, CODES[dtype], apart]
        assert driver.run("vq_dequantize", *arguments, seed=begin % 3) == 0
        assert_same_bits(out[:, :cols].contiguous(), want[begin:end])
        assert out[:, cols:].isnan().all()


def test_vq_dequantize_with_a_codebook_that_needs_much_shared_memory(roomy_driver: Driver) -> None:
    vq = vq_weight(33, 2056, 6, 13, seed=125)
    out = poisoned(33, 2056, dtype=torch.bfloat16)
    arguments = [*vq, 33, 2056, 6, 13, 0, 33, out, CODES[torch.bfloat16], 2056]
    assert roomy_driver.run("vq_dequantize", *arguments) == 0
    assert_same_bits(out, reference.vq_dequantize(*vq, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("apart", [0, 1, 4])
def test_vq_dequantize_of_rows_that_are_not_aligned(
    driver: Driver, apart: int, dtype: torch.dtype
) -> None:
    vq = vq_weight(40, 104, 6, 12, seed=120)
    want = reference.vq_dequantize(*vq, dtype)
    out = poisoned(40, 104 + apart, dtype=dtype)
    arguments = [*vq, 40, 104, 6, 12, 0, 40, out, CODES[dtype], 104 + apart]
    assert driver.run("vq_dequantize", *arguments) == 0
    assert_same_bits(out[:, :104].contiguous(), want)
    assert out[:, 104:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "cols", "d", "code_bits"),
    [*VQ_SHAPES, (33, 300, 1, 5), (34, 261, 2, 16), (64, 70, 5, 13), (9, 50, 7, 11)],
)
def test_vq_gather(
    driver: Driver, rows: int, cols: int, d: int, code_bits: int, dtype: torch.dtype
) -> None:
    """An index that no row has is taken for the nearest that one has."""
    vq = vq_weight(rows, cols, d, code_bits, seed=130)
    given = [rows - 1, 0, rows // 2, rows - 1, -1, rows, rows + 31, -(2**63), 2**63 - 1]
    indices = torch.tensor(given)
    out = poisoned(len(given), cols, dtype=dtype)
    arguments = [*vq, rows, cols, d, code_bits, indices, len(given), out, CODES[dtype]]
    assert driver.run("vq_gather", *arguments) == 0
    assert_same_bits(out, reference.vq_gather(indices.clamp(0, rows - 1), *vq, dtype))


def test_vq_gather_of_no_rows(driver: Driver) -> None:
    vq, out = vq_weight(33, 20, 3, 9, seed=130), poisoned(1, 20)
    for count, status in ((0, True), (-1, False), (2**31, False)):
        arguments = [*vq, 33, 20, 3, 9, torch.zeros(1, dtype=torch.int64), count, out, 0]
        assert (driver.run("vq_gather", *arguments) == 0) == status
    assert out.isnan().all()
