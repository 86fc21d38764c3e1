// The nibble kernel of vq_gemv.h for AVX2: codes of 4 bits and d = 1, a byte of codes a row pair.
//
// A codebook of 16 numbers fits in two registers, the low and the high bytes of 16-bit integers,
// and one instruction takes 32 bytes out of one of them. Codes of two positions are interleaved
// before, so that a row's two entries lie side by side for the instruction that multiplies both
// with their inputs and adds the products up. 47 instructions do 4 positions of 32 rows.
//
// Tokens are taken one after another: a token's result does not depend on its company.

#include <immintrin.h>

#include "cpu/vq/vq_gemv_table.h"
#include "nowag/dtype.h"
#include "nowag/format.h"

namespace nowag::cpu {
namespace {

constexpr int kEntries = 16;
constexpr int kPositionBytes = 16;  // codes of a tile
constexpr int kTogether = 4;        // positions
// Positions that inputs have one unit for, and whose sums are 32-bit integers: both magnitudes are
// at most kLargest, and 2 products of 16 groups of positions of at most kLargest^2 each fit.
constexpr int kRun = 64;
constexpr float kLargest = 8191.0f;
static_assert(2.0 * kRun / kTogether * kLargest * kLargest < 2147483647.0);
// Smallest unit: inputs this small have no need of more precision, and 1 / unit stays finite.
constexpr float kSmallestUnit = 0x1p-100f;

// What arrange_codebook writes.
struct Entries {
    int8_t low[kEntries], high[kEntries];  // bytes
};

// What arrange_inputs writes for each run of positions: integers of 4 positions, 8 times 2 of them
// a lane, in the order that multiply_run wants.
struct Run {
    __m256i inputs[kRun / kTogether];
    float unit;
};

// There is room for 8 floats a position, in whole runs.
static_assert(kRun == kVqIntegerPositions && sizeof(Run) <= kRun * 8 * sizeof(float));

float magnitude(float value) { return value < 0 ? -value : value; }

float unit_for(float largest) {
    const float wanted = largest / kLargest;
    return wanted < kSmallestUnit ? kSmallestUnit : wanted;  // NaN stays
}

int16_t to_integer(float value) { return static_cast<int16_t>(_mm_cvtss_si32(_mm_set_ss(value))); }

// The largest magnitude, NaN if a value is not finite.
float largest_of(const float* values, int64_t count) {
    float largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        const float size = magnitude(values[i]);
        if (!(size <= __FLT_MAX__)) return __builtin_nanf("");
        largest = size > largest ? size : largest;
    }
    return largest;
}

float arrange_codebook(const uint16_t* codebook, int64_t, int, void* out) {
    float values[kEntries];
    for (int k = 0; k < kEntries; ++k) values[k] = float16_to_float(codebook[k]);
    const float unit = unit_for(largest_of(values, kEntries));
    Entries& entries = *static_cast<Entries*>(out);
    for (int k = 0; k < kEntries; ++k) {
        const int16_t integer = to_integer(values[k] / unit);
        entries.low[k] = static_cast<int8_t>(integer & 0xff);
        entries.high[k] = static_cast<int8_t>(integer >> 8);
    }
    return unit;
}

void arrange_inputs(const float* inputs, int, int64_t positions, float codebook_unit, float* out) {
    Run* run = reinterpret_cast<Run*>(out);
    for (int64_t first = 0; first < positions; first += kRun, ++run) {
        const int64_t left = positions - first, count = left < kRun ? left : kRun;
        const float unit = unit_for(largest_of(inputs + first, count));
        const float scale = 1 / unit;
        int16_t integers[kRun] = {};
        for (int64_t i = 0; i < count; ++i) integers[i] = to_integer(inputs[first + i] * scale);
        for (int g = 0; g < kRun / kTogether; ++g) {
            const int16_t* x = integers + g * kTogether;
            const auto pair = [](int16_t a, int16_t b) {
                return static_cast<int>(static_cast<uint16_t>(a) |
                                        static_cast<uint32_t>(static_cast<uint16_t>(b)) << 16);
            };
            const int low = pair(x[0], x[2]), high = pair(x[1], x[3]);
            run->inputs[g] = _mm256_setr_epi32(low, low, low, low, high, high, high, high);
        }
        run->unit = unit * codebook_unit;
    }
}

// Adds the products of 4 positions of 8 rows to their sums, the first 4 rows' to `a`, the others'
// to `b`. `codes` has those of two positions a lane, interleaved.
void add_rows(__m256i codes, __m256i low, __m256i high, __m256i inputs, __m256i& a, __m256i& b) {
    const __m256i lows = _mm256_shuffle_epi8(low, codes), highs = _mm256_shuffle_epi8(high, codes);
    a = _mm256_add_epi32(a, _mm256_madd_epi16(_mm256_unpacklo_epi8(lows, highs), inputs));
    b = _mm256_add_epi32(b, _mm256_madd_epi16(_mm256_unpackhi_epi8(lows, highs), inputs));
}

struct Tables {
    __m256i low, high;
};

// totals [8] += unit * the products of `groups` times 4 positions, whose codes are at `codes`.
void add_run(const uint8_t* codes, const Run& run, int64_t groups, const Tables& tables,
             __m256 (&totals)[8]) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i s0 = _mm256_setzero_si256(), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0,
            s7 = s0;
    for (int64_t g = 0; g < groups; ++g, codes += kTogether * kPositionBytes) {
        // Positions 0 and 1, 2 and 3: a lane has one of the first and one of the second pair.
        const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
        const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes) + 1);
        const __m256i inputs = run.inputs[g];
        const __m256i even0 = _mm256_and_si256(first, nibble);
        const __m256i even1 = _mm256_and_si256(second, nibble);
        add_rows(_mm256_unpacklo_epi8(even0, even1), tables.low, tables.high, inputs, s0, s1);
        add_rows(_mm256_unpackhi_epi8(even0, even1), tables.low, tables.high, inputs, s2, s3);
        const __m256i odd0 = _mm256_and_si256(_mm256_srli_epi16(first, 4), nibble);
        const __m256i odd1 = _mm256_and_si256(_mm256_srli_epi16(second, 4), nibble);
        add_rows(_mm256_unpacklo_epi8(odd0, odd1), tables.low, tables.high, inputs, s4, s5);
        add_rows(_mm256_unpackhi_epi8(odd0, odd1), tables.low, tables.high, inputs, s6, s7);
    }
    const __m256 unit = _mm256_set1_ps(run.unit);
    const __m256i sums[8] = {s0, s1, s2, s3, s4, s5, s6, s7};
    for (int i = 0; i < 8; ++i) {
        totals[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[i]), unit, totals[i]);
    }
}

// The sums of a tile for one token.
void multiply(const uint8_t* codes, const Run* runs, int64_t positions, const Tables& tables,
              float* sums) {
    __m256 totals[8];
    for (__m256& total : totals) total = _mm256_setzero_ps();
    int64_t first = 0;
    for (; first + kRun <= positions; first += kRun, ++runs) {
        add_run(codes + first * kPositionBytes, *runs, kRun / kTogether, tables, totals);
    }
    if (first < positions) {
        // The inputs past the end are 0, their codes must not be read.
        alignas(32) uint8_t rest[kRun * kPositionBytes] = {};
        const int64_t left = positions - first;
        __builtin_memcpy(rest, codes + first * kPositionBytes,
                         static_cast<size_t>(left * kPositionBytes));
        add_run(rest, *runs, ceil_div(left, kTogether), tables, totals);
    }
    for (int i = 0; i < 8; ++i) {
        alignas(16) float own[4];
        _mm_store_ps(own, _mm_add_ps(_mm256_castps256_ps128(totals[i]),
                                     _mm256_extractf128_ps(totals[i], 1)));
        // Of the even rows 0-6, 8-14, 16-22, 24-30, then of the odd ones.
        for (int r = 0; r < 4; ++r) sums[i % 4 * 8 + 2 * r + i / 4] = own[r];
    }
}

void multiply_tile(const VqDecodeTile& tile) {
    const Entries& entries = *static_cast<const Entries*>(tile.entries);
    const auto twice = [](const int8_t* bytes) {
        return _mm256_broadcastsi128_si256(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    };
    const Tables tables{twice(entries.low), twice(entries.high)};
    for (int t = 0; t < tile.tokens; ++t) {
        const float* inputs = tile.inputs + t * tile.token_stride;
        multiply(tile.codes, reinterpret_cast<const Run*>(inputs), tile.positions, tables,
                 tile.sums + t * kTileRows);
    }
}

}  // namespace

const VqIntegerTable kVqNibbleAvx2 = {arrange_codebook, arrange_inputs, multiply_tile};

}  // namespace nowag::cpu
