// The tables of vq_gemv.h's nibble kernels: 16 products of every position, in integers of 12 bits,
// which are kept as halves that fit into bytes.
//
// In an anonymous namespace: each instruction set compiles its own copy.
#pragma once

#include <immintrin.h>

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

}  // namespace
}  // namespace nowag::cpu
