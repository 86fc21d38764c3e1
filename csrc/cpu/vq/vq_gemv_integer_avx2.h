// The integer kernel of vq_gemv.h for AVX2: one token, d of 5 to 8.
//
// Decode with entries and inputs of 16-bit integers, 8 of them to a vector of 128 bits: one
// instruction multiplies an entry from memory with a position's inputs and adds neighbours up, two
// more add the four sums, times the position's unit, to the row's. Floats, 8 of which are twice as
// wide, have to be made of float16 first. (On a Zen 1, whose vectors are 128 bits wide, that takes
// 4.1 cycles a code, this 2.3.)
//
// In an anonymous namespace: each instruction set compiles its own copy.
#pragma once

#include <immintrin.h>

#include "cpu/vq/vq_expand_avx2.h"
#include "cpu/vq/vq_gemv_decode.h"
#include "cpu/vq/vq_gemv_table.h"

namespace nowag::cpu {
namespace {

// Both magnitudes at most this: the sum of two products fits in 32 bits.
constexpr float kLargestInteger = 32767.0f;
// Smallest unit: inputs this small have no need of more precision, and 1 / unit stays finite.
constexpr float kSmallestUnit = 0x1p-100f;

// What decode's loops want of a vector. A position's inputs are 8 integers and their unit four
// times over, in the room of 8 floats; a row's sums are 4 floats in such a room.
struct Integers8 {
    struct Input {
        __m128i integers;
        __m128 unit;
    };
    using Entry = __m128i;
    using Sum = __m128;
    static constexpr int kFloats = 8;
    static Input input(const float* p) {
        return {_mm_load_si128(reinterpret_cast<const __m128i*>(p)), _mm_load_ps(p + 4)};
    }
    static Entry entry(const void* p) { return _mm_load_si128(static_cast<const __m128i*>(p)); }
    static Sum load(const float* p) { return _mm_load_ps(p); }
    static void store(float* p, Sum v) { _mm_store_ps(p, v); }
    static Sum fma(Entry entry, Input x, Sum sum) {
        const __m128 products = _mm_cvtepi32_ps(_mm_madd_epi16(entry, x.integers));
        return _mm_fmadd_ps(products, x.unit, sum);
    }
};

float unit_for(float largest) {
    const float wanted = largest / kLargestInteger;
    return wanted < kSmallestUnit ? kSmallestUnit : wanted;  // NaN stays
}

// 8 floats to the nearest integers.
__m128i to_integers(__m256 values) {
    const __m256i wide = _mm256_cvtps_epi32(values);
    return _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
}

float arrange_integer_codebook(const uint16_t* codebook, int64_t entries, int d, void* out) {
    // Magnitudes of float16 are ordered as their bits are.
    const __m256i magnitude = _mm256_set1_epi16(0x7fff);
    __m256i most = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + 16 <= entries * d; i += 16) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codebook + i));
        most = _mm256_max_epu16(most, _mm256_and_si256(bits, magnitude));
    }
    alignas(32) uint16_t each[16];
    _mm256_store_si256(reinterpret_cast<__m256i*>(each), most);
    uint16_t largest = 0;
    for (const uint16_t one : each) largest = one > largest ? one : largest;
    for (; i < entries * d; ++i) {
        const uint16_t one = codebook[i] & 0x7fff;
        largest = one > largest ? one : largest;
    }

    const float unit = unit_for(float16_to_float(largest));
    const __m256 scale = _mm256_set1_ps(1.0f / unit);
    const __m128i lane = _mm_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7);
    const __m128i used = _mm_cmpgt_epi16(_mm_set1_epi16(static_cast<int16_t>(d)), lane);
    int64_t k = 0;
    const auto write = [&](const uint16_t* entry) {
        const __m256 values = load_eight(entry, 0, DType::float16);
        const __m128i integers = to_integers(_mm256_mul_ps(values, scale));
        _mm_store_si128(static_cast<__m128i*>(out) + k, _mm_and_si128(integers, used));
    };
    for (; k * d + 8 <= entries * d; ++k) write(codebook + k * d);
    // 8 numbers would reach past the codebook's end.
    for (; k < entries; ++k) {
        uint16_t entry[8] = {};
        for (int j = 0; j < d; ++j) entry[j] = codebook[k * d + j];
        write(entry);
    }
    return unit;
}

void arrange_integer_inputs(const float* inputs, int d, int64_t positions, float codebook_unit,
                            float* out) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    for (int64_t p = 0; p < positions; ++p, out += Integers8::kFloats) {
        alignas(32) float own[8] = {};
        for (int j = 0; j < d; ++j) own[j] = inputs[p * d + j];
        const __m256 values = _mm256_load_ps(own), sizes = _mm256_andnot_ps(sign, values);
        __m128 most = _mm_max_ps(_mm256_castps256_ps128(sizes), _mm256_extractf128_ps(sizes, 1));
        most = _mm_max_ps(most, _mm_movehl_ps(most, most));
        most = _mm_max_ss(most, _mm_movehdup_ps(most));
        float unit = unit_for(_mm_cvtss_f32(most));
        const __m256 scaled = _mm256_mul_ps(values, _mm256_set1_ps(1.0f / unit));
        _mm_store_si128(reinterpret_cast<__m128i*>(out), to_integers(scaled));
        // Integers cannot say that an input is not finite: the unit does, to all rows.
        const __m256 finite = _mm256_cmp_ps(sizes, _mm256_set1_ps(__FLT_MAX__), _CMP_LE_OQ);
        if (_mm256_movemask_ps(finite) != 0xff) unit = __builtin_nanf("");
        _mm_store_ps(out + 4, _mm_set1_ps(unit * codebook_unit));
    }
}

void multiply_integer_tile(const VqDecodeTile& tile) {
    VqDecodeTile one = tile;
    one.token_stride = 1;  // to the next position
    multiply_tile_as<Integers8, 8, 2>(one);
}

}  // namespace
}  // namespace nowag::cpu
