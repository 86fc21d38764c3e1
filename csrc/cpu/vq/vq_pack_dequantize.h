// The dequantisation kernel of vq_pack.h for AVX2 and, where it is compiled for it, AVX-512.
//
// For each code its entry times the row's norm times the columns' norms, a vector of one code's
// values (AVX2) or of several codes' (AVX-512). Values past those of the codes are overwritten by
// the next ones.
//
// In an anonymous namespace: each instruction set compiles its own copy.
#pragma once

#include <immintrin.h>

#include "cpu/vq/vq_expand_avx2.h"
#include "cpu/vq/vq_pack_table.h"
#include "cpu/vq/vq_unpack_avx2.h"
#include "nowag/format.h"

namespace nowag::cpu {
namespace {

// Positions unpacked at a time: their 8 KiB of offsets stay in L1.
constexpr int64_t kDenseBlock = 64;

template <int kLanes>
__m256 load(const float* p) {
    if constexpr (kLanes == 8) return _mm256_loadu_ps(p);
    return _mm256_castps128_ps256(_mm_loadu_ps(p));
}

struct Row {
    const char* entries;
    const uint32_t* offsets;  // of this row's codes, kTileRows apart
    __m256 norm;
    void* out;
    int64_t out_begin;  // element of `out` at which the row starts

    // The entry at position p of the block.
    const float* entry(int64_t p) const {
        return reinterpret_cast<const float*>(entries + offsets[p * kTileRows]);
    }
};

// Positions at which `width` values fit into a row.
int64_t fitting(const VqDenseTile& tile, int width) {
    return tile.cols < width ? 0 : (tile.cols - width) / tile.d + 1;
}

// Values of block positions [begin, end), the first of which is position `first` of the row.
template <int kLanes, DType kType>
void write_whole(const VqDenseTile& tile, const Row& row, int64_t first, int64_t begin,
                 int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
        const int64_t column = (first + p) * tile.d;
        const __m256 value = _mm256_mul_ps(_mm256_mul_ps(row.norm, load<kLanes>(row.entry(p))),
                                           load<kLanes>(tile.col_norms + column));
        store<kLanes>(row.out, row.out_begin + column, kType, value);
    }
}

#ifdef __AVX512F__
constexpr int kWide = 16;

template <DType kType>
void store_wide(void* out, int64_t index, __m512 value) {
    if constexpr (kType == DType::float32) {
        return _mm512_storeu_ps(static_cast<float*>(out) + index, value);
    }
    __m256i halves;
    if constexpr (kType == DType::float16) {
        halves = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
    } else {
        // As to_bfloat16.
        const __m512i bits = _mm512_castps_si512(value), top = _mm512_srli_epi32(bits, 16);
        const __m512i odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_srli_epi32(
            _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
        const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
        halves =
            _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, top, _mm512_set1_epi32(0x40)));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(out) + index), halves);
}

// The entries of block positions [p, p + 16 / kLanes), one after another.
template <int kLanes>
__m512 wide_entries(const Row& row, int64_t p) {
    if constexpr (kLanes == 8) {
        const __m512 front = _mm512_castps256_ps512(_mm256_load_ps(row.entry(p)));
        return _mm512_insertf32x8(front, _mm256_load_ps(row.entry(p + 1)), 1);
    } else {
        __m512 entries = _mm512_castps128_ps512(_mm_load_ps(row.entry(p)));
        entries = _mm512_insertf32x4(entries, _mm_load_ps(row.entry(p + 1)), 1);
        entries = _mm512_insertf32x4(entries, _mm_load_ps(row.entry(p + 2)), 2);
        return _mm512_insertf32x4(entries, _mm_load_ps(row.entry(p + 3)), 3);
    }
}

// As write_whole from the block's start, as many codes at a time as 16 floats hold, up to `end` at
// most; returns where it stopped. kPadded: entries have padding, which is squeezed out.
template <int kLanes, DType kType, bool kPadded>
int64_t write_wide(const VqDenseTile& tile, const Row& row, int64_t first, int64_t end) {
    constexpr int kCodes = kWide / kLanes;
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i order = lane;
    for (int code = 1; code < kCodes; ++code) {
        const __mmask16 from = static_cast<__mmask16>(0xffffu << (code * tile.d));
        order = _mm512_mask_add_epi32(order, from, order, _mm512_set1_epi32(kLanes - tile.d));
    }
    const __m512 norm = _mm512_broadcastss_ps(_mm256_castps256_ps128(row.norm));
    // A whole vector fits into the row up to here.
    const int64_t fits = fitting(tile, kWide) - first;
    int64_t p = 0;
    for (; p < fits && p + kCodes <= end; p += kCodes) {
        const int64_t column = (first + p) * tile.d;
        __m512 entries = wide_entries<kLanes>(row, p);
        if constexpr (kPadded) entries = _mm512_permutexvar_ps(order, entries);
        const __m512 value =
            _mm512_mul_ps(_mm512_mul_ps(norm, entries), _mm512_loadu_ps(tile.col_norms + column));
        store_wide<kType>(row.out, row.out_begin + column, value);
    }
    return p;
}

template <int kLanes, DType kType>
int64_t write_several(const VqDenseTile& tile, const Row& row, int64_t first, int64_t end) {
    if (tile.d == kLanes) return write_wide<kLanes, kType, false>(tile, row, first, end);
    return write_wide<kLanes, kType, true>(tile, row, first, end);
}
#else
// As write_whole from the block's start, two sub-vectors of exactly 4 at a time, up to `end` at
// most; returns where it stopped.
template <int kLanes, DType kType>
int64_t write_several(const VqDenseTile& tile, const Row& row, int64_t first, int64_t end) {
    int64_t p = 0;
    if (kLanes != 4 || tile.d != 4) return p;
    for (; p + 2 <= end; p += 2) {
        const int64_t column = (first + p) * 4;
        const __m256 entries =
            _mm256_set_m128(_mm_load_ps(row.entry(p + 1)), _mm_load_ps(row.entry(p)));
        const __m256 value = _mm256_mul_ps(_mm256_mul_ps(row.norm, entries),
                                           _mm256_loadu_ps(tile.col_norms + column));
        store<8>(row.out, row.out_begin + column, kType, value);
    }
    return p;
}
#endif

// Values one by one, where a whole vector would reach past the row's end.
void write_single(const VqDenseTile& tile, const Row& row, int64_t first, int64_t begin,
                  int64_t end) {
    const float norm = _mm256_cvtss_f32(row.norm);
    for (int64_t p = begin; p < end; ++p) {
        const float* entry = row.entry(p);
        for (int j = 0; j < tile.d && (first + p) * tile.d + j < tile.cols; ++j) {
            const int64_t column = (first + p) * tile.d + j;
            store_float(row.out, row.out_begin + column, tile.dtype,
                        (norm * entry[j]) * tile.col_norms[column]);
        }
    }
}

template <int kLanes, DType kType>
void dequantize_as(const VqDenseTile& tile) {
    const Unpacker unpacker(tile.code_bits, kLanes == 8 ? 5 : 4);
    alignas(64) uint32_t offsets[kDenseBlock * kTileRows];
    // Positions from here on are too near the row's end for a whole vector.
    const int64_t fits = fitting(tile, kLanes);
    for (int64_t first = 0; first < tile.positions; first += kDenseBlock) {
        const int64_t left = tile.positions - first;
        const int64_t count = left < kDenseBlock ? left : kDenseBlock;
        unpacker.unpack_positions(tile.codes + first * unpacker.bytes(), count, tile.codes_end,
                                  offsets);
        const int64_t room = fits > first ? fits - first : 0;
        const int64_t whole = room < count ? room : count;
        for (int r = 0; r < tile.height; ++r) {
            const Row row{reinterpret_cast<const char*>(tile.entries), offsets + r,
                          _mm256_set1_ps(tile.row_norms[r]), tile.out, r * tile.out_stride};
            const int64_t done = write_several<kLanes, kType>(tile, row, first, whole);
            write_whole<kLanes, kType>(tile, row, first, done, whole);
            write_single(tile, row, first, whole, count);
        }
    }
}

template <int kLanes>
void dequantize_lanes(const VqDenseTile& tile) {
    switch (tile.dtype) {
        case DType::float32:
            return dequantize_as<kLanes, DType::float32>(tile);
        case DType::float16:
            return dequantize_as<kLanes, DType::float16>(tile);
        case DType::bfloat16:
            return dequantize_as<kLanes, DType::bfloat16>(tile);
    }
}

void dequantize_tile(const VqDenseTile& tile) {
    return tile.lanes == 8 ? dequantize_lanes<8>(tile) : dequantize_lanes<4>(tile);
}

}  // namespace
}  // namespace nowag::cpu
