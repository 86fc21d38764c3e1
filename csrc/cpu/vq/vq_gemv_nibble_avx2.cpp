// The nibble kernel of vq_gemv.h for AVX2: codes of 4 bits, tables of 16 integer products.
//
// A position's table fits in two registers of 16 bytes, the low and the high halves of integers of
// 12 bits, out of which one instruction takes 16 bytes. Halves of 4 positions add up in bytes
// before they are put together, 16 positions in 16 bits. 16 instructions do 2 positions of 32 rows,
// whatever d is, and two tiles share the loads of the tables.
//
// Tokens are taken one after another: a token's result does not depend on its company.

#include <immintrin.h>

#include <cstring>

#include "cpu/vq/vq_gemv_nibble_tables.h"

namespace nowag::cpu {
namespace {

constexpr int kPairs = kVqNibbleRun / 2;
// Pairs of positions, one a lane, whose halves add up in bytes.
constexpr int kTogether = 4;
static_assert(kTogether * (kHalfMost + 1) <= 128, "halves add up in bytes");

// sum += bytes, at once: GCC 12 would add up in another order, and keep in memory what it has not
// added yet.
void add_to(__m256i& sum, __m256i bytes) { asm("vpaddb %1, %0, %0" : "+x"(sum) : "x"(bytes)); }

// Sums of the low and the high halves of a tile's even rows, and of its odd ones. A lane has every
// second position.
struct Halves {
    __m256i even_low, even_high, odd_low, odd_high;

    void add(__m256i codes, __m256i low, __m256i high) {
        const __m256i nibble = _mm256_set1_epi8(15);
        const __m256i even = _mm256_and_si256(codes, nibble);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble);
        add_to(even_low, _mm256_shuffle_epi8(low, even));
        add_to(even_high, _mm256_shuffle_epi8(high, even));
        add_to(odd_low, _mm256_shuffle_epi8(low, odd));
        add_to(odd_high, _mm256_shuffle_epi8(high, odd));
    }
};

// 16-bit sums of rows 0, 2, .. 14, of 16, .. 30, of 1, .. 15, of 17, .. 31; a lane has a half of
// the positions.
struct Sums16 {
    __m256i rows[4];

    void add(const Halves& halves) {
        const __m256i factors = _mm256_set1_epi16((1 << kHalfBits) << 8 | 1);
        const auto whole = [&](__m256i pairs) { return _mm256_maddubs_epi16(factors, pairs); };
        const auto into = [&](__m256i& sum, __m256i pairs) {
            sum = _mm256_add_epi16(sum, whole(pairs));
        };
        into(rows[0], _mm256_unpacklo_epi8(halves.even_low, halves.even_high));
        into(rows[1], _mm256_unpackhi_epi8(halves.even_low, halves.even_high));
        into(rows[2], _mm256_unpacklo_epi8(halves.odd_low, halves.odd_high));
        into(rows[3], _mm256_unpackhi_epi8(halves.odd_low, halves.odd_high));
    }
};

// totals [kTiles][4] += unit * the entries of a run, whose codes are `stride` bytes from those of
// the next tile. Fetches those that are `ahead` bytes from them.
template <int kTiles>
void add_run(const uint8_t* codes, int64_t stride, int64_t ahead, const VqNibbleRun& run,
             __m256 (&totals)[kTiles][4]) {
    const __m256i zero = _mm256_setzero_si256();
    Sums16 sums[kTiles];
#pragma GCC unroll 2
    for (int i = 0; i < kTiles; ++i) sums[i] = {{zero, zero, zero, zero}};
    for (int first = 0; first < kPairs; first += kTogether) {
        Halves parts[kTiles];
#pragma GCC unroll 4
        for (int i = 0; i < kTiles; ++i) parts[i] = {zero, zero, zero, zero};
#pragma GCC unroll 4
        for (int q = 0; q < kTogether; ++q, codes += 2 * kPositionBytes) {
            const __m256i low =
                _mm256_load_si256(reinterpret_cast<const __m256i*>(run.low[first + q]));
            const __m256i high =
                _mm256_load_si256(reinterpret_cast<const __m256i*>(run.high[first + q]));
#pragma GCC unroll 2
            for (int i = 0; i < kTiles; ++i) {
                const uint8_t* here = codes + i * stride;
                // A line holds two registers.
                if (q % 2 == 0) {
                    _mm_prefetch(reinterpret_cast<const char*>(here + ahead), _MM_HINT_T1);
                }
                parts[i].add(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(here)), low, high);
            }
        }
#pragma GCC unroll 2
        for (int i = 0; i < kTiles; ++i) sums[i].add(parts[i]);
    }
    const __m256 unit = _mm256_set1_ps(run.unit);
#pragma GCC unroll 2
    for (int i = 0; i < kTiles; ++i) {
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
            const __m128i both = _mm_add_epi16(_mm256_castsi256_si128(sums[i].rows[r]),
                                               _mm256_extracti128_si256(sums[i].rows[r], 1));
            const __m256 values = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(both));
            totals[i][r] = _mm256_fmadd_ps(values, unit, totals[i][r]);
        }
    }
}

// Every second of 16 rows, and the others, to all in order.
void store_rows(__m256 even, __m256 odd, float* out) {
    const __m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
    _mm256_storeu_ps(out, _mm256_permute2f128_ps(low, high, 0x20));
    _mm256_storeu_ps(out + 8, _mm256_permute2f128_ps(low, high, 0x31));
}

template <int kTiles>
void multiply_of(const uint8_t* codes, int64_t stride, int64_t positions, const VqNibbleRun* runs,
                 float* sums) {
    constexpr int64_t kRunBytes = kVqNibbleRun * kPositionBytes;
    __m256 totals[kTiles][4];
    for (auto& tile : totals) {
        for (__m256& total : tile) total = _mm256_setzero_ps();
    }
    int64_t left = positions;
    for (; left >= kVqNibbleRun; left -= kVqNibbleRun, codes += kRunBytes, ++runs) {
        // What comes after a tile's codes are those of the next tiles.
        const bool ends = left * kPositionBytes <= kVqPrefetchBytes;
        const int64_t ahead = kVqPrefetchBytes + (ends ? (kTiles - 1) * stride : 0);
        add_run<kTiles>(codes, stride, ahead, *runs, totals);
    }
    if (left > 0) {
        // What lies past the end has tables of 0, and codes that must not be read.
        alignas(32) uint8_t rest[kTiles * kRunBytes] = {};
        for (int i = 0; i < kTiles; ++i) {
            std::memcpy(rest + i * kRunBytes, codes + i * stride,
                        static_cast<size_t>(left * kPositionBytes));
        }
        add_run<kTiles>(rest, kRunBytes, 0, *runs, totals);
    }
    for (int i = 0; i < kTiles; ++i) {
        store_rows(totals[i][0], totals[i][2], sums + i * kTileRows);
        store_rows(totals[i][1], totals[i][3], sums + i * kTileRows + kTileRows / 2);
    }
}

void multiply(const uint8_t* codes, int64_t stride, int64_t positions, int64_t tiles,
              const VqNibbleRun* runs, float* sums) {
    for (; tiles >= 2; tiles -= 2, codes += 2 * stride, sums += 2 * kTileRows) {
        multiply_of<2>(codes, stride, positions, runs, sums);
    }
    if (tiles == 1) multiply_of<1>(codes, stride, positions, runs, sums);
}

}  // namespace

const VqNibbleTable kVqNibbleAvx2 = {build_tables, multiply};

}  // namespace nowag::cpu
