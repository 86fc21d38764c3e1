// What each instruction set provides for vq_gemv.cpp.
#pragma once

#include <cstdint>

#include "nowag/dtype.h"
#include "nowag/vq_gemv.h"

namespace nowag::cpu {

// One tile of 32 rows times all tokens. A codebook entry is padded with zeros to `lanes` numbers (4
// or 8), and so is each token's share of a position's inputs.
struct VqDecodeTile {
    const uint8_t* codes;  // [positions, 4 * code_bits]
    const void* entries;   // what arrange_codebook wrote
    const float* inputs;   // [positions, token_stride, lanes], 64-byte aligned
    int64_t positions;
    int code_bits;
    int lanes;
    int tokens;
    int token_stride;          // tokens, padded to whole vectors
    const uint8_t* codes_end;  // of all tiles: nothing may be read from here on
    float* sums;               // out: [tokens, 32], sum_p of entry . input
};

struct VqDecodeTable {
    // out[j] = x[j] * col_norms[j]
    void (*scale_inputs)(const void* x, DType dtype, const uint16_t* col_norms, int64_t cols,
                         float* out);
    // float16 [entries, d] -> [entries, lanes], floats or float16 as the kernel prefers, in room
    // for floats
    void (*arrange_codebook)(const uint16_t* codebook, int64_t entries, int d, int lanes,
                             void* out);
    void (*multiply_tile)(const VqDecodeTile& tile);
    // y[i] = sums[i] * row_norms[i] + bias[i], rounded to dtype; bias may be null
    void (*finish)(const float* sums, const uint16_t* row_norms, const void* bias, DType dtype,
                   int64_t rows, void* y);
};

extern const VqDecodeTable kVqDecodeScalar, kVqDecodeAvx2, kVqDecodeAvx512;

// Lookup, for codes of 8 bits: a table is 256 low bytes, then 256 high bytes, of 16-bit products.
constexpr int64_t kVqLookupEntries = 256;
constexpr int64_t kVqLookupTableBytes = 512;

// The positions of a group by the size of their products, each class with a unit of its own: the
// few positions of a model's outlier channels must not coarsen all others. order: the positions of
// class 0, then those of class 1; class 0 may be empty.
struct VqLookupClasses {
    int32_t order[kVqLookupGroup];
    int64_t count[2];
    float unit[2];
};

struct VqLookupTable {
    // float16 [256, d] -> float [d, 256] in the order build() wants; largest[j] = max_k |c_kj|
    void (*arrange_codebook)(const uint16_t* codebook, int d, float* arranged, float* largest);
    // Divides `positions` <= kVqLookupGroup positions whose scaled inputs are [positions, d].
    void (*divide)(const float* largest, const float* inputs, int d, int64_t positions,
                   VqLookupClasses* out);
    // Tables of the positions order[0, count), in multiples of the unit.
    void (*build)(const float* arranged, const float* inputs, int d, const int32_t* order,
                  int64_t count, float unit, uint8_t* tables);
    // sums[r] += unit * sum over p = order[0, count) of table_p[code(r, p)] for the rows of `tiles`
    // tiles, whose codes start tile_stride bytes apart.
    void (*add_tiles)(const uint8_t* tables, float unit, const int32_t* order, int64_t count,
                      const uint8_t* codes, int64_t tile_stride, int64_t tiles, float* sums);
};

extern const VqLookupTable kVqLookupAvx512Vbmi;

}  // namespace nowag::cpu
