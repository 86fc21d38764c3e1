// prune.h on a GPU, all but prune_select (prune_select.cuh). Bound by memory: each reads W once.
#pragma once

#include "cuda/base/device.cuh"
#include "nowag/format.h"
#include "nowag/prune.h"

namespace nowag::cuda {

constexpr int kPruneThreads = 256;
constexpr int kPruneWarps = kPruneThreads / kWarpSize;
constexpr int64_t kMaxPruneWeights = 0xffffffff;  // counts and flat indices are 32 bits wide

struct PruneLayer {
    const float* w;
    const float* h;
    int64_t rows;
    int64_t cols;
};

inline bool valid_layer(int64_t rows, int64_t cols) {
    return rows >= 1 && cols >= 1 && rows <= kMaxPruneWeights / cols;
}

__device__ __forceinline__ unsigned saliency_bits(float w, float h) {
    return __float_as_uint(h * (w * w));
}

__device__ __forceinline__ unsigned saliency_bits(const PruneLayer& layer, int64_t i, int64_t j) {
    return saliency_bits(layer.w[i * layer.cols + j], layer.h[j]);
}

// A lane ranks one weight in its group. kShuffled: m divides 32, so that a group lies in one warp.
template <bool kShuffled>
__global__ void prune_nm(PruneLayer layer, int n, int m, uint8_t* __restrict__ bitmap) {
    const int64_t padded = padded_columns(layer.cols);
    const int64_t i = blockIdx.x;
    const int64_t j = static_cast<int64_t>(blockIdx.y) * kPruneThreads + threadIdx.x;
    if (j - threadIdx.x % kWarpSize >= padded) return;
    const bool inside = j < layer.cols;
    const unsigned mine = inside ? saliency_bits(layer, i, j) : 0u;
    const int place = static_cast<int>(j % m);
    int rank = 0;
    for (int other = 0; other < m; ++other) {
        unsigned bits = 0;
        if (kShuffled) {
            bits = __shfl_sync(kFullWarp, mine, other, m);
        } else if (inside) {
            bits = saliency_bits(layer, i, j - place + other);
        }
        rank += bits < mine || (bits == mine && other < place);
    }
    const unsigned kept = __ballot_sync(kFullWarp, inside && rank >= m - n);
    if (threadIdx.x % kWarpSize == 0) {
        reinterpret_cast<unsigned*>(bitmap)[(i * padded + j) / kWarpSize] = kept;
    }
}

// prune_objective: kObjectiveLanes lanes a row sum the pruned saliencies and all of them, and fold.
// row_sums [rows, 2]. A multiprocessor has few of these lanes, so each reads ahead.
constexpr int kSumAhead = 16;  // columns of a lane
__global__ void prune_sum_rows(PruneLayer layer, const uint8_t* __restrict__ bitmap,
                               double* __restrict__ row_sums);

// Adds the rows up in one block, ascending: thread t the sums t of 2. A chain of double additions,
// some 8 cycles each; the block brings the rows to shared memory, so that no addition waits for
// more.
constexpr int kAddRows = 2048;  // at a time
__global__ void prune_add_rows(const double* __restrict__ row_sums, int64_t rows,
                               double* __restrict__ sums);

}  // namespace nowag::cuda
