// As sparse_gemv_avx512.h, with 8 lanes for the even and 8 for the odd bytes of the bitmap: the
// same chains of 64.
#include <immintrin.h>

#include <cstring>

#include "cpu/sparse/sparse_gemv_tiles.h"
#include "cpu/sparse/sparse_pack_avx2.h"

namespace nowag::cpu {
namespace {

constexpr int64_t kBytePair = 16;        // columns
constexpr int64_t kPrefetchBytes = 512;  // as sparse_gemv_avx512.h

struct ExpandFloat32 {
    static constexpr int kValueBytes = 4;
    static __m256 step(const void* values, uint64_t mask) {
        return _mm256_castsi256_ps(expand_lanes(values, mask));
    }
};

struct ExpandFloat16 {
    static constexpr int kValueBytes = 2;
    static __m256 step(const void* values, uint64_t mask) {
        return _mm256_cvtph_ps(expand_halves(values, mask));
    }
};

struct ExpandBfloat16 {
    static constexpr int kValueBytes = 2;
    static __m256 step(const void* values, uint64_t mask) {
        return _mm256_castsi256_ps(expand_high_halves(values, mask));
    }
};

// Two bytes of the bitmap. Inlined by force: GCC 12 calls some of these, with all sums in memory.
template <class Expand, int Rows, int Tokens>
[[gnu::always_inline]] inline void dot_pair(const Tile<Rows, Tokens>& tile, int64_t j,
                                            const uint8_t* (&values)[Rows],
                                            __m256 (&even)[Rows][Tokens],
                                            __m256 (&odd)[Rows][Tokens]) {
    __m256 first[Rows], second[Rows];
    for (int r = 0; r < Rows; ++r) {
        uint16_t bits;
        std::memcpy(&bits, tile.bits[r] + j / 8, sizeof bits);
        const uint64_t mask = bits, low = mask & 0xff;
        first[r] = Expand::step(values[r], low);
        second[r] = Expand::step(values[r] + _mm_popcnt_u64(low) * Expand::kValueBytes, mask >> 8);
        values[r] += _mm_popcnt_u64(mask) * Expand::kValueBytes;
    }
    for (int t = 0; t < Tokens; ++t) {
        const __m256 x = _mm256_loadu_ps(tile.x[t] + j), next = _mm256_loadu_ps(tile.x[t] + j + 8);
        for (int r = 0; r < Rows; ++r) {
            even[r][t] = _mm256_fmadd_ps(first[r], x, even[r][t]);
            odd[r][t] = _mm256_fmadd_ps(second[r], next, odd[r][t]);
        }
    }
}

float sum_lanes(__m256 lanes) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

template <class Expand, int Rows, int Tokens>
void dot_tile(const Tile<Rows, Tokens>& tile, float (&sums)[Rows][Tokens]) {
    const uint8_t* values[Rows];
    __m256 totals[Rows][Tokens];
    for (int r = 0; r < Rows; ++r) {
        values[r] = static_cast<const uint8_t*>(tile.values[r]);
        for (int t = 0; t < Tokens; ++t) totals[r][t] = _mm256_setzero_ps();
    }
    for (int64_t chunk = 0; chunk < tile.cols; chunk += kSparseGemvChunk) {
        const int64_t end =
            chunk + kSparseGemvChunk < tile.cols ? chunk + kSparseGemvChunk : tile.cols;
        __m256 even[Rows][Tokens], odd[Rows][Tokens];
        for (int r = 0; r < Rows; ++r) {
            for (int t = 0; t < Tokens; ++t) even[r][t] = odd[r][t] = _mm256_setzero_ps();
        }
        for (int64_t j = chunk; j < end; j += kBytePair) {
            for (int r = 0; r < Rows; ++r) _mm_prefetch(values[r] + kPrefetchBytes, _MM_HINT_T0);
            dot_pair<Expand>(tile, j, values, even, odd);
        }
        for (int r = 0; r < Rows; ++r) {
            for (int t = 0; t < Tokens; ++t) {
                totals[r][t] = _mm256_add_ps(totals[r][t], _mm256_add_ps(even[r][t], odd[r][t]));
            }
        }
    }
    for (int r = 0; r < Rows; ++r) {
        for (int t = 0; t < Tokens; ++t) sums[r][t] = sum_lanes(totals[r][t]);
    }
}

// 8 accumulators at most, of 16 registers.
template <class Expand>
void dot(const SparseGemvBlock& block, float* sums) {
    for (int64_t t = 0; t < block.tokens; t += 4) {
        if (block.tokens - t == 1) {
            dot_tokens<4, 1>(block, t, sums, dot_tile<Expand, 4, 1>);
        } else if (block.tokens - t == 2) {
            dot_tokens<2, 2>(block, t, sums, dot_tile<Expand, 2, 2>);
        } else {
            dot_tokens<1, 4>(block, t, sums, dot_tile<Expand, 1, 4>);
        }
    }
}

}  // namespace

const SparseGemvTable kSparseGemvAvx2 = {
    {dot<ExpandFloat32>, dot<ExpandFloat16>, dot<ExpandBfloat16>}, {nullptr, nullptr, nullptr}};

}  // namespace nowag::cpu
