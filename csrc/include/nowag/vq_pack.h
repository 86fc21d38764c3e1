// Between k-means codes and the packed VQ form of format.h; and back to dense values. All exact.
#pragma once

#include <cstdint>

#include "nowag/dtype.h"
#include "nowag/operation.h"

namespace nowag {

// codes uint16 [rows, positions], row-major <-> packed uint8
// [ceil(rows / 32), positions, 4 * code_bits]. pack refuses (invalid_argument) a code >=
// 2^code_bits and then leaves `packed` unspecified; on a GPU, whose answer nobody waits for, it
// keeps the code's low bits.
NOWAG_DECLARE(pack_codes, const uint16_t* codes, int64_t rows, int64_t positions, int code_bits,
              uint8_t* packed);
NOWAG_DECLARE(unpack_codes, const uint8_t* packed, int64_t rows, int64_t positions, int code_bits,
              uint16_t* codes);

// Rows [row_begin, row_end) of a VQ weight as dense values of `dtype`, out
// [row_end - row_begin, cols] with out_stride elements between rows. row_begin is a multiple of 32.
//   out[i, j] = (row_norms[i] * codebook[code][j % d]) * col_norms[j]   in float32, then rounded.
// On a GPU the codebook is aligned to 4 bytes.
NOWAG_DECLARE(vq_dequantize, const uint8_t* packed, const uint16_t* codebook,
              const uint16_t* row_norms, const uint16_t* col_norms, int64_t rows, int64_t cols,
              int d, int code_bits, int64_t row_begin, int64_t row_end, void* out, DType dtype,
              int64_t out_stride);

// Rows `indices` [count] of a VQ weight, in any order and as often as they come, as dense values of
// `dtype`, out [count, cols]; count >= 0, below 2^31 on a GPU.
//   out[n, j] = the value that vq_dequantize writes for (indices[n], j), bit for bit
// The CPU refuses (invalid_argument) an index outside [0, rows) before anything is written; a GPU,
// whose answer nobody waits for, takes the nearest that is allowed.
NOWAG_DECLARE(vq_gather, const uint8_t* packed, const uint16_t* codebook, const uint16_t* row_norms,
              const uint16_t* col_norms, int64_t rows, int64_t cols, int d, int code_bits,
              const int64_t* indices, int64_t count, void* out, DType dtype);

}  // namespace nowag
