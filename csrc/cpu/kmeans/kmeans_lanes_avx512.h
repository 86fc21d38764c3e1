// Sixteen floats at a time, for kmeans_kernel.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace nowag::cpu {
namespace {

struct Lanes {
    static constexpr int kWidth = 16;
    using Float = __m512;
    using Int = __m512i;
    using Mask = __mmask16;

    static Float load(const float* from) { return _mm512_loadu_ps(from); }
    static void store(float* to, Float a) { _mm512_storeu_ps(to, a); }
    static Float all(float a) { return _mm512_set1_ps(a); }
    static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
    static Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
    static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
    static Float div(Float a, Float b) { return _mm512_div_ps(a, b); }
    static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
    static Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
    static Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
    static Float sqrt(Float a) { return _mm512_sqrt_ps(a); }
    static float lowest(Float a) { return _mm512_reduce_min_ps(a); }

    static Mask less(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
    static Mask equal(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
    static Mask not_greater(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
    // In assembly, because GCC 12 may spill a mask as 16 bits and read it back as 32.
    static uint32_t bits(Mask a) {
        uint32_t lanes;
        asm("kmovw %1, %0" : "=r"(lanes) : "k"(a));
        return lanes;
    }
    static Float select(Mask a, Float yes, Float no) { return _mm512_mask_blend_ps(a, no, yes); }
    static Int select(Mask a, Int yes, Int no) { return _mm512_mask_blend_epi32(a, no, yes); }

    static Int all_int(int32_t a) { return _mm512_set1_epi32(a); }
    static Int load_int(const int32_t* from) { return _mm512_loadu_si512(from); }
    static Int load_codes(const uint16_t* from) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    static void store_codes(uint16_t* to, Int a) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(a));
    }
    static void store_int(int32_t* to, Int a) { _mm512_storeu_si512(to, a); }
    static Int nearest_int(Float a) { return _mm512_cvtps_epi32(a); }
    static Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
    static Float gather(const float* from, Int index) {
        return _mm512_i32gather_ps(index, from, sizeof(float));
    }

    static Mask at_most(Int a, Int b) { return _mm512_cmple_epi32_mask(a, b); }

    // Pairs of 16-bit numbers in an Int.
    static Int pair(Int low, Int high) { return _mm512_or_si512(low, _mm512_slli_epi32(high, 16)); }
    static Int pair_sub(Int a, Int b) { return _mm512_sub_epi16(a, b); }
    // How far x is outside [low, high], all of them unsigned.
    static Int pair_outside(Int x, Int low, Int high) {
        return _mm512_or_si512(_mm512_subs_epu16(low, x), _mm512_subs_epu16(x, high));
    }
    static Int pair_squares(Int a) { return _mm512_madd_epi16(a, a); }

    // out[j], lane i = from[rows[i] * stride + j] for four j.
    static void columns(const float* from, int64_t stride, const int32_t* rows, Float (&out)[4]) {
        const auto row = [&](int i) { return _mm_loadu_ps(from + rows[i] * stride); };
        Float part[4];
        for (int i = 0; i < 4; ++i) {
            part[i] = _mm512_insertf32x4(_mm512_castps128_ps512(row(i)), row(4 + i), 1);
            part[i] = _mm512_insertf32x4(part[i], row(8 + i), 2);
            part[i] = _mm512_insertf32x4(part[i], row(12 + i), 3);
        }
        const Float low[2] = {_mm512_unpacklo_ps(part[0], part[1]),
                              _mm512_unpacklo_ps(part[2], part[3])};
        const Float high[2] = {_mm512_unpackhi_ps(part[0], part[1]),
                               _mm512_unpackhi_ps(part[2], part[3])};
        out[0] = _mm512_shuffle_ps(low[0], low[1], 0x44);
        out[1] = _mm512_shuffle_ps(low[0], low[1], 0xee);
        out[2] = _mm512_shuffle_ps(high[0], high[1], 0x44);
        out[3] = _mm512_shuffle_ps(high[0], high[1], 0xee);
    }

    // Appends first + lane to a list for every lane of `chosen`; the list has room for kWidth more.
    static int64_t append(int32_t* list, int64_t count, Mask chosen, int32_t first) {
        const Int lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const Int values = _mm512_add_epi32(lane, _mm512_set1_epi32(first));
        _mm512_storeu_si512(list + count, _mm512_maskz_compress_epi32(chosen, values));
        return count + __builtin_popcount(bits(chosen));
    }
};

}  // namespace
}  // namespace nowag::cpu
