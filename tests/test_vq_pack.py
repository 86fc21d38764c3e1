"""vq_pack.h against its oracle: packed codes and dequantised weights, bit for bit."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from vq_cases import random_codes, random_vq

from nowag_ext import _cpu, ops, reference
from nowag_ext.ops.checks import check_words
from nowag_ext.ops.vq_pack import dequantize_vq_rows

pytestmark = pytest.mark.kernel

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# out_features, in_features, d, code_bits: tails of a tile, of a sub-vector; odd code sizes.
LAYERS = [
    (1, 1, 1, 1),
    (1, 33, 6, 12),
    (31, 65, 4, 8),
    (32, 64, 8, 16),
    (33, 50, 3, 7),
    (70, 1, 1, 1),  # the codes of all tiles together are less than one vector
    (65, 7, 7, 5),
    (64, 129, 5, 10),
    (96, 100, 2, 6),
    (200, 514, 6, 12),
    (257, 1026, 4, 8),
]


@pytest.mark.parametrize("code_bits", range(1, 17))
def test_pack_matches_oracle_and_inverts(code_bits: int, threads: int) -> None:
    for rows, positions in [(1, 1), (31, 3), (32, 8), (33, 17), (100, 64)]:
        codes = random_codes(rows, positions, code_bits)
        packed = ops.pack_codes(codes, code_bits)
        assert_same_bits(packed, reference.pack_codes(codes, code_bits))
        assert_same_bits(ops.unpack_codes(packed, rows), codes)
        assert_same_bits(reference.unpack_codes(packed, rows), codes)


@given(
    rows=st.integers(1, 70),
    positions=st.integers(1, 70),
    code_bits=st.integers(1, 16),
    seed=st.integers(0, 2**31),
)
def test_pack_inverts(rows: int, positions: int, code_bits: int, seed: int) -> None:
    codes = random_codes(rows, positions, code_bits, seed)
    packed = ops.pack_codes(codes, code_bits)
    assert_same_bits(ops.unpack_codes(packed, rows), codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_dequantize_matches_oracle(layer: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    vq = random_vq(*layer)
    assert_same_bits(ops.vq_dequantize(*vq, dtype), reference.vq_dequantize(*vq, dtype))


@pytest.mark.parametrize("d", range(1, 9))
def test_dequantize_at_every_sub_vector_length(d: int) -> None:
    for cols in range(1, 4 * d + 18):
        vq = random_vq(40, cols, d, 4, seed=cols)
        for dtype in DTYPES:
            assert_same_bits(ops.vq_dequantize(*vq, dtype), reference.vq_dequantize(*vq, dtype))


def test_dequantize_of_special_values() -> None:
    codes, codebook, row_norms, col_norms = random_vq(64, 48, 4, 6)
    codebook.view(-1)[:6] = torch.tensor([65504.0, 6e-8, -6e-8, 6.1e-5, 0.0, -0.0]).half()
    row_norms[:3] = torch.tensor([6e-8, 65504.0, 0.0]).half()
    for dtype in DTYPES:
        vq = (codes, codebook, row_norms, col_norms)
        assert_same_bits(ops.vq_dequantize(*vq, dtype), reference.vq_dequantize(*vq, dtype))


def test_rows_of_a_tile_go_where_they_are_told() -> None:
    vq = random_vq(200, 70, 6, 12)
    dense = reference.vq_dequantize(*vq, torch.float32)
    for begin, end in [(0, 200), (32, 64), (64, 101), (160, 200), (192, 193)]:
        out = torch.full((end - begin + 2, 70), torch.nan)
        dequantize_vq_rows(vq, (200, 70, 6, 12), begin, end, out)
        assert_same_bits(out[: end - begin], dense[begin:end])
        assert out[end - begin :].isnan().all()


def test_rows_can_be_spaced_apart() -> None:
    vq = random_vq(40, 22, 4, 8)
    wide = torch.full((40, 31), torch.nan)
    dequantize_vq_rows(vq, (40, 22, 4, 8), 0, 40, wide[:, :22])
    assert_same_bits(wide[:, :22], reference.vq_dequantize(*vq, torch.float32))
    assert wide[:, 22:].isnan().all()


def some_rows(rows: int, count: int, seed: int = 0) -> torch.Tensor:
    """Unsorted indices, the first and the last row among them, some more than once."""
    draw = torch.Generator().manual_seed(seed)
    some = torch.randint(0, rows, (count,), generator=draw)
    return torch.cat([some, torch.tensor([rows - 1, 0, rows - 1]), some[:2]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_gather_matches_oracle_and_dequantized_rows(
    layer: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    vq, indices = random_vq(*layer), some_rows(layer[0], 7)
    rows = ops.vq_gather(indices, *vq, dtype)
    assert_same_bits(rows, reference.vq_gather(indices, *vq, dtype))
    assert_same_bits(rows, ops.vq_dequantize(*vq, dtype)[indices])


@pytest.mark.parametrize("code_bits", range(1, 17))
def test_gather_at_every_code_size(code_bits: int) -> None:
    for d, cols in [(1, 9), (2, 33), (3, 20), (5, 41), (8, 50)]:
        vq = random_vq(67, cols, d, code_bits, seed=code_bits)
        rows = ops.vq_gather(torch.arange(67), *vq, torch.float32)
        assert_same_bits(rows, reference.vq_dequantize(*vq, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", range(1, 9))
def test_gather_of_long_rows(d: int, dtype: torch.dtype) -> None:
    """Around the lengths at which a row is cut."""
    for cols in (1007, 1022, 1023, 1024, 1025, 1032, 2049, 3071):
        vq, indices = random_vq(33, cols, d, 4, seed=cols), torch.tensor([32, 0, 32, 5])
        rows = ops.vq_gather(indices, *vq, dtype)
        assert_same_bits(rows, reference.vq_gather(indices, *vq, dtype))


@pytest.mark.parametrize(("cols", "count"), [(20000, 1), (2500, 90), (7, 300)])
def test_gather_by_several_threads(cols: int, count: int, threads: int) -> None:
    vq, indices = random_vq(70, cols, 3, 7), some_rows(70, count)
    rows = ops.vq_gather(indices, *vq, torch.float32)
    assert_same_bits(rows, reference.vq_gather(indices, *vq, torch.float32))


def test_gather_of_special_values() -> None:
    codes, codebook, row_norms, col_norms = random_vq(64, 48, 4, 2)
    codebook.view(-1)[:8] = torch.tensor(
        [65504.0, 6e-8, -6e-8, 6.1e-5, 0.0, -0.0, torch.inf, torch.nan]
    ).half()
    row_norms[:3] = torch.tensor([6e-8, 65504.0, 0.0]).half()
    col_norms[:2] = torch.tensor([65504.0, 6e-8]).half()
    for dtype in DTYPES:
        vq = (codes, codebook, row_norms, col_norms)
        rows = ops.vq_gather(torch.arange(64), *vq, dtype)
        torch.testing.assert_close(
            rows, ops.vq_dequantize(*vq, dtype), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 3), (3, 1, 2), (0,), (2, 0)])
def test_gather_takes_indices_of_any_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    vq = random_vq(40, 22, 4, 8)
    indices = torch.randint(0, 40, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    rows = ops.vq_gather(indices, *vq, torch.bfloat16)
    assert_same_bits(rows, reference.vq_gather(indices, *vq, torch.bfloat16))
    assert rows.shape == (*shape, 22)
    assert rows.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_gather_takes_indices_that_are_not_contiguous(dtype: torch.dtype) -> None:
    vq, square = random_vq(40, 22, 4, 8), torch.arange(36, dtype=dtype).view(6, 6)
    for indices in (square.t(), square[:, 1::2], square[3, 0].expand(4), square[:, 5]):
        want = reference.vq_gather(indices, *vq, torch.float32)
        assert_same_bits(ops.vq_gather(indices, *vq, torch.float32), want)


@pytest.mark.parametrize("index", [-1, -(2**63), 40, 63, 64, 2**40, 2**63 - 1])
def test_gather_refuses_an_index_that_no_row_has(index: int) -> None:
    """40 rows are padded to 64 in the packed form."""
    vq = random_vq(40, 22, 4, 8)
    indices = torch.cat([torch.arange(30), torch.tensor([index]), torch.arange(3)])
    with pytest.raises(
        IndexError, match=f"indices must be from 0 to 39 in a weight of 40 rows, not {index}\\."
    ):
        ops.vq_gather(indices.view(2, 17), *vq, torch.float32)
    out = torch.full((34, 22), torch.nan)
    with pytest.raises(ValueError, match="vq_gather: an argument is outside the contract"):
        _cpu.vq_gather(
            *(tensor.data_ptr() for tensor in vq), 40, 22, 4, 8, indices.data_ptr(), 34,
            out.data_ptr(), _cpu.float32, 1,
        )  # fmt: skip
    assert out.isnan().all()


def test_gather_refuses_wrong_operands() -> None:
    codes, *rest = random_vq(40, 22, 4, 8)
    indices = torch.tensor([3, 1])
    for wrong in (torch.tensor([1.0]), torch.tensor([True]), torch.tensor([1], dtype=torch.int16)):
        with pytest.raises(
            TypeError, match=rf"indices must be torch\.int64 or torch\.int32, not {wrong.dtype}"
        ):
            ops.vq_gather(wrong, codes, *rest, torch.float32)
    with pytest.raises(TypeError, match=r"dtype must be torch\.float32, .*, not torch\.float64"):
        ops.vq_gather(indices, codes, *rest, torch.float64)
    with pytest.raises(ValueError, match=r"codes must have shape \(2, 6, 32\), not \(1, 6, 32\)"):
        ops.vq_gather(indices, codes[:1], *rest, torch.float32)
    with pytest.raises(ValueError, match="indices must be on cpu, not on meta"):
        ops.vq_gather(indices.to("meta"), codes, *rest, torch.float32)


def test_gather_refuses_operands_that_begin_anywhere() -> None:
    def moved(tensor: torch.Tensor) -> torch.Tensor:
        odd = torch.frombuffer(
            bytearray(tensor.nbytes + 1), dtype=tensor.dtype, count=tensor.numel(), offset=1
        )
        return odd.view(tensor.shape).copy_(tensor)

    operands = [torch.tensor([3, 1]), *random_vq(40, 22, 4, 8)]
    for index, size in ((0, 8), (2, 2), (3, 2), (4, 2)):
        odd = [moved(o) if i == index else o for i, o in enumerate(operands)]
        with pytest.raises(ValueError, match=f"must begin at a multiple of the {size} bytes"):
            ops.vq_gather(*odd, torch.float32)
    codes_anywhere = [moved(o) if i == 1 else o for i, o in enumerate(operands)]
    want = ops.vq_gather(*operands, torch.float32)
    assert_same_bits(ops.vq_gather(*codes_anywhere, torch.float32), want)


@pytest.mark.parametrize("rows", [1, 33])
def test_refuses_codes_that_do_not_fit(rows: int) -> None:
    codes = random_codes(rows, 9, 6)
    codes[rows - 1, 4] = 64
    with pytest.raises(ValueError, match="pack_codes: an argument is outside the contract"):
        ops.pack_codes(codes, 6)


def test_refuses_wrong_shapes_and_dtypes() -> None:
    codes, codebook, row_norms, col_norms = random_vq(40, 22, 4, 8)
    with pytest.raises(TypeError, match=r"codes must be torch\.uint16, not torch\.int32"):
        ops.pack_codes(torch.zeros(3, 3, dtype=torch.int32), 8)
    with pytest.raises(ValueError, match="code_bits must be from 1 to 16, not 17"):
        ops.pack_codes(random_codes(3, 3, 8), 17)
    with pytest.raises(ValueError, match=r"must have shape \(3, 6, 32\), not \(2, 6, 32\)"):
        ops.unpack_codes(codes, 65)
    with pytest.raises(ValueError, match=r"codebook must have shape \(256, 4\), not \(255, 4\)"):
        ops.vq_dequantize(codes, codebook[:255], row_norms, col_norms, torch.float32)
    with pytest.raises(ValueError, match=r"codes must have shape \(2, 6, 32\), not \(2, 5, 32\)"):
        ops.vq_dequantize(codes[:, :5], codebook, row_norms, col_norms, torch.float32)
    with pytest.raises(TypeError, match=r"codebook must be torch\.float16, not torch\.float32"):
        ops.vq_dequantize(codes, codebook.float(), row_norms, col_norms, torch.float32)
    with pytest.raises(ValueError, match=r"codes.* must be contiguous"):
        ops.vq_dequantize(codes.mT.contiguous().mT, codebook, row_norms, col_norms, torch.float32)


@pytest.mark.parametrize(("code_bits", "multiple"), [(1, 4), (8, 16), (9, 4), (12, 16), (14, 8)])
def test_refuses_addresses_that_a_device_cannot_read(code_bits: int, multiple: int) -> None:
    row_bytes = 4 * code_bits
    for tile in range(5):  # slices of whole tiles are fine
        check_words("codes", 0x7F00_0000_0200 + tile * row_bytes, row_bytes)
    for offset in (1, 2, multiple // 2, multiple + 1):
        with pytest.raises(ValueError, match=f"codes must start at a multiple of {multiple} bytes"):
            check_words("codes", 0x7F00_0000_0200 + offset, row_bytes)


def test_opcheck() -> None:
    vq = random_vq(40, 22, 4, 8)
    torch.library.opcheck(ops.pack_codes, (random_codes(40, 6, 8), 8))
    torch.library.opcheck(ops.unpack_codes, (vq[0], 40))
    torch.library.opcheck(ops.vq_dequantize, (*vq, torch.bfloat16))
    for indices in (torch.tensor([[3, 39, 3]]), torch.tensor(5, dtype=torch.int32)):
        torch.library.opcheck(ops.vq_gather, (indices, *vq, torch.bfloat16))
