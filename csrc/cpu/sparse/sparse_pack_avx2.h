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

// The same for byte shuffles of 8 values of 16 bits, each the upper end of so many bytes; a shuffle
// writes 0 where its index is negative.
template <int kBytes>
struct HalfTable {
    alignas(8 * kBytes) int8_t source[256][8 * kBytes];
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

template <int kBytes>
constexpr HalfTable<kBytes> make_half_table() {
    HalfTable<kBytes> table{};
    for (int mask = 0; mask < 256; ++mask) {
        int8_t next = 0;
        for (int byte = 0; byte < 8 * kBytes; ++byte) {
            const bool set = (mask >> byte / kBytes) & 1, upper = byte % kBytes >= kBytes - 2;
            table.source[mask][byte] = set && upper ? next++ : int8_t{-1};
        }
    }
    return table;
}

constexpr LaneTable kLaneTable = make_lane_table();
constexpr HalfTable<2> kHalfTable = make_half_table<2>();
constexpr HalfTable<4> kHighHalfTable = make_half_table<4>();

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
