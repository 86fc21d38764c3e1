// What each instruction set provides for vq_pack.cpp.
#pragma once

#include <cstdint>

#include "nowag/dtype.h"

namespace nowag::cpu {

// The rows of one tile of codes, to be written as dense values. A codebook entry is padded with
// zeros to `lanes` floats (4 or 8); col_norms are padded with zeros to positions * d + 8.
struct VqDenseTile {
    const uint8_t* codes;    // [positions, 4 * code_bits]
    const float* entries;    // [K, lanes], 64-byte aligned
    const float* row_norms;  // [height]
    const float* col_norms;
    int64_t positions;
    int64_t cols;
    int code_bits;
    int d;
    int lanes;
    int height;                // rows wanted, 1 to 32
    const uint8_t* codes_end;  // of all tiles: nothing may be read from here on
    void* out;                 // [height, cols], rows out_stride elements apart
    int64_t out_stride;
    DType dtype;
};

struct VqPackTable {
    // float16 [count] -> float [count]
    void (*widen)(const uint16_t* halves, int64_t count, float* out);
    // float16 [entries, d] -> float [entries, lanes], zeros in the padding
    void (*expand_codebook)(const uint16_t* codebook, int64_t entries, int d, int lanes,
                            float* out);
    void (*dequantize_tile)(const VqDenseTile& tile);
};

extern const VqPackTable kVqPackScalar, kVqPackAvx2, kVqPackAvx512;

}  // namespace nowag::cpu
