// Codebooks, norms and inputs to floats and results from floats, 8 elements at a time. In an
// anonymous namespace: each instruction set compiles its own copy.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "nowag/dtype.h"

namespace nowag::cpu {
namespace {

__m256 load_eight(const void* data, int64_t index, DType dtype) {
    if (dtype == DType::float32) return _mm256_loadu_ps(static_cast<const float*>(data) + index);
    const __m128i halves = _mm_loadu_si128(
        reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(data) + index));
    if (dtype == DType::float16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

// 8 floats to bfloat16 in the low half of each lane: to nearest even, NaN stays NaN.
__m256i to_bfloat16(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i top = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i quiet = _mm256_or_si256(top, _mm256_set1_epi32(0x40));
    const __m256 nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
    return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan));
}

// Writes the first 4 or all 8 of `value` to elements [index, ...) of out.
template <int kCount>
void store(void* out, int64_t index, DType dtype, __m256 value) {
    if (dtype == DType::float32) {
        float* to = static_cast<float*>(out) + index;
        if constexpr (kCount == 8) return _mm256_storeu_ps(to, value);
        return _mm_storeu_ps(to, _mm256_castps256_ps128(value));
    }
    __m128i halves;
    if (dtype == DType::float16) {
        halves = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
    } else {
        const __m256i lanes = to_bfloat16(value);
        halves =
            _mm_packus_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
    }
    __m128i* to = reinterpret_cast<__m128i*>(static_cast<uint16_t*>(out) + index);
    if constexpr (kCount == 8) return _mm_storeu_si128(to, halves);
    _mm_storel_epi64(to, halves);
}

// float16 [count] -> float [count]
[[maybe_unused]] void widen(const uint16_t* halves, int64_t count, float* out) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        _mm256_storeu_ps(out + i, load_eight(halves, i, DType::float16));
    }
    for (; i < count; ++i) out[i] = float16_to_float(halves[i]);
}

// float16 [entries, d] -> float [entries, lanes], zeros in the padding
void expand_codebook(const uint16_t* codebook, int64_t entries, int d, int lanes, float* out) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256 used = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(d), lane));
    int64_t k = 0;
    // 8 halves are read and 8 floats written for an entry: not for the last few.
    for (; k * d + 8 <= entries * d && (k * lanes) + 8 <= entries * lanes; ++k) {
        const __m256 entry = load_eight(codebook, k * d, DType::float16);
        _mm256_storeu_ps(out + k * lanes, _mm256_and_ps(entry, used));
    }
    for (; k < entries; ++k) {
        for (int j = 0; j < lanes; ++j) {
            out[k * lanes + j] = j < d ? float16_to_float(codebook[k * d + j]) : 0.0f;
        }
    }
}

}  // namespace
}  // namespace nowag::cpu
