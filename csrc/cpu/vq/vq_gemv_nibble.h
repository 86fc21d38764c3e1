// The nibble kernels of vq_gemv.h: codes of 4 bits, tables of 16 integer products.
//
// A position's table fits in two registers of 16 bytes, the low and the high halves of integers of
// 12 bits, out of which one instruction takes 16 bytes, and of wider registers as many times more.
// Halves of some positions add up in bytes before they are put together, 16 positions in 16 bits.
// What an instruction set does for itself is to put them together.
//
// Two tiles share the loads of the tables. Tokens are taken one after another: a token's result
// does not depend on its company.
//
// In an anonymous namespace: each instruction set compiles its own copy.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "cpu/vq/vq_gemv_table.h"
#include "nowag/format.h"

namespace nowag::cpu {
namespace {

constexpr int kPositionBytes = 16;  // codes of a tile
// An integer is low + 64 high, both from -32 to 31.
constexpr int kHalfBits = 6, kHalfMost = 31;
constexpr int kLargest = (kHalfMost << kHalfBits) + kHalfMost;
static_assert(kVqNibbleRun * kLargest <= 32767, "a run adds up in 16 bits");
// Smallest unit: products this small have no need of more precision, and 1 / unit stays finite.
constexpr float kSmallestUnit = 0x1p-100f;

// 16 products of a position in units of 1: their low halves, then their high ones.
__m256i halves(__m256 first, __m256 second) {
    constexpr int kInOrder = _MM_SHUFFLE(3, 1, 2, 0);  // packing is by lane
    const __m256i integers = _mm256_permute4x64_epi64(
        _mm256_packs_epi32(_mm256_cvtps_epi32(first), _mm256_cvtps_epi32(second)), kInOrder);
    const __m256i round = _mm256_set1_epi16(1 << (kHalfBits - 1));
    const __m256i high = _mm256_srai_epi16(_mm256_add_epi16(integers, round), kHalfBits);
    const __m256i low = _mm256_sub_epi16(integers, _mm256_slli_epi16(high, kHalfBits));
    return _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), kInOrder);
}

void build_run(const float* codebook, const float* inputs, int d, int64_t count, VqNibbleRun& run) {
    const __m256 sign = _mm256_set1_ps(-0.0f), most = _mm256_set1_ps(__FLT_MAX__);
    alignas(32) float products[kVqNibbleRun][kVqNibbleEntries];
    __m256 largest = _mm256_setzero_ps();
    __m256 finite = _mm256_cmp_ps(largest, most, _CMP_LE_OQ);
    for (int64_t p = 0; p < count; ++p) {
        for (int half = 0; half < kVqNibbleEntries; half += 8) {
            __m256 sum = _mm256_setzero_ps();
            for (int j = 0; j < d; ++j) {
                const __m256 entries = _mm256_loadu_ps(codebook + j * kVqNibbleEntries + half);
                sum = _mm256_fmadd_ps(entries, _mm256_broadcast_ss(inputs + p * d + j), sum);
            }
            const __m256 size = _mm256_andnot_ps(sign, sum);
            finite = _mm256_and_ps(finite, _mm256_cmp_ps(size, most, _CMP_LE_OQ));
            largest = _mm256_max_ps(largest, size);
            _mm256_store_ps(products[p] + half, sum);
        }
    }
    alignas(32) float sizes[8];
    _mm256_store_ps(sizes, largest);
    float unit = kSmallestUnit;
    for (const float size : sizes) unit = size / kLargest > unit ? size / kLargest : unit;
    // Integers cannot say that a product is not finite: the unit does, to all rows.
    run.unit = _mm256_movemask_ps(finite) == 0xff ? unit : __builtin_nanf("");

    const __m256 scale = _mm256_set1_ps(1 / unit);
    for (int64_t p = 0; p < kVqNibbleRun; ++p) {
        __m256i both = _mm256_setzero_si256();
        if (p < count) {
            both = halves(_mm256_mul_ps(_mm256_load_ps(products[p]), scale),
                          _mm256_mul_ps(_mm256_load_ps(products[p] + 8), scale));
        }
        const int64_t pair = p / 2, lane = p % 2 * kVqNibbleEntries;
        _mm_store_si128(reinterpret_cast<__m128i*>(run.low[pair] + lane),
                        _mm256_castsi256_si128(both));
        _mm_store_si128(reinterpret_cast<__m128i*>(run.high[pair] + lane),
                        _mm256_extracti128_si256(both, 1));
    }
}

void build_tables(const float* codebook, const float* inputs, int d, int64_t positions,
                  VqNibbleRun* runs) {
    for (int64_t first = 0; first < positions; first += kVqNibbleRun, ++runs) {
        const int64_t left = positions - first;
        build_run(codebook, inputs + first * d, d, left < kVqNibbleRun ? left : kVqNibbleRun,
                  *runs);
    }
}

#ifdef __AVX512BW__
using Bytes = __m512i;
inline Bytes load_bytes(const void* from) { return _mm512_loadu_si512(from); }
inline Bytes low_nibbles(Bytes codes) { return _mm512_and_si512(codes, _mm512_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes codes) { return low_nibbles(_mm512_srli_epi16(codes, 4)); }
inline Bytes chosen(Bytes table, Bytes which) { return _mm512_shuffle_epi8(table, which); }
#else
using Bytes = __m256i;
inline Bytes load_bytes(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
inline Bytes low_nibbles(Bytes codes) { return _mm256_and_si256(codes, _mm256_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes codes) { return low_nibbles(_mm256_srli_epi16(codes, 4)); }
inline Bytes chosen(Bytes table, Bytes which) { return _mm256_shuffle_epi8(table, which); }
#endif
constexpr int kRegisterBytes = sizeof(Bytes);
// Registers of codes whose halves add up in bytes.
constexpr int kTogether = 4;
static_assert(kTogether * (kHalfMost + 1) <= 128, "halves add up in bytes");

// sum += bytes, at once: GCC 12 would add up in another order, and keep in memory what it has not
// added yet.
void add_to(Bytes& sum, Bytes bytes) { asm("vpaddb %1, %0, %0" : "+v"(sum) : "v"(bytes)); }

// Sums of the low and the high halves of a tile's even rows, and of its odd ones. A lane of 16
// bytes has every second or fourth position.
struct Halves {
    Bytes even_low = Bytes{}, even_high = Bytes{}, odd_low = Bytes{}, odd_high = Bytes{};

    void add(Bytes codes, Bytes low, Bytes high) {
        const Bytes even = low_nibbles(codes), odd = high_nibbles(codes);
        add_to(even_low, chosen(low, even));
        add_to(even_high, chosen(high, even));
        add_to(odd_low, chosen(low, odd));
        add_to(odd_high, chosen(high, odd));
    }
};

// Where a run's codes are: of the first tile, of the next ones `stride` bytes on each, and, `ahead`
// bytes from them, those to be fetched.
struct RunCodes {
    const uint8_t* first;
    int64_t stride;
    int64_t ahead;
};

// parts[tile] += the halves of kTogether registers of codes, `begin` bytes from the run's first.
template <int kTiles>
void add_halves(const RunCodes& codes, int begin, const VqNibbleRun& run, Halves (&parts)[kTiles]) {
    constexpr int kLine = 64;
#pragma GCC unroll 4
    for (int q = 0; q < kTogether; ++q) {
        const int at = begin + q * kRegisterBytes;
        const Bytes low = load_bytes(run.low[0] + at), high = load_bytes(run.high[0] + at);
#pragma GCC unroll 2
        for (int i = 0; i < kTiles; ++i) {
            const uint8_t* here = codes.first + i * codes.stride + at;
            if (q * kRegisterBytes % kLine == 0) {
                _mm_prefetch(reinterpret_cast<const char*>(here + codes.ahead), _MM_HINT_T1);
            }
            parts[i].add(load_bytes(here), low, high);
        }
    }
}

// Totals: what an instruction set adds up of the rows of so many tiles.
template <class Totals, int kTiles>
void multiply_tiles(const uint8_t* codes, int64_t stride, int64_t positions,
                    const VqNibbleRun* runs, float* sums) {
    constexpr int64_t kRunBytes = kVqNibbleRun * kPositionBytes;
    Totals totals;
    int64_t left = positions;
    for (; left >= kVqNibbleRun; left -= kVqNibbleRun, codes += kRunBytes, ++runs) {
        // What comes after a tile's codes are those of the next tiles.
        const bool ends = left * kPositionBytes <= kVqPrefetchBytes;
        totals.add({codes, stride, kVqPrefetchBytes + (ends ? (kTiles - 1) * stride : 0)}, *runs);
    }
    if (left > 0) {
        // What lies past the end has tables of 0, and codes that must not be read.
        alignas(64) uint8_t rest[kTiles * kRunBytes] = {};
        for (int i = 0; i < kTiles; ++i) {
            std::memcpy(rest + i * kRunBytes, codes + i * stride,
                        static_cast<size_t>(left * kPositionBytes));
        }
        totals.add({rest, kRunBytes, 0}, *runs);
    }
    totals.store(sums);
}

template <template <int> class Totals>
void multiply(const uint8_t* codes, int64_t stride, int64_t positions, int64_t tiles,
              const VqNibbleRun* runs, float* sums) {
    for (; tiles >= 2; tiles -= 2, codes += 2 * stride, sums += 2 * kTileRows) {
        multiply_tiles<Totals<2>, 2>(codes, stride, positions, runs, sums);
    }
    if (tiles == 1) multiply_tiles<Totals<1>, 1>(codes, stride, positions, runs, sums);
}

}  // namespace
}  // namespace nowag::cpu
