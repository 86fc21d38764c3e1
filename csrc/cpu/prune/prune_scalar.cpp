#include "cpu/prune/prune_scalar.h"

namespace nowag::cpu {
namespace {

int64_t count_keys(const float* w, const float* h, int64_t cols, KeyRange range, uint32_t* bins) {
    return count_keys_from(0, w, h, cols, range, bins);
}

int64_t keep_from(const float* w, const float* h, int64_t cols, uint32_t threshold, uint8_t* bits) {
    clear_bits(cols, bits);
    return keep_keys_from(0, w, h, cols, threshold, bits);
}

void keep_nm(const float* w, const float* h, int64_t cols, int n, int m, uint8_t* bits) {
    clear_bits(cols, bits);
    keep_nm_from(0, w, h, cols, n, m, bits);
}

void sum_saliencies(const float* w, const float* h, int64_t cols, const uint8_t* bits,
                    double* sums) {
    double pruned[kObjectiveLanes] = {}, all[kObjectiveLanes] = {};
    sum_saliencies_from(0, w, h, cols, bits, pruned, all, sums);
}

}  // namespace

const PruneTable kPruneScalar = {count_keys, keep_from, keep_nm, sum_saliencies};

}  // namespace nowag::cpu
