"""Shapes and limits of the packed form (csrc/include/nowag/format.h)."""

from __future__ import annotations

from nowag_ext import _cpu

FORMAT_VERSION: int = _cpu.format_version
TILE_ROWS: int = _cpu.tile_rows
BITMAP_ALIGN = 64
MAX_SUBVECTOR = 8
MAX_CODE_BITS = 16
MAX_GROUP = 32  # M of N:M


def code_positions(in_features: int, d: int) -> int:
    """Number of sub-vectors a row is cut into, the last one padded."""
    return -(-in_features // d)


def packed_shape(out_features: int, in_features: int, d: int, code_bits: int) -> tuple[int, ...]:
    """Shape of the packed codes (csrc/include/nowag/format.h)."""
    return (-(-out_features // TILE_ROWS), code_positions(in_features, d), 4 * code_bits)


def bitmap_shape(out_features: int, in_features: int) -> tuple[int, int]:
    """Shape of the bitmap of kept weights (csrc/include/nowag/format.h)."""
    return (out_features, BITMAP_ALIGN // 8 * -(-in_features // BITMAP_ALIGN))
