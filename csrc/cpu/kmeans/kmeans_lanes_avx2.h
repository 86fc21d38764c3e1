// Eight floats at a time, for kmeans_kernel.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace nowag::cpu {
namespace {

// The numbers of the bits that are set in a byte, ascending.
struct ChosenLanes {
    uint8_t value[256][8];
};
constexpr ChosenLanes chosen_lanes() {
    ChosenLanes table{};
    for (int byte = 0; byte < 256; ++byte) {
        int count = 0;
        for (int lane = 0; lane < 8; ++lane) {
            if ((byte >> lane & 1) != 0) table.value[byte][count++] = static_cast<uint8_t>(lane);
        }
    }
    return table;
}
constexpr ChosenLanes kChosenLanes = chosen_lanes();

struct Lanes {
    static constexpr int kWidth = 8;
    using Float = __m256;
    using Int = __m256i;
    using Mask = __m256;

    static Float load(const float* from) { return _mm256_loadu_ps(from); }
    static void store(float* to, Float a) { _mm256_storeu_ps(to, a); }
    static Float all(float a) { return _mm256_set1_ps(a); }
    static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
    static Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
    static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
    static Float div(Float a, Float b) { return _mm256_div_ps(a, b); }
    static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
    static Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
    static Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
    static Float sqrt(Float a) { return _mm256_sqrt_ps(a); }
    static float lowest(Float a) {
        __m128 low = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        low = _mm_min_ps(low, _mm_movehl_ps(low, low));
        return _mm_cvtss_f32(_mm_min_ss(low, _mm_movehdup_ps(low)));
    }

    static Mask less(Float a, Float b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
    static Mask equal(Float a, Float b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
    static Mask not_greater(Float a, Float b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
    static uint32_t bits(Mask a) { return static_cast<uint32_t>(_mm256_movemask_ps(a)); }
    static Float select(Mask a, Float yes, Float no) { return _mm256_blendv_ps(no, yes, a); }
    static Int select(Mask a, Int yes, Int no) {
        return _mm256_blendv_epi8(no, yes, _mm256_castps_si256(a));
    }

    static Int all_int(int32_t a) { return _mm256_set1_epi32(a); }
    static Int load_int(const int32_t* from) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    }
    static Int load_codes(const uint16_t* from) {
        return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    static void store_codes(uint16_t* to, Int a) {
        const __m256i packed = _mm256_packus_epi32(a, a);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                         _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
    }
    static void store_int(int32_t* to, Int a) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), a);
    }
    static Int nearest_int(Float a) { return _mm256_cvtps_epi32(a); }
    static Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
    static Float gather(const float* from, Int index) {
        return _mm256_i32gather_ps(from, index, sizeof(float));
    }

    static Mask at_most(Int a, Int b) {
        return _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_cmpgt_epi32(a, b), all_int(-1)));
    }

    // Pairs of 16-bit numbers in an Int.
    static Int pair(Int low, Int high) { return _mm256_or_si256(low, _mm256_slli_epi32(high, 16)); }
    static Int pair_sub(Int a, Int b) { return _mm256_sub_epi16(a, b); }
    // How far x is outside [low, high], all of them unsigned.
    static Int pair_outside(Int x, Int low, Int high) {
        return _mm256_or_si256(_mm256_subs_epu16(low, x), _mm256_subs_epu16(x, high));
    }
    static Int pair_squares(Int a) { return _mm256_madd_epi16(a, a); }

    // out[j], lane i = from[rows[i] * stride + j] for four j.
    static void columns(const float* from, int64_t stride, const int32_t* rows, Float (&out)[4]) {
        const auto row = [&](int i) { return _mm_loadu_ps(from + rows[i] * stride); };
        Float part[4];
        for (int i = 0; i < 4; ++i) part[i] = _mm256_set_m128(row(4 + i), row(i));
        const Float low[2] = {_mm256_unpacklo_ps(part[0], part[1]),
                              _mm256_unpacklo_ps(part[2], part[3])};
        const Float high[2] = {_mm256_unpackhi_ps(part[0], part[1]),
                               _mm256_unpackhi_ps(part[2], part[3])};
        out[0] = _mm256_shuffle_ps(low[0], low[1], 0x44);
        out[1] = _mm256_shuffle_ps(low[0], low[1], 0xee);
        out[2] = _mm256_shuffle_ps(high[0], high[1], 0x44);
        out[3] = _mm256_shuffle_ps(high[0], high[1], 0xee);
    }

    // Appends first + lane to a list for every lane of `chosen`; the list has room for kWidth more.
    static int64_t append(int32_t* list, int64_t count, Mask chosen, int32_t first) {
        const uint32_t lanes = bits(chosen);
        const __m128i packed =
            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kChosenLanes.value[lanes]));
        store_int(list + count, add(_mm256_cvtepu8_epi32(packed), all_int(first)));
        return count + __builtin_popcount(lanes);
    }
};

}  // namespace
}  // namespace nowag::cpu
