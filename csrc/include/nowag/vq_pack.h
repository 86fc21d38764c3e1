// Between k-means codes and the packed VQ form of format.h; and back to dense values. All exact.
#pragma once

#include <cstdint>

#include "nowag/dtype.h"
#include "nowag/status.h"

namespace nowag::cpu {

// codes uint16 [rows, positions], row-major <-> packed uint8
// [ceil(rows / 32), positions, 4 * code_bits]. pack refuses (invalid_argument) a code >=
// 2^code_bits and then leaves `packed` unspecified.
Status pack_codes(const uint16_t* codes, int64_t rows, int64_t positions, int code_bits,
                  uint8_t* packed, int threads);
Status unpack_codes(const uint8_t* packed, int64_t rows, int64_t positions, int code_bits,
                    uint16_t* codes, int threads);

// Rows [row_begin, row_end) of a VQ weight as dense values of `dtype`, out
// [row_end - row_begin, cols] with out_stride elements between rows. row_begin is a multiple of 32.
//   out[i, j] = (row_norms[i] * codebook[code][j % d]) * col_norms[j]   in float32, then rounded.
Status vq_dequantize(const uint8_t* packed, const uint16_t* codebook, const uint16_t* row_norms,
                     const uint16_t* col_norms, int64_t rows, int64_t cols, int d, int code_bits,
                     int64_t row_begin, int64_t row_end, void* out, DType dtype, int64_t out_stride,
                     int threads);

}  // namespace nowag::cpu
