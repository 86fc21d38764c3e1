// The lookup kernel of vq_gemv.h for AVX2: codes of 8 bits, tables of 256 float32 products.
//
// No instruction of AVX2 looks up in a table of 256 faster than plain loads do. A code costs an
// addition of one number from memory to its row's sum, and two or three instructions that take it
// from a register of 8 codes. The tables of 4 tokens are interleaved, so that the same number of
// instructions serves all four. Sums are float32, position after position, whatever the number of
// tokens: a token's result does not depend on its company.

#include <immintrin.h>

#include <cstring>

#include "cpu/vq/vq_gemv_table.h"
#include "nowag/dtype.h"
#include "nowag/format.h"

namespace nowag::cpu {
namespace {

constexpr int kTogether = 4;
// Bytes of the tables in use, which stay in an L1 of 32 KiB while codes and sums pass through.
constexpr int64_t kTablesBytes = 24 << 10;
// Codes of a word, whose rows' sums are kept in registers.
constexpr int kWordRows = 8;

// A row's sum for one token, or for four.
template <int kTokens>
struct Sum;

template <>
struct Sum<1> {
    __m128 value;
    void load(const float* from) { value = _mm_load_ss(from); }
    // GCC 12 would load first and add then.
    void add(const float* product) { asm("vaddss %1, %0, %0" : "+x"(value) : "m"(*product)); }
    void store(float* to) const { _mm_store_ss(to, value); }
};

template <>
struct Sum<kTogether> {
    __m128 value;
    void load(const float* from) { value = _mm_load_ps(from); }
    void add(const float* product) { value = _mm_add_ps(value, _mm_load_ps(product)); }
    void store(float* to) const { _mm_store_ps(to, value); }
};

// Products of kVectors x 8 entries, whose j-th numbers are at codebook[256 j], with each token's
// input, [d, kTokens].
template <int kTokens, int kVectors>
void products(const float* codebook, const float* inputs, int d,
              __m256 (&sums)[kVectors][kTokens]) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) sums[v][t] = _mm256_setzero_ps();
    }
    for (int j = 0; j < d; ++j) {
        __m256 entries[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            entries[v] = _mm256_load_ps(codebook + j * kVqLookupEntries + 8 * v);
        }
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
            const __m256 input = _mm256_broadcast_ss(inputs + j * kTokens + t);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                sums[v][t] = _mm256_fmadd_ps(entries[v], input, sums[v][t]);
            }
        }
    }
}

// [4 tokens][8 entries] -> [8 entries, 4 tokens]
void interleave(const __m256 (&sums)[kTogether], float* out) {
    // Of entries 0, 1 and of 4, 5 what the first two tokens have; of 2, 3, 6, 7; the other tokens'.
    const __m256 a = _mm256_unpacklo_ps(sums[0], sums[1]);
    const __m256 b = _mm256_unpackhi_ps(sums[0], sums[1]);
    const __m256 c = _mm256_unpacklo_ps(sums[2], sums[3]);
    const __m256 d = _mm256_unpackhi_ps(sums[2], sums[3]);
    constexpr int kLow = _MM_SHUFFLE(1, 0, 1, 0), kHigh = _MM_SHUFFLE(3, 2, 3, 2);
    // Entries i and 4 + i.
    const __m256 entries[4] = {_mm256_shuffle_ps(a, c, kLow), _mm256_shuffle_ps(a, c, kHigh),
                               _mm256_shuffle_ps(b, d, kLow), _mm256_shuffle_ps(b, d, kHigh)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        _mm_store_ps(out + i * kTogether, _mm256_castps256_ps128(entries[i]));
        _mm_store_ps(out + (4 + i) * kTogether, _mm256_extractf128_ps(entries[i], 1));
    }
}

// Tables [count, 256, kTokens] of the positions whose inputs are [count, d, kTokens].
template <int kTokens>
void build_tables(const float* codebook, const float* inputs, int d, int64_t count, float* tables) {
    constexpr int kVectors = kTokens == 1 ? 4 : 2;
    for (int64_t p = 0; p < count; ++p, inputs += d * kTokens) {
        for (int64_t k = 0; k < kVqLookupEntries; k += 8 * kVectors) {
            __m256 sums[kVectors][kTokens];
            products(codebook + k, inputs, d, sums);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v, tables += 8 * kTokens) {
                if constexpr (kTokens == 1) {
                    _mm256_store_ps(tables, sums[v][0]);
                } else {
                    interleave(sums[v], tables);
                }
            }
        }
    }
}

// Adds `count` positions to the sums of 8 rows, [8, kTokens].
template <int kTokens>
void look_up_rows(const uint8_t* codes, int64_t count, const float* table, float* sums) {
    Sum<kTokens> sum[kWordRows];
#pragma GCC unroll 8
    for (int r = 0; r < kWordRows; ++r) sum[r].load(sums + r * kTokens);
    for (int64_t p = 0; p < count; ++p) {
        uint64_t word;
        std::memcpy(&word, codes + p * kTileRows, sizeof(word));
#pragma GCC unroll 4
        for (int r = 0; r < kWordRows; r += 2) {
            sum[r].add(table + static_cast<uint8_t>(word) * kTokens);
            sum[r + 1].add(table + static_cast<uint8_t>(word >> 8) * kTokens);
            word >>= 16;
            // In a register whose two lowest bytes can be read; a copy shifted for every code is
            // what GCC would make of it.
            if constexpr (kTokens == 1) asm("" : "+Q"(word));
        }
        table += kVqLookupEntries * kTokens;
    }
#pragma GCC unroll 8
    for (int r = 0; r < kWordRows; ++r) sum[r].store(sums + r * kTokens);
}

template <int kTokens>
void add_group_of(const VqLookupGroup& group) {
    constexpr int64_t kPositions = kTablesBytes / (kVqLookupEntries * kTokens * 4);
    alignas(64) float tables[kPositions * kVqLookupEntries * kTokens];
    for (int64_t i = 0; i < group.tiles * kTileRows * kTokens; ++i) group.sums[i] = 0.0f;
    for (int64_t begin = 0; begin < group.positions; begin += kPositions) {
        const int64_t left = group.positions - begin;
        const int64_t count = left < kPositions ? left : kPositions;
        build_tables<kTokens>(group.codebook, group.inputs + begin * group.d * kTokens, group.d,
                              count, tables);
        const uint8_t* codes = group.codes + begin * kTileRows;
        float* sums = group.sums;
        for (int64_t tile = 0; tile < group.tiles; ++tile) {
            // A tile's codes are read in pieces far apart, which no hardware prefetcher foresees.
            if (tile + 1 < group.tiles) {
                for (int64_t i = 0; i < count * kTileRows; i += 64) {
                    _mm_prefetch(reinterpret_cast<const char*>(codes + group.tile_stride + i),
                                 _MM_HINT_T0);
                }
            }
            for (int r = 0; r < kTileRows; r += kWordRows) {
                look_up_rows<kTokens>(codes + r, count, tables, sums + r * kTokens);
            }
            codes += group.tile_stride;
            sums += kTileRows * kTokens;
        }
    }
}

void add_group(const VqLookupGroup& group) {
    if (group.tokens == 1) return add_group_of<1>(group);
    add_group_of<kTogether>(group);
}

void arrange_codebook(const uint16_t* codebook, int d, float* arranged, float*) {
    for (int64_t k = 0; k < kVqLookupEntries; ++k) {
        for (int j = 0; j < d; ++j) {
            arranged[j * kVqLookupEntries + k] = float16_to_float(codebook[k * d + j]);
        }
    }
}

}  // namespace

const VqLookupTable kVqLookupAvx2 = {kTogether, arrange_codebook, add_group};

}  // namespace nowag::cpu
