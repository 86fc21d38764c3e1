// What each instruction set provides for prune.cpp. All work on one row.
//
// A saliency's key is its bits as an unsigned integer: saliencies are never negative, so keys order
// as saliencies do. The saliencies themselves are recomputed on the fly, never stored.
#pragma once

#include <cstdint>

namespace nowag::cpu {

// The keys lo <= key < lo + span, counted in bins of 2^shift keys.
struct KeyRange {
    uint32_t lo;
    uint32_t span;
    int shift;
};

struct PruneTable {
    // Adds the row's keys inside `range` to bins[(key - lo) >> shift]; returns how many lie below.
    int64_t (*count_keys)(const float* w, const float* h, int64_t cols, KeyRange range,
                          uint32_t* bins);
    // Sets the bits of the keys >= threshold, clears the others, all of the padded bitmap row;
    // returns how many keys equal the threshold.
    int64_t (*keep_from)(const float* w, const float* h, int64_t cols, uint32_t threshold,
                         uint8_t* bits);
    // Sets the bits of the n largest of every m, clears the others, all of the padded bitmap row.
    void (*keep_nm)(const float* w, const float* h, int64_t cols, int n, int m, uint8_t* bits);
    // sums[0], sums[1] = the row's pruned and all saliencies, in float64.
    void (*sum_saliencies)(const float* w, const float* h, int64_t cols, const uint8_t* bits,
                           double* sums);
};

extern const PruneTable kPruneScalar, kPruneAvx2, kPruneAvx512;

}  // namespace nowag::cpu
