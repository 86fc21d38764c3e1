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
    int64_t token_stride;      // tokens, padded to whole vectors
    const uint8_t* codes_end;  // of all tiles: nothing may be read from here on
    float* sums;               // out: [tokens, 32], sum_p of entry . input
};

// Decode in 16-bit integers, the codebook in one unit: an entry is padded with zeros to so many.
constexpr int kVqIntegerLanes = 8;
// Positions whose inputs have one unit.
constexpr int64_t kVqIntegerRun = 16;

// A run of two tokens, or of one alone.
struct alignas(64) VqIntegerRun {
    int16_t inputs[kVqIntegerRun][2][kVqIntegerLanes];  // zeros in all padding
    float units[2];                                     // times the codebook's
};

// One tile of 32 rows times all tokens.
struct VqIntegerTile {
    const uint8_t* codes;  // [positions, 4 * code_bits]
    const int16_t* entries;
    const VqIntegerRun* runs;  // [tokens / 2, positions / kVqIntegerRun], both rounded up
    int64_t positions;
    int code_bits;
    int tokens;
    const uint8_t* codes_end;  // of all tiles: nothing may be read from here on
    float* sums;               // out: [tokens, 32], sum_p of entry . input
};

struct VqIntegerTable {
    // float16 [entries, d] -> integers [entries, kVqIntegerLanes]; their unit
    float (*arrange_codebook)(const uint16_t* codebook, int64_t entries, int d, int16_t* out);
    // Scaled inputs [positions, d] and the codebook's unit -> the first or second token of a run
    // for each 16 positions
    void (*arrange_inputs)(const float* inputs, int d, int64_t positions, float codebook_unit,
                           int token, VqIntegerRun* runs);
    void (*multiply_tile)(const VqIntegerTile& tile);
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
    const VqIntegerTable* integers;  // for d > 4; null where they are not faster
};

extern const VqDecodeTable kVqDecodeScalar, kVqDecodeAvx2, kVqDecodeAvx512;

// How far ahead of the codes in use lookup fetches the next ones, into the second-level cache: no
// core has room for so many misses of the first, and what its own prefetcher fetches ends with each
// page.
constexpr int64_t kVqPrefetchBytes = 2048;

// Lookup, for codes of 4 bits.
constexpr int kVqNibbleEntries = 16;
// Positions that have one unit.
constexpr int64_t kVqNibbleRun = 16;

// The tables of a run of positions for one token, in integers: two positions a register.
struct alignas(64) VqNibbleRun {
    int8_t low[kVqNibbleRun / 2][2 * kVqNibbleEntries];
    int8_t high[kVqNibbleRun / 2][2 * kVqNibbleEntries];
    float unit;
};

struct VqNibbleTable {
    // A codebook [d, 16] and a token's scaled inputs [positions, d] -> its tables, a run for each
    // 16 positions
    void (*build_tables)(const float* codebook, const float* inputs, int d, int64_t positions,
                         VqNibbleRun* runs);
    // The codes of some tiles, `stride` bytes apart -> sums [32 * tiles], sum_p T_p[code]
    void (*multiply)(const uint8_t* codes, int64_t stride, int64_t positions, int64_t tiles,
                     const VqNibbleRun* runs, float* sums);
};

extern const VqNibbleTable kVqNibbleAvx2, kVqNibbleAvx512;

// Lookup, for codes of 8 bits.
constexpr int64_t kVqLookupEntries = 256;

// At most kVqLookupGroup positions of some tiles, times one token or VqLookupTable's `together`.
struct VqLookupGroup {
    const float* codebook;  // what arrange_codebook wrote, and
    const float* largest;
    const float* inputs;  // [positions, d, tokens], 64-byte aligned if tokens > 1
    int d;
    int tokens;
    int64_t positions;
    const uint8_t* codes;  // of the first tile's first position
    int64_t tile_stride;   // bytes from a tile's codes to the next one's
    int64_t tiles;
    float* sums;  // out: [32 * tiles, tokens], sum_p T_p[code]
};

struct VqLookupTable {
    // So many tokens are looked up at once where there is more than one.
    int together;
    // float16 [256, d] -> float [d, 256] in the order add_group wants; largest[j] = max_k |c_kj|
    void (*arrange_codebook)(const uint16_t* codebook, int d, float* arranged, float* largest);
    void (*add_group)(const VqLookupGroup& group);
};

extern const VqLookupTable kVqLookupAvx2, kVqLookupAvx512Vbmi;

}  // namespace nowag::cpu
