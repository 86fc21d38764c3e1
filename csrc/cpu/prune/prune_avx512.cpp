// Bound by reading w; the importances stay in the L1 or L2 cache from row to row.
#include <immintrin.h>

#include "cpu/prune/prune_scalar.h"

namespace nowag::cpu {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kChunk = 1024;
constexpr int64_t kWord = 64;  // weights under one 64-bit word of the bitmap

__m512 saliencies(const float* w, const float* h) {
    const __m512 weight = _mm512_loadu_ps(w);
    return _mm512_mul_ps(_mm512_loadu_ps(h), _mm512_mul_ps(weight, weight));
}

__m512i keys(const float* w, const float* h) { return _mm512_castps_si512(saliencies(w, h)); }

// One KiB ahead: the hardware's own prefetch stops at the end of each 4 KiB page. It saves a fifth
// of the time of a pass over a layer.
void prefetch(const float* w) { _mm_prefetch(w + 256, _MM_HINT_T0); }

void store_word(uint8_t* bits, uint64_t word) { std::memcpy(bits, &word, sizeof word); }

// Bins met are collected without branches, a chunk of columns at a time, and counted afterwards.
int64_t count_keys(const float* w, const float* h, int64_t cols, KeyRange range, uint32_t* bins) {
    const __m512i lo = _mm512_set1_epi32(static_cast<int>(range.lo));
    const __m512i span = _mm512_set1_epi32(static_cast<int>(range.span));
    const __m128i shift = _mm_cvtsi32_si128(range.shift);
    const int64_t whole = cols / kLanes * kLanes;
    int64_t below = 0;
    for (int64_t chunk = 0; chunk < whole; chunk += kChunk) {
        const int64_t end = chunk + kChunk < whole ? chunk + kChunk : whole;
        uint32_t found[kChunk + kLanes];
        int64_t count = 0;
        for (int64_t j = chunk; j < end; j += kLanes) {
            prefetch(w + j);
            const __m512i key = keys(w + j, h + j);
            // Keys below lo wrap round to more than any span.
            const __m512i offset = _mm512_sub_epi32(key, lo);
            below += __builtin_popcount(_mm512_cmplt_epu32_mask(key, lo));
            const __mmask16 inside = _mm512_cmplt_epu32_mask(offset, span);
            const __m512i bin = _mm512_srl_epi32(offset, shift);
            _mm512_storeu_si512(found + count, _mm512_maskz_compress_epi32(inside, bin));
            count += __builtin_popcount(inside);
        }
        for (int64_t k = 0; k < count; ++k) ++bins[found[k]];
    }
    return below + count_keys_from(whole, w, h, cols, range, bins);
}

int64_t keep_from(const float* w, const float* h, int64_t cols, uint32_t threshold, uint8_t* bits) {
    const __m512i limit = _mm512_set1_epi32(static_cast<int>(threshold));
    int64_t ties = 0, j = 0;
    for (; j + kWord <= cols; j += kWord) {
        uint64_t word = 0;
        for (int64_t part = 0; part < kWord; part += kLanes) {
            prefetch(w + j + part);
            const __m512i key = keys(w + j + part, h + j + part);
            word |= static_cast<uint64_t>(_mm512_cmpge_epu32_mask(key, limit)) << part;
            ties += __builtin_popcount(_mm512_cmpeq_epi32_mask(key, limit));
        }
        store_word(bits + j / 8, word);
    }
    if (j == cols) return ties;
    store_word(bits + j / 8, 0);
    return ties + keep_keys_from(j, w, h, cols, threshold, bits);
}

// For m a power of two up to the lanes: every weight meets the others of its group by rotation.
struct Rotations {
    __m512i source[kLanes];
    __mmask16 earlier[kLanes];  // lanes whose rotated neighbour has a lower index
    int count;
};

Rotations rotations(int m) {
    Rotations all;
    all.count = m - 1;
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i inside = _mm512_set1_epi32(m - 1);
    for (int step = 1; step < m; ++step) {
        const __m512i moved =
            _mm512_and_si512(_mm512_add_epi32(lane, _mm512_set1_epi32(step)), inside);
        const __m512i source = _mm512_or_si512(_mm512_andnot_si512(inside, lane), moved);
        all.source[step - 1] = source;
        all.earlier[step - 1] = _mm512_cmplt_epi32_mask(source, lane);
    }
    return all;
}

__mmask16 kept(__m512 value, const Rotations& others, __m512i pruned) {
    __m512i before = _mm512_setzero_si512();
    for (int r = 0; r < others.count; ++r) {
        const __m512 other = _mm512_permutexvar_ps(others.source[r], value);
        const __mmask16 smaller = _mm512_cmp_ps_mask(other, value, _CMP_LT_OQ);
        const __mmask16 tied = _mm512_mask_cmp_ps_mask(others.earlier[r], other, value, _CMP_EQ_OQ);
        before = _mm512_mask_sub_epi32(before, static_cast<__mmask16>(smaller | tied), before,
                                       _mm512_set1_epi32(-1));
    }
    return _mm512_cmpge_epi32_mask(before, pruned);
}

void keep_nm(const float* w, const float* h, int64_t cols, int n, int m, uint8_t* bits) {
    int64_t j = 0;
    if (m <= kLanes && (m & (m - 1)) == 0) {
        const Rotations others = rotations(m);
        const __m512i pruned = _mm512_set1_epi32(m - n);
        for (; j + kWord <= cols; j += kWord) {
            uint64_t word = 0;
            for (int64_t part = 0; part < kWord; part += kLanes) {
                prefetch(w + j + part);
                const __m512 value = saliencies(w + j + part, h + j + part);
                word |= static_cast<uint64_t>(kept(value, others, pruned)) << part;
            }
            store_word(bits + j / 8, word);
        }
    }
    if (j == cols) return;
    clear_bits(cols - j, bits + j / 8);
    keep_nm_from(j, w, h, cols, n, m, bits);
}

void sum_saliencies(const float* w, const float* h, int64_t cols, const uint8_t* bits,
                    double* sums) {
    __m512d pruned = _mm512_setzero_pd(), all = _mm512_setzero_pd();
    int64_t j = 0;
    for (; j + kObjectiveLanes <= cols; j += kObjectiveLanes) {
        const __m512d weight = _mm512_cvtps_pd(_mm256_loadu_ps(w + j));
        const __m512d importance = _mm512_cvtps_pd(_mm256_loadu_ps(h + j));
        const __m512d value = _mm512_mul_pd(importance, _mm512_mul_pd(weight, weight));
        all = _mm512_add_pd(all, value);
        const auto dropped = static_cast<__mmask8>(~bits[j / 8]);
        pruned = _mm512_add_pd(pruned, _mm512_maskz_mov_pd(dropped, value));
    }
    double pruned_lanes[kObjectiveLanes], all_lanes[kObjectiveLanes];
    _mm512_storeu_pd(pruned_lanes, pruned);
    _mm512_storeu_pd(all_lanes, all);
    sum_saliencies_from(j, w, h, cols, bits, pruned_lanes, all_lanes, sums);
}

}  // namespace

const PruneTable kPruneAvx512 = {count_keys, keep_from, keep_nm, sum_saliencies};

}  // namespace nowag::cpu
