// The canonical packed form of a compressed linear layer: the only state there is, in memory, in
// state_dict() and on disk. Everything that reads or writes codes, bitmaps or values follows it.
//
// A layer's weight W is [out_features, in_features] = [N, M].
//
// Vector quantised ("vq")
//   d           sub-vector length, 1..8
//   code_bits   bits of one code = d * bits, 1..16;   K = 2^code_bits codebook entries
//   P           code positions a row = ceil(M / d); the last sub-vector is padded with weight 0
//   codes       uint8 [ceil(N / 32), P, 4 * code_bits]
//               Rows are grouped in tiles of 32. At each position a tile holds its 32 codes as one
//               little-endian bit stream: the code of row 32*t + r at position p occupies the bits
//               [r * code_bits, (r + 1) * code_bits) of codes[t, p, :], lowest bit first in each
//               byte. Rows past N in the last tile have code 0.
//   codebook    float16 [K, d]
//   row_norms   float16 [N]
//   col_norms   float16 [M]
//   W[i, j]   = row_norms[i] * codebook[code(i, j / d)][j % d] * col_norms[j]
//
//   Why tiles of 32 rows: a kernel that looks products up wants many rows' codes for one position
//   side by side; 32 codes are a whole number of 32-bit words for every code_bits, so no padding
//   along the row is ever needed, and a layer can be sliced at any multiple of 32 outputs or d
//   inputs by slicing the tensor. 32 divides the shards of Llama's layers (11008 / 8 = 43 * 32).
//   Since K is exactly 2^code_bits, every bit pattern is a legal code: once the shapes are checked
//   no stored code can point outside the codebook.
//
// Sparse ("sparse"; unstructured and N:M alike)
//   bitmap      uint8 [N, 8 * ceil(M / 64)]; bit j % 8 of byte j / 8 of a row is set where weight
//               (i, j) is kept; bits at and past M are 0
//   values      W's dtype [nnz]: the kept weights, row by row, ascending j
//   row_offsets int32 [N + 1]: row i's values are values[row_offsets[i] : row_offsets[i + 1]]
//
//   row_offsets must equal the running popcount of the bitmap; loading checks it. Kernels are told
//   nnz besides and read no value past it, whatever bitmap and row_offsets say: on the CPU they
//   refuse (invalid_argument) row_offsets that do not ascend from 0 to nnz at most, on a GPU, whose
//   answer nobody waits for, they take them for the nearest that are allowed.
#pragma once

#include <cstdint>

namespace nowag {

constexpr int kFormatVersion = 2;
constexpr int kTileRows = 32;
constexpr int kMaxSubvector = 8;
constexpr int kMaxCodeBits = 16;
constexpr int kBitmapAlign = 64;  // inputs covered by one padded unit of a bitmap row

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t code_positions(int64_t cols, int d) { return ceil_div(cols, d); }
static inline int64_t row_tiles(int64_t rows) { return ceil_div(rows, kTileRows); }
static inline int64_t tile_bytes(int code_bits) { return 4 * code_bits; }
static inline int64_t bitmap_row_bytes(int64_t cols) { return 8 * ceil_div(cols, kBitmapAlign); }
static inline bool valid_vq(int d, int code_bits) {
    return d >= 1 && d <= kMaxSubvector && code_bits >= 1 && code_bits <= kMaxCodeBits;
}

// The code at bit `bit` of a little-endian bit stream, one byte at a time so as never to read past
// the code's last byte.
static inline uint32_t read_code(const uint8_t* stream, int64_t bit, int code_bits) {
    const uint8_t* byte = stream + bit / 8;
    const int shift = static_cast<int>(bit % 8);
    uint32_t window = byte[0];
    if (shift + code_bits > 8) window |= static_cast<uint32_t>(byte[1]) << 8;
    if (shift + code_bits > 16) window |= static_cast<uint32_t>(byte[2]) << 16;
    return (window >> shift) & ((1u << code_bits) - 1u);
}

}  // namespace nowag
