// The row loops of prune_table.h in plain C++, for the scalar table and for the tails and odd
// patterns of the vector ones. `static`: each instruction set compiles its own copy.
#pragma once

#include "cpu/prune/prune_table.h"
#include "nowag/dtype.h"
#include "nowag/format.h"
#include "nowag/prune.h"

namespace nowag::cpu {

static inline float saliency(float w, float h) { return h * (w * w); }

static inline uint32_t saliency_key(float w, float h) { return float_bits(saliency(w, h)); }

static inline void clear_bits(int64_t cols, uint8_t* bits) {
    std::memset(bits, 0, static_cast<size_t>(bitmap_row_bytes(cols)));
}

static inline void set_bit(uint8_t* bits, int64_t j) {
    bits[j / 8] = static_cast<uint8_t>(bits[j / 8] | (1u << (j % 8)));
}

// The three loops from column `begin` on.
static inline int64_t count_keys_from(int64_t begin, const float* w, const float* h, int64_t cols,
                                      KeyRange range, uint32_t* bins) {
    int64_t below = 0;
    for (int64_t j = begin; j < cols; ++j) {
        const uint32_t key = saliency_key(w[j], h[j]);
        if (key < range.lo) {
            ++below;
        } else if (key - range.lo < range.span) {
            ++bins[(key - range.lo) >> range.shift];
        }
    }
    return below;
}

static inline int64_t keep_keys_from(int64_t begin, const float* w, const float* h, int64_t cols,
                                     uint32_t threshold, uint8_t* bits) {
    int64_t ties = 0;
    for (int64_t j = begin; j < cols; ++j) {
        const uint32_t key = saliency_key(w[j], h[j]);
        if (key >= threshold) set_bit(bits, j);
        ties += key == threshold;
    }
    return ties;
}

// An input is kept if at least m - n of its group come before it in a stable ascending sort.
static inline void keep_nm_from(int64_t begin, const float* w, const float* h, int64_t cols, int n,
                                int m, uint8_t* bits) {
    float group[kMaxGroup];
    for (int64_t first = begin; first < cols; first += m) {
        for (int j = 0; j < m; ++j) group[j] = saliency(w[first + j], h[first + j]);
        for (int j = 0; j < m; ++j) {
            int before = 0;
            for (int k = 0; k < m; ++k) {
                before += k < j ? group[k] <= group[j] : group[k] < group[j];
            }
            if (before >= m - n) set_bit(bits, first + j);
        }
    }
}

// Adds the saliencies from column `begin`, a multiple of the lanes, on; then sums the lanes up.
static inline void sum_saliencies_from(int64_t begin, const float* w, const float* h, int64_t cols,
                                       const uint8_t* bits, double* pruned, double* all,
                                       double* sums) {
    for (int64_t j = begin; j < cols; ++j) {
        const double weight = w[j];
        const double value = h[j] * (weight * weight);
        const bool keep = (bits[j / 8] >> (j % 8)) & 1u;
        pruned[j % kObjectiveLanes] += keep ? 0.0 : value;
        all[j % kObjectiveLanes] += value;
    }
    for (int64_t half = kObjectiveLanes / 2; half > 0; half /= 2) {
        for (int64_t lane = 0; lane < half; ++lane) {
            pruned[lane] += pruned[lane + half];
            all[lane] += all[lane + half];
        }
    }
    sums[0] = pruned[0];
    sums[1] = all[0];
}

}  // namespace nowag::cpu
