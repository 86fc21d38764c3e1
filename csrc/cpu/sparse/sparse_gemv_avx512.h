// The AVX-512 loop of sparse_gemv, over how 64 columns of a row are expanded:
//
//   struct Expand {
//       static constexpr int kVectors;  // that one step yields, of 16 floats each
//       // The next 16 * kVectors columns under the lowest bits of mask.
//       static void step(const void* values, uint64_t mask, __m512* out);
//       static constexpr int kValueBytes;
//   };
//
// Lane l of a tile's accumulators adds up every 16th column by fused multiply-add,
// kSparseGemvChunk columns at a time (a chain of 64), then chunks, then lanes pairwise: that gives
// the error bound of sparse_gemv.h. At one token it is bound by reading values and bitmap, or close
// to it by the one port that expands.
#pragma once

#include <immintrin.h>

#include "cpu/sparse/sparse_gemv_tiles.h"

namespace nowag::cpu {
namespace {

constexpr int64_t kWord = 64;
constexpr int64_t kPrefetchBytes = 512;  // of a row's values; the hardware's prefetch is behind

uint64_t word_at(const uint8_t* bits, int64_t j) {
    uint64_t word;
    std::memcpy(&word, bits + j / 8, sizeof word);
    return word;
}

template <class Expand, int Rows, int Tokens>
void dot_word(const Tile<Rows, Tokens>& tile, int64_t j, const uint8_t* (&values)[Rows],
              __m512 (&sums)[Rows][Tokens]) {
    constexpr int kStep = 16 * Expand::kVectors;
    uint64_t masks[Rows];
    for (int r = 0; r < Rows; ++r) {
        masks[r] = word_at(tile.bits[r], j);
        for (int line = 0; line < Expand::kValueBytes / 2; ++line) {
            _mm_prefetch(values[r] + kPrefetchBytes + 64 * line, _MM_HINT_T0);
        }
    }
    for (int part = 0; part < kWord; part += kStep) {
        __m512 weights[Rows][Expand::kVectors];
        for (int r = 0; r < Rows; ++r) {
            const int before = static_cast<int>(_mm_popcnt_u64(_bzhi_u64(masks[r], part)));
            Expand::step(values[r] + before * Expand::kValueBytes, masks[r] >> part, weights[r]);
        }
        for (int v = 0; v < Expand::kVectors; ++v) {
            for (int t = 0; t < Tokens; ++t) {
                const __m512 x = _mm512_loadu_ps(tile.x[t] + j + part + 16 * v);
                for (int r = 0; r < Rows; ++r) {
                    sums[r][t] = _mm512_fmadd_ps(weights[r][v], x, sums[r][t]);
                }
            }
        }
    }
    for (int r = 0; r < Rows; ++r) values[r] += _mm_popcnt_u64(masks[r]) * Expand::kValueBytes;
}

template <class Expand, int Rows, int Tokens>
void dot_tile(const Tile<Rows, Tokens>& tile, float (&sums)[Rows][Tokens]) {
    const uint8_t* values[Rows];
    __m512 totals[Rows][Tokens];
    for (int r = 0; r < Rows; ++r) {
        values[r] = static_cast<const uint8_t*>(tile.values[r]);
        for (int t = 0; t < Tokens; ++t) totals[r][t] = _mm512_setzero_ps();
    }
    for (int64_t chunk = 0; chunk < tile.cols; chunk += kSparseGemvChunk) {
        const int64_t end =
            chunk + kSparseGemvChunk < tile.cols ? chunk + kSparseGemvChunk : tile.cols;
        __m512 chunk_sums[Rows][Tokens];
        for (int r = 0; r < Rows; ++r) {
            for (int t = 0; t < Tokens; ++t) chunk_sums[r][t] = _mm512_setzero_ps();
        }
        for (int64_t j = chunk; j < end; j += kWord) {
            dot_word<Expand>(tile, j, values, chunk_sums);
        }
        for (int r = 0; r < Rows; ++r) {
            for (int t = 0; t < Tokens; ++t) {
                totals[r][t] = _mm512_add_ps(totals[r][t], chunk_sums[r][t]);
            }
        }
    }
    for (int r = 0; r < Rows; ++r) {
        for (int t = 0; t < Tokens; ++t) sums[r][t] = _mm512_reduce_add_ps(totals[r][t]);
    }
}

// 16 accumulators at most: enough chains to hide the additions' latency, and all in registers.
template <class Expand>
void dot(const SparseGemvBlock& block, float* sums) {
    for (int64_t t = 0; t < block.tokens; t += 8) {
        const int64_t left = block.tokens - t;
        if (left == 1) {
            dot_tokens<4, 1>(block, t, sums, dot_tile<Expand, 4, 1>);
        } else if (left == 2) {
            dot_tokens<4, 2>(block, t, sums, dot_tile<Expand, 4, 2>);
        } else if (left <= 4) {
            dot_tokens<4, 4>(block, t, sums, dot_tile<Expand, 4, 4>);
        } else {
            dot_tokens<2, 8>(block, t, sums, dot_tile<Expand, 2, 8>);
        }
    }
}

struct ExpandFloat32 {
    static constexpr int kVectors = 1, kValueBytes = 4;
    static void step(const void* values, uint64_t mask, __m512* out) {
        *out = _mm512_maskz_expand_ps(static_cast<__mmask16>(mask), _mm512_loadu_ps(values));
    }
};

}  // namespace
}  // namespace nowag::cpu
