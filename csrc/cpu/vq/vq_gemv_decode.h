// The decode kernel of vq_gemv.h for AVX2 and, where it is compiled for it, AVX-512.
//
// A row's sum is kept in `lanes` partial sums, one a coordinate of the sub-vector, so that a code
// costs one load of its entry and one fma a vector of inputs. A vector holds the inputs of one
// token or, with the entry broadcast to its parts, of several: lane by lane the arithmetic is the
// same, so a token's result does not depend on its company.
//
// Entries of 8 lanes stay in float16 until they are used: a codebook of 4096 is then 64 KiB, of
// which the first-level cache holds twice as much, and fetching entries from beyond it is what
// bounds this kernel. Entries of 4 lanes are floats: a codebook of 256 is in that cache anyway.
//
// In an anonymous namespace: each instruction set compiles its own copy.
#pragma once

#include <immintrin.h>

#include "cpu/vq/vq_expand_avx2.h"
#include "cpu/vq/vq_gemv_table.h"
#include "cpu/vq/vq_unpack_avx2.h"
#include "nowag/format.h"
#include "nowag/vq_gemv.h"

namespace nowag::cpu {
namespace {

// Positions unpacked at a time: their 8 KiB of offsets stay in L1 beside the sums.
constexpr int64_t kDecodeBlock = 64;

#ifdef __AVX512F__
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

struct Vector4 {
    using Input = __m128;
    using Entry = __m128;
    using Sum = __m128;
    static constexpr int kFloats = 4;
    static Input input(const float* p) { return _mm_load_ps(p); }
    static Entry entry(const void* p) { return _mm_load_ps(static_cast<const float*>(p)); }
    static Sum load(const float* p) { return _mm_load_ps(p); }
    static void store(float* p, Sum v) { _mm_store_ps(p, v); }
    static Sum fma(Entry a, Input b, Sum c) { return _mm_fmadd_ps(a, b, c); }
};

template <int kLanes>
struct Vector8 {
    using Input = __m256;
    using Entry = __m256;
    using Sum = __m256;
    static constexpr int kFloats = 8;
    static Input input(const float* p) { return _mm256_load_ps(p); }
    static Sum load(const float* p) { return _mm256_load_ps(p); }
    static Entry entry(const void* p) {
        const __m128i* quarter = static_cast<const __m128i*>(p);
        if constexpr (kLanes == 8) return _mm256_cvtph_ps(_mm_load_si128(quarter));
        return _mm256_broadcast_ps(static_cast<const __m128*>(p));
    }
    static void store(float* p, Sum v) { _mm256_store_ps(p, v); }
    static Sum fma(Entry a, Input b, Sum c) { return _mm256_fmadd_ps(a, b, c); }
};

#ifdef __AVX512F__
template <int kLanes>
struct Vector16 {
    using Input = __m512;
    using Entry = __m512;
    using Sum = __m512;
    static constexpr int kFloats = 16;
    static Input input(const float* p) { return _mm512_load_ps(p); }
    static Sum load(const float* p) { return _mm512_load_ps(p); }
    static Entry entry(const void* p) {
        const __m128i quarter = _mm_load_si128(static_cast<const __m128i*>(p));
        if constexpr (kLanes == 8) return _mm512_cvtph_ps(_mm256_broadcastsi128_si256(quarter));
        return _mm512_castsi512_ps(_mm512_broadcast_i32x4(quarter));
    }
    static void store(float* p, Sum v) { _mm512_store_ps(p, v); }
    static Sum fma(Entry a, Input b, Sum c) { return _mm512_fmadd_ps(a, b, c); }
};
#endif

// Adds `count` positions to the sums of kRows rows and kVectors vectors of inputs. `offsets` are
// those of the first of the rows, in bytes into the entries. Fetches ahead_step bytes from `ahead`
// on with each position: spread out, so that they do not hold up the entries' cache misses.
template <class V, int kRows, int kVectors>
void add_rows(const uint32_t* offsets, int64_t count, const void* entries, const float* inputs,
              int64_t input_stride, float* sums, int64_t row_stride, const uint8_t* ahead,
              int64_t ahead_step) {
    const char* base = static_cast<const char*>(entries);
    typename V::Sum acc[kRows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
            acc[r][v] = V::load(sums + r * row_stride + v * V::kFloats);
        }
    }
    for (int64_t p = 0; p < count; ++p) {
        _mm_prefetch(reinterpret_cast<const char*>(ahead + p * ahead_step), _MM_HINT_T0);
        typename V::Input x[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v)
            x[v] = V::input(inputs + p * input_stride + v * V::kFloats);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
            const typename V::Entry entry = V::entry(base + offsets[p * kTileRows + r]);
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) acc[r][v] = V::fma(entry, x[v], acc[r][v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
            V::store(sums + r * row_stride + v * V::kFloats, acc[r][v]);
        }
    }
}

float add_lanes(const float* sums, int lanes) {
    __m128 four = _mm_load_ps(sums);
    if (lanes == 8) four = _mm_add_ps(four, _mm_load_ps(sums + 4));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

template <int value>
struct Constant {
    static constexpr int kValue = value;
};

// V: the vector of inputs; kPair: how many of them share one pass over the entries.
template <class V, int kLanes, int kPair>
void multiply_tile_as(const VqDecodeTile& tile) {
    constexpr int kScaleBits = 4;  // an entry's 16 bytes, as a power of two
    constexpr int kRows = kRegisters / 2, kPairRows = V::kFloats == 16 ? 8 : 4;
    const Unpacker unpacker(tile.code_bits, kScaleBits);
    const int64_t stride = tile.token_stride * kLanes;
    const int vectors = (tile.tokens * kLanes + V::kFloats - 1) / V::kFloats;
    alignas(64) uint32_t offsets[kDecodeBlock * kTileRows];
    alignas(64) float sums[kTileRows * kVqGemvMaxTokens * kLanes];
    for (int64_t i = 0; i < kTileRows * stride; ++i) sums[i] = 0.0f;

    for (int64_t begin = 0; begin < tile.positions; begin += kDecodeBlock) {
        const int64_t left = tile.positions - begin;
        const int64_t count = left < kDecodeBlock ? left : kDecodeBlock;
        const uint8_t* streams = tile.codes + begin * unpacker.bytes();
        unpacker.unpack_positions(streams, count, tile.codes_end, offsets);
        const float* inputs = tile.inputs + begin * stride;
        // While these codes are in use, the next block's arrive: a share with each pass over rows.
        const uint8_t* next = streams + count * unpacker.bytes();
        const auto pass = [&](auto rows, auto vectors_at_once, int v) {
            constexpr int kStep = decltype(rows)::kValue;
            const int64_t share = unpacker.bytes() * kStep / kTileRows;
            for (int r = 0; r < kTileRows; r += kStep) {
                add_rows<V, kStep, decltype(vectors_at_once)::kValue>(
                    offsets + r, count, tile.entries, inputs + v * V::kFloats, stride,
                    sums + r * stride + v * V::kFloats, stride, next + r / kStep * share * count,
                    share);
            }
        };
        int v = 0;
        for (; v + kPair <= vectors; v += kPair) pass(Constant<kPairRows>(), Constant<kPair>(), v);
        for (; v < vectors; ++v) pass(Constant<kRows>(), Constant<1>(), v);
    }
    for (int t = 0; t < tile.tokens; ++t) {
        for (int r = 0; r < kTileRows; ++r) {
            tile.sums[t * kTileRows + r] = add_lanes(sums + r * stride + t * kLanes, kLanes);
        }
    }
}

void multiply_tile(const VqDecodeTile& tile) {
    if (tile.lanes == 4) {
        if (tile.tokens == 1) return multiply_tile_as<Vector4, 4, 2>(tile);
#ifdef __AVX512F__
        return multiply_tile_as<Vector16<4>, 4, 2>(tile);
#else
        return multiply_tile_as<Vector8<4>, 4, 2>(tile);
#endif
    }
    if (tile.tokens == 1) return multiply_tile_as<Vector8<8>, 8, 2>(tile);
#ifdef __AVX512F__
    return multiply_tile_as<Vector16<8>, 8, 2>(tile);
#else
    return multiply_tile_as<Vector8<8>, 8, 2>(tile);
#endif
}

void arrange_codebook(const uint16_t* codebook, int64_t entries, int d, int lanes, void* out) {
    if (lanes == 4) return expand_codebook(codebook, entries, d, lanes, static_cast<float*>(out));
    const __m128i lane = _mm_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7);
    const __m128i used = _mm_cmpgt_epi16(_mm_set1_epi16(static_cast<int16_t>(d)), lane);
    __m128i* to = static_cast<__m128i*>(out);
    int64_t k = 0;
    for (; k * d + 8 <= entries * d; ++k) {
        const __m128i entry = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codebook + k * d));
        _mm_store_si128(to + k, _mm_and_si128(entry, used));
    }
    // 8 numbers would reach past the codebook's end.
    for (; k < entries; ++k) {
        alignas(16) uint16_t entry[8] = {};
        for (int j = 0; j < d; ++j) entry[j] = codebook[k * d + j];
        _mm_store_si128(to + k, _mm_load_si128(reinterpret_cast<const __m128i*>(entry)));
    }
}

void scale_inputs(const void* x, DType dtype, const uint16_t* col_norms, int64_t cols, float* out) {
    int64_t j = 0;
    for (; j + 8 <= cols; j += 8) {
        const __m256 norms = load_eight(col_norms, j, DType::float16);
        _mm256_storeu_ps(out + j, _mm256_mul_ps(load_eight(x, j, dtype), norms));
    }
    for (; j < cols; ++j) out[j] = load_float(x, j, dtype) * float16_to_float(col_norms[j]);
}

void finish(const float* sums, const uint16_t* row_norms, const void* bias, DType dtype,
            int64_t rows, void* y) {
    int64_t i = 0;
    for (; i + 8 <= rows; i += 8) {
        const __m256 norms = load_eight(row_norms, i, DType::float16);
        __m256 value = _mm256_mul_ps(_mm256_loadu_ps(sums + i), norms);
        if (bias != nullptr) value = _mm256_add_ps(value, load_eight(bias, i, dtype));
        store<8>(y, i, dtype, value);
    }
    for (; i < rows; ++i) {
        float value = sums[i] * float16_to_float(row_norms[i]);
        if (bias != nullptr) value += load_float(bias, i, dtype);
        store_float(y, i, dtype, value);
    }
}

}  // namespace
}  // namespace nowag::cpu
