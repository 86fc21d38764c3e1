// Unpacks the 32 codes of a tile at one position into 32-bit integers, 8 at a time, for any code
// size: a byte shuffle brings each code's bytes into its lane, a shift and a mask leave the code.
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

class Unpacker {
  public:
    // Codes come out multiplied by 2^scale_bits, which the caller may want for addressing.
    Unpacker(int code_bits, int scale_bits)
        : bytes_(4 * code_bits), mask_(_mm256_set1_epi32(((1 << code_bits) - 1) << scale_bits)) {
        for (int group = 0; group < kUnpackGroups; ++group) {
            // The load is moved back where it would reach past the position's last byte.
            const int begin = group * code_bits;
            const int latest = bytes_ > kUnpackLoad ? bytes_ - kUnpackLoad : 0;
            offset_[group] = begin < latest ? begin : latest;
            alignas(32) uint8_t shuffle[32];
            alignas(32) uint32_t shift[8];
            for (int lane = 0; lane < 8; ++lane) {
                const int bit = 8 * (begin - offset_[group]) + lane * code_bits;
                // Byte 0 of the lane stays empty: a right shift alone then scales as well.
                shuffle[4 * lane] = 0x80;
                for (int i = 0; i < 3; ++i) {
                    const int source = bit / 8 + i;
                    shuffle[4 * lane + 1 + i] =
                        static_cast<uint8_t>(source < kUnpackLoad ? source : 0x80);
                }
                shift[lane] = static_cast<uint32_t>(8 + bit % 8 - scale_bits);
            }
            shuffle_[group] = _mm256_load_si256(reinterpret_cast<const __m256i*>(shuffle));
            shift_[group] = _mm256_load_si256(reinterpret_cast<const __m256i*>(shift));
        }
    }

    // Reads the position's bytes only, if there are at least 16 of them, else 16 bytes.
    void unpack(const uint8_t* stream, uint32_t* codes) const {
        for (int group = 0; group < kUnpackGroups; ++group) {
            const __m256i raw = _mm256_broadcastsi128_si256(
                _mm_loadu_si128(reinterpret_cast<const __m128i*>(stream + offset_[group])));
            const __m256i window = _mm256_shuffle_epi8(raw, shuffle_[group]);
            const __m256i code = _mm256_and_si256(_mm256_srlv_epi32(window, shift_[group]), mask_);
            _mm256_store_si256(reinterpret_cast<__m256i*>(codes + 8 * group), code);
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
    __m256i mask_;
    __m256i shuffle_[kUnpackGroups];
    __m256i shift_[kUnpackGroups];
};

}  // namespace
}  // namespace nowag::cpu
