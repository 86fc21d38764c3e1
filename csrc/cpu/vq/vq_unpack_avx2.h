// Unpacks the 32 codes of a tile at one position into 32-bit integers, 8 at a time (16 where this
// is compiled for AVX-512), for any code size: a byte shuffle brings each code's bytes into its
// lane, a shift and a mask leave the code.
//
// 8 codes are code_bits bytes, so every group of 8 starts at a byte. In an anonymous namespace:
// each instruction set compiles its own copy.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "nowag/format.h"

namespace nowag::cpu {
namespace {

constexpr int kUnpackGroups = kTileRows / 8;
constexpr int kUnpackLoad = 16;  // bytes loaded for a group

#ifdef __AVX512BW__
using UnpackVector = __m512i;
inline UnpackVector unpack_load(const void* from) { return _mm512_load_si512(from); }
// Two groups, each twice: in the lanes that its codes are shuffled to.
inline UnpackVector unpack_groups(const uint8_t* first, const uint8_t* second) {
    const __m128i one = _mm_loadu_si128(reinterpret_cast<const __m128i*>(first));
    const __m128i two = _mm_loadu_si128(reinterpret_cast<const __m128i*>(second));
    return _mm512_mask_broadcast_i32x4(_mm512_broadcast_i32x4(one), 0xff00, two);
}
inline void unpack_codes(UnpackVector raw, UnpackVector shuffle, UnpackVector shift,
                         UnpackVector mask, uint32_t* codes) {
    const UnpackVector window = _mm512_shuffle_epi8(raw, shuffle);
    _mm512_store_si512(codes, _mm512_and_si512(_mm512_srlv_epi32(window, shift), mask));
}
#else
using UnpackVector = __m256i;
inline UnpackVector unpack_load(const void* from) {
    return _mm256_load_si256(static_cast<const __m256i*>(from));
}
inline UnpackVector unpack_groups(const uint8_t* group, const uint8_t*) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(group)));
}
inline void unpack_codes(UnpackVector raw, UnpackVector shuffle, UnpackVector shift,
                         UnpackVector mask, uint32_t* codes) {
    const UnpackVector window = _mm256_shuffle_epi8(raw, shuffle);
    _mm256_store_si256(reinterpret_cast<__m256i*>(codes),
                       _mm256_and_si256(_mm256_srlv_epi32(window, shift), mask));
}
#endif
constexpr int kUnpackVectors = kTileRows * 4 / static_cast<int>(sizeof(UnpackVector));
constexpr int kVectorGroups = kUnpackGroups / kUnpackVectors;

class Unpacker {
  public:
    // Codes come out multiplied by 2^scale_bits, which the caller may want for addressing.
    Unpacker(int code_bits, int scale_bits) : bytes_(4 * code_bits) {
        alignas(64) uint8_t shuffle[4 * kTileRows];
        alignas(64) uint32_t shift[kTileRows], mask[kTileRows];
        for (int row = 0; row < kTileRows; ++row) {
            const int group = row / 8, lane = row % 8;
            // The load is moved back where it would reach past the position's last byte.
            const int begin = group * code_bits;
            const int latest = bytes_ > kUnpackLoad ? bytes_ - kUnpackLoad : 0;
            offset_[group] = begin < latest ? begin : latest;
            const int bit = 8 * (begin - offset_[group]) + lane * code_bits;
            // Byte 0 of the lane stays empty: a right shift alone then scales as well.
            shuffle[4 * row] = 0x80;
            for (int i = 0; i < 3; ++i) {
                const int source = bit / 8 + i;
                shuffle[4 * row + 1 + i] =
                    static_cast<uint8_t>(source < kUnpackLoad ? source : 0x80);
            }
            shift[row] = static_cast<uint32_t>(8 + bit % 8 - scale_bits);
            mask[row] = ((1u << code_bits) - 1u) << scale_bits;
        }
        for (int v = 0; v < kUnpackVectors; ++v) {
            shuffle_[v] = unpack_load(shuffle + v * sizeof(UnpackVector));
            shift_[v] = unpack_load(shift + v * sizeof(UnpackVector) / 4);
        }
        mask_ = unpack_load(mask);
    }

    // Reads the position's bytes only, if there are at least 16 of them, else 16 bytes.
    void unpack(const uint8_t* stream, uint32_t* codes) const {
        for (int v = 0; v < kUnpackVectors; ++v) {
            const int* offset = offset_ + v * kVectorGroups;
            const UnpackVector raw =
                unpack_groups(stream + offset[0], stream + offset[kVectorGroups - 1]);
            unpack_codes(raw, shuffle_[v], shift_[v], mask_,
                         codes + v * (kTileRows / kUnpackVectors));
        }
    }

    // The same, never reading past the position's bytes.
    void unpack_last(const uint8_t* stream, uint32_t* codes) const {
        if (bytes_ >= kUnpackLoad) return unpack(stream, codes);
        uint8_t padded[kUnpackLoad] = {};
        for (int i = 0; i < bytes_; ++i) padded[i] = stream[i];
        unpack(padded, codes);
    }

    int bytes() const { return bytes_; }

    // Unpacks `count` positions one after another; reads nothing from `end` on.
    void unpack_positions(const uint8_t* streams, int64_t count, const uint8_t* end,
                          uint32_t* codes) const {
        int64_t safe = bytes_ >= kUnpackLoad ? count : (end - streams - kUnpackLoad) / bytes_;
        safe = safe < count ? safe : count;
        int64_t p = 0;
        for (; p < safe; ++p) unpack(streams + p * bytes_, codes + p * kTileRows);
        for (; p < count; ++p) unpack_last(streams + p * bytes_, codes + p * kTileRows);
    }

  private:
    int bytes_;
    int offset_[kUnpackGroups];
    UnpackVector mask_;
    UnpackVector shuffle_[kUnpackVectors];
    UnpackVector shift_[kUnpackVectors];
};

}  // namespace
}  // namespace nowag::cpu
