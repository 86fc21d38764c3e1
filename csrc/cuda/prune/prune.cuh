// prune.h on a GPU, all but prune_select (prune_select.cuh). Each operation reads W once. Measured
// on an H100, 4096 x 4096: that takes 31 us; the objective 61.
#pragma once

#include "cuda/base/device.cuh"
#include "nowag/format.h"
#include "nowag/prune.h"

namespace nowag::cuda {

constexpr int kPruneThreads = 256;
constexpr int kPruneWarps = kPruneThreads / kWarpSize;
constexpr int64_t kMaxPruneWeights = 0xffffffff;  // counts and flat indices are 32 bits wide

struct PruneLayer {
    const float* w;  // Wn [rows, cols]
    const float* h;  // [cols]
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

// N:M selection for groups of 4.
//   kVector  rows of W, and h, are read in aligned fours (prune_parts.cuh)
//   bitmap   out, [rows, padded columns / 32] words
// A block: kPruneWarps * kUnitsPerWarp units; a lane: one group of each of a unit's rows. Predicted
// for an H100, 4096 x 4096: 36 us, what prune_split takes to read as much in the same way less what
// it decides; by prune_nm, a weight a thread, 91.
template <bool kVector>
__global__ void prune_fours(PruneLayer layer, int n, unsigned* bitmap);

// N:M selection: a weight is kept if at least m - n of its group come before it.
//   kShuffled  m divides 32, so that a group lies in one warp and is handed round by shuffles;
//              otherwise each lane reads its group from memory
//   bitmap     out, [rows, padded columns / 8] (format.h), written in words of 32 bits
// Block (x, y): kPruneThreads columns of row x; a thread: one weight, which it ranks in its group;
// a warp: one word of the bitmap.
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

// prune_objective, first half: kObjectiveLanes lanes a row sum the pruned saliencies and all of
// them, and fold.
//   bitmap    [rows, padded columns / 8]: what is kept
//   row_sums  out, [rows, 2]: pruned, all
// A block: kPruneThreads / kObjectiveLanes rows. The order of a row's sum leaves only 8 lanes to
// it, few to a multiprocessor, so each reads ahead.
constexpr int kSumAhead = 16;  // columns of a lane
__global__ void prune_sum_rows(PruneLayer layer, const uint8_t* __restrict__ bitmap,
                               double* __restrict__ row_sums);

// prune_objective, second half: adds the rows up, ascending.
//   row_sums  [rows, 2]
//   sums      out, [2]
// One block, of which threads 0 and 1 add one sum each, a chain of double additions, some 8 cycles
// each; the others bring the rows to shared memory, so that no addition waits for more.
constexpr int kAddRows = 2048;  // at a time
__global__ void prune_add_rows(const double* __restrict__ row_sums, int64_t rows,
                               double* __restrict__ sums);

}  // namespace nowag::cuda
