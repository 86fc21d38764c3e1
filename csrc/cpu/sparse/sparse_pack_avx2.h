// Expanding 8 values under a byte of the bitmap, by permutations looked up in tables of 256.
// Everything here is local to the file that includes it.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace nowag::cpu {
namespace {

// For each byte: which value each of 8 lanes takes; negative where no bit is set.
struct LaneTable {
    alignas(32) int32_t source[256][8];
};

// The same for pshufb on 8 values of 16 bits; it writes 0 where an index is negative.
struct HalfTable {
    alignas(16) int8_t source[256][16];
};

// The same for both lanes of vpshufb, whose 32-bit numbers get a value each as their upper half.
struct HighHalfTable {
    alignas(32) int8_t source[256][32];
};

constexpr LaneTable make_lane_table() {
    LaneTable table{};
    for (int mask = 0; mask < 256; ++mask) {
        int next = 0;
        for (int lane = 0; lane < 8; ++lane) {
            table.source[mask][lane] = (mask >> lane) & 1 ? next++ : -1;
        }
    }
    return table;
}

constexpr HalfTable make_half_table() {
    HalfTable table{};
    for (int mask = 0; mask < 256; ++mask) {
        int8_t next = 0;
        for (int lane = 0; lane < 8; ++lane) {
            const bool set = (mask >> lane) & 1;
            table.source[mask][2 * lane] = set ? next++ : int8_t{-1};
            table.source[mask][2 * lane + 1] = set ? next++ : int8_t{-1};
        }
    }
    return table;
}

constexpr HighHalfTable make_high_half_table() {
    HighHalfTable table{};
    for (int mask = 0; mask < 256; ++mask) {
        int8_t next = 0;
        for (int lane = 0; lane < 8; ++lane) {
            const bool set = (mask >> lane) & 1;
            int8_t* bytes = table.source[mask] + 4 * lane;
            bytes[0] = bytes[1] = -1;
            bytes[2] = set ? next++ : int8_t{-1};
            bytes[3] = set ? next++ : int8_t{-1};
        }
    }
    return table;
}

constexpr LaneTable kLaneTable = make_lane_table();
constexpr HalfTable kHalfTable = make_half_table();
constexpr HighHalfTable kHighHalfTable = make_high_half_table();

inline __m256i expand_lanes(const void* values, uint64_t mask) {
    const __m256i source =
        _mm256_load_si256(reinterpret_cast<const __m256i*>(kLaneTable.source[mask]));
    const __m256i packed = _mm256_loadu_si256(static_cast<const __m256i*>(values));
    return _mm256_andnot_si256(_mm256_srai_epi32(source, 31),
                               _mm256_permutevar8x32_epi32(packed, source));
}

inline __m128i expand_halves(const void* values, uint64_t mask) {
    const __m128i source =
        _mm_load_si128(reinterpret_cast<const __m128i*>(kHalfTable.source[mask]));
    return _mm_shuffle_epi8(_mm_loadu_si128(static_cast<const __m128i*>(values)), source);
}

// 8 values of 16 bits as the upper halves of 32.
inline __m256i expand_high_halves(const void* values, uint64_t mask) {
    const __m256i source =
        _mm256_load_si256(reinterpret_cast<const __m256i*>(kHighHalfTable.source[mask]));
    const __m128i packed = _mm_loadu_si128(static_cast<const __m128i*>(values));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(packed), source);
}

}  // namespace
}  // namespace nowag::cpu
