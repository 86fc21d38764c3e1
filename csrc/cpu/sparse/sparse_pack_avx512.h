// Compressing and expanding 16 elements of 32 bits at a time, for the AVX-512 tables. Everything
// here is local to the file that includes it.
#pragma once

#include <immintrin.h>

#include "cpu/sparse/sparse_pack_scalar.h"

namespace nowag::cpu {
namespace {

constexpr int64_t kLanes = 16;

__mmask16 mask_at(const uint8_t* bits, int64_t j) {
    return static_cast<__mmask16>(bits[j / 8] | bits[j / 8 + 1] << 8);
}

int kept_lanes(__mmask16 mask) { return _mm_popcnt_u32(mask); }

__mmask16 first_lanes(int count) { return static_cast<__mmask16>((1u << count) - 1u); }

void gather32(const uint32_t* row, const uint8_t* bits, int64_t cols, uint32_t* values) {
    int64_t j = 0;
    for (; j + kLanes <= cols; j += kLanes) {
        const __mmask16 mask = mask_at(bits, j);
        const __m512i packed = _mm512_maskz_compress_epi32(mask, _mm512_loadu_si512(row + j));
        _mm512_mask_storeu_epi32(values, first_lanes(kept_lanes(mask)), packed);
        values += kept_lanes(mask);
    }
    gather_from(j, row, bits, cols, values);
}

void expand32(const uint32_t* values, const uint8_t* bits, int64_t cols, uint32_t* row) {
    int64_t j = 0;
    for (; j + kLanes <= cols; j += kLanes) {
        const __mmask16 mask = mask_at(bits, j);
        const __m512i wide = _mm512_maskz_expand_epi32(mask, _mm512_loadu_si512(values));
        _mm512_storeu_si512(row + j, wide);
        values += kept_lanes(mask);
    }
    expand_from(j, values, bits, cols, row);
}

}  // namespace
}  // namespace nowag::cpu
