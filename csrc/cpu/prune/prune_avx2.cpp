// Bound by reading w, as prune_avx512.cpp. Keys are less than 2^31, so signed comparisons will do.
#include <immintrin.h>

#include "cpu/prune/prune_scalar.h"

namespace nowag::cpu {
namespace {

constexpr int64_t kLanes = 8;  // weights under one byte of the bitmap

// Prefetches one KiB ahead, for the reason given in prune_avx512.cpp.
__m256 saliencies(const float* w, const float* h) {
    _mm_prefetch(w + 256, _MM_HINT_T0);
    const __m256 weight = _mm256_loadu_ps(w);
    return _mm256_mul_ps(_mm256_loadu_ps(h), _mm256_mul_ps(weight, weight));
}

__m256i keys(const float* w, const float* h) { return _mm256_castps_si256(saliencies(w, h)); }

unsigned lane_bits(__m256i comparison) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(comparison)));
}

int64_t count_keys(const float* w, const float* h, int64_t cols, KeyRange range, uint32_t* bins) {
    const __m256i lo = _mm256_set1_epi32(static_cast<int>(range.lo));
    const __m256i span = _mm256_set1_epi32(static_cast<int>(range.span));
    const __m128i shift = _mm_cvtsi32_si128(range.shift);
    int64_t below = 0, j = 0;
    for (; j + kLanes <= cols; j += kLanes) {
        const __m256i key = keys(w + j, h + j);
        const __m256i offset = _mm256_sub_epi32(key, lo);
        const unsigned lower = lane_bits(offset);  // the sign bits
        below += __builtin_popcount(lower);
        unsigned inside = lane_bits(_mm256_cmpgt_epi32(span, offset)) & ~lower;
        if (inside == 0) continue;
        alignas(32) uint32_t bin[kLanes];
        _mm256_store_si256(reinterpret_cast<__m256i*>(bin), _mm256_srl_epi32(offset, shift));
        for (; inside != 0; inside &= inside - 1) ++bins[bin[__builtin_ctz(inside)]];
    }
    return below + count_keys_from(j, w, h, cols, range, bins);
}

int64_t keep_from(const float* w, const float* h, int64_t cols, uint32_t threshold, uint8_t* bits) {
    const __m256i limit = _mm256_set1_epi32(static_cast<int>(threshold));
    int64_t ties = 0, j = 0;
    clear_bits(cols, bits);
    for (; j + kLanes <= cols; j += kLanes) {
        const __m256i key = keys(w + j, h + j);
        bits[j / 8] = static_cast<uint8_t>(~lane_bits(_mm256_cmpgt_epi32(limit, key)));
        ties += __builtin_popcount(lane_bits(_mm256_cmpeq_epi32(key, limit)));
    }
    return ties + keep_keys_from(j, w, h, cols, threshold, bits);
}

// For m a power of two up to the lanes: every weight meets the others of its group by rotation.
struct Rotations {
    __m256i source[kLanes];
    __m256 earlier[kLanes];  // all ones where the rotated neighbour has a lower index
    int count;
};

Rotations rotations(int m) {
    Rotations all;
    all.count = m - 1;
    const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    const __m256i inside = _mm256_set1_epi32(m - 1);
    for (int step = 1; step < m; ++step) {
        const __m256i moved =
            _mm256_and_si256(_mm256_add_epi32(lane, _mm256_set1_epi32(step)), inside);
        const __m256i source = _mm256_or_si256(_mm256_andnot_si256(inside, lane), moved);
        all.source[step - 1] = source;
        all.earlier[step - 1] = _mm256_castsi256_ps(_mm256_cmpgt_epi32(lane, source));
    }
    return all;
}

unsigned kept(__m256 value, const Rotations& others, __m256i pruned) {
    __m256i before = _mm256_setzero_si256();
    for (int r = 0; r < others.count; ++r) {
        const __m256 other = _mm256_permutevar8x32_ps(value, others.source[r]);
        const __m256 smaller = _mm256_cmp_ps(other, value, _CMP_LT_OQ);
        const __m256 tied =
            _mm256_and_ps(others.earlier[r], _mm256_cmp_ps(other, value, _CMP_EQ_OQ));
        before = _mm256_sub_epi32(before, _mm256_castps_si256(_mm256_or_ps(smaller, tied)));
    }
    return ~lane_bits(_mm256_cmpgt_epi32(pruned, before));
}

void keep_nm(const float* w, const float* h, int64_t cols, int n, int m, uint8_t* bits) {
    int64_t j = 0;
    clear_bits(cols, bits);
    if (m <= kLanes && (m & (m - 1)) == 0) {
        const Rotations others = rotations(m);
        const __m256i pruned = _mm256_set1_epi32(m - n);
        for (; j + kLanes <= cols; j += kLanes) {
            bits[j / 8] = static_cast<uint8_t>(kept(saliencies(w + j, h + j), others, pruned));
        }
    }
    keep_nm_from(j, w, h, cols, n, m, bits);
}

// Lanes 4 * half .. 4 * half + 3 of prune.h.
struct Half {
    __m256d pruned = _mm256_setzero_pd();
    __m256d all = _mm256_setzero_pd();

    void add(const float* w, const float* h, unsigned keep) {
        const __m256i lane_bit = _mm256_set_epi64x(8, 4, 2, 1);
        const __m256d weight = _mm256_cvtps_pd(_mm_loadu_ps(w));
        const __m256d importance = _mm256_cvtps_pd(_mm_loadu_ps(h));
        const __m256d value = _mm256_mul_pd(importance, _mm256_mul_pd(weight, weight));
        const __m256i here = _mm256_and_si256(_mm256_set1_epi64x(keep), lane_bit);
        const __m256d dropped =
            _mm256_castsi256_pd(_mm256_cmpeq_epi64(here, _mm256_setzero_si256()));
        all = _mm256_add_pd(all, value);
        pruned = _mm256_add_pd(pruned, _mm256_and_pd(dropped, value));
    }
};

void sum_saliencies(const float* w, const float* h, int64_t cols, const uint8_t* bits,
                    double* sums) {
    Half lower, upper;
    int64_t j = 0;
    for (; j + kObjectiveLanes <= cols; j += kObjectiveLanes) {
        lower.add(w + j, h + j, bits[j / 8] & 15u);
        upper.add(w + j + 4, h + j + 4, bits[j / 8] >> 4u);
    }
    double pruned_lanes[kObjectiveLanes], all_lanes[kObjectiveLanes];
    _mm256_storeu_pd(pruned_lanes, lower.pruned);
    _mm256_storeu_pd(pruned_lanes + 4, upper.pruned);
    _mm256_storeu_pd(all_lanes, lower.all);
    _mm256_storeu_pd(all_lanes + 4, upper.all);
    sum_saliencies_from(j, w, h, cols, bits, pruned_lanes, all_lanes, sums);
}

}  // namespace

const PruneTable kPruneAvx2 = {count_keys, keep_from, keep_nm, sum_saliencies};

}  // namespace nowag::cpu
