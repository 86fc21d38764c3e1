// prune.h on a GPU: exact selection by a radix select over the bits of the saliencies, which are
// not negative, so that they sort as integers. Bound by memory: W is read once a digit (three) and
// once to write the bitmap; nothing is sorted and no saliency is stored.
#pragma once

#include "device.cuh"
#include "nowag/format.h"
#include "nowag/prune.h"

namespace nowag::cuda {

constexpr int kPruneThreads = 256;
constexpr int kPruneWarps = kPruneThreads / kWarpSize;
constexpr int kDigits = 3;
constexpr int kBins = 2048;
constexpr int64_t kMaxPruneWeights = 0xffffffff;  // counts are 32 bits wide

// The digits of a saliency's bits, most significant first: 11, 11 and 10 bits.
__device__ __forceinline__ int digit_shift(int digit) {
    return digit == 0 ? 21 : digit == 1 ? 10 : 0;
}
__device__ __forceinline__ unsigned digit_mask(int digit) { return digit == 2 ? 1023u : 2047u; }

struct PruneLayer {
    const float* w;
    const float* h;
    int64_t rows;
    int64_t cols;
    int64_t rows_a_block;  // a block takes consecutive rows: flat indices ascend with blocks
};

// Scratch memory, all zero at the start.
struct PruneScratch {
    unsigned histogram[kDigits][kBins];
    unsigned ties[];  // saliencies of a block that equal the threshold
};

// The n_prune-th smallest saliency so far: its bits down to some digit, and which it is among the
// saliencies that share them.
struct PruneThreshold {
    unsigned prefix;  // the digits found so far, in place
    unsigned rank;    // from 1
    unsigned equal;   // how many share them
};

__device__ __forceinline__ unsigned saliency_bits(const PruneLayer& layer, int64_t i, int64_t j) {
    const float w = layer.w[i * layer.cols + j];
    return __float_as_uint(layer.h[j] * (w * w));
}

// Inclusive prefix sums over the threads of a block. Every thread calls it.
__device__ __forceinline__ unsigned block_scan(unsigned value, unsigned* warp_sums) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    for (int step = 1; step < kWarpSize; step *= 2) {
        const unsigned before = __shfl_up_sync(kFullWarp, value, step);
        if (lane >= step) value += before;
    }
    __syncthreads();
    if (lane == kWarpSize - 1) warp_sums[warp] = value;
    __syncthreads();
    for (int other = 0; other < warp; ++other) value += warp_sums[other];
    return value;
}

// Extends the threshold by one digit from that digit's histogram. Every thread of the block calls
// it and gets the result. shared: kPruneWarps + 3 integers.
__device__ __forceinline__ PruneThreshold next_digit(const unsigned* histogram, int digit,
                                                     PruneThreshold threshold, unsigned* shared) {
    constexpr int kEach = kBins / kPruneThreads;
    unsigned* found = shared + kPruneWarps;
    unsigned bins[kEach], sum = 0;
#pragma unroll
    for (int b = 0; b < kEach; ++b) {
        bins[b] = histogram[threadIdx.x * kEach + b];
        sum += bins[b];
    }
    unsigned below = block_scan(sum, shared) - sum;
#pragma unroll
    for (int b = 0; b < kEach; ++b) {
        if (below < threshold.rank && threshold.rank <= below + bins[b]) {
            found[0] = static_cast<unsigned>(threadIdx.x) * kEach + b;
            found[1] = threshold.rank - below;
            found[2] = bins[b];
        }
        below += bins[b];
    }
    __syncthreads();
    const PruneThreshold next{threshold.prefix | found[0] << digit_shift(digit), found[1],
                              found[2]};
    __syncthreads();
    return next;
}

// The threshold after `digits` digits.
__device__ __forceinline__ PruneThreshold find_threshold(const PruneScratch& scratch, int digits,
                                                         unsigned n_prune, unsigned* shared) {
    PruneThreshold threshold{0u, n_prune, 0u};
    for (int digit = 0; digit < digits; ++digit) {
        threshold = next_digit(scratch.histogram[digit], digit, threshold, shared);
    }
    return threshold;
}

constexpr size_t kPruneHistogramShared = sizeof(unsigned) * (kBins + kPruneWarps + 3);

// Counts one digit of the saliencies whose higher digits are the threshold's.
__global__ void prune_histogram(PruneLayer layer, int digit, unsigned n_prune,
                                PruneScratch* scratch);

// Counts each block's saliencies that equal the threshold, unless all of them are pruned.
__global__ void prune_count_ties(PruneLayer layer, unsigned n_prune, PruneScratch* scratch);

// Writes the bitmap. n_prune is at least 1.
__global__ void prune_write(PruneLayer layer, unsigned n_prune, const PruneScratch* scratch,
                            uint8_t* bitmap);

__global__ void prune_keep_all(int64_t rows, int64_t cols, uint8_t* bitmap);

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
// row_sums [rows, 2]
__global__ void prune_sum_rows(PruneLayer layer, const uint8_t* __restrict__ bitmap,
                               double* __restrict__ row_sums);

// Adds the rows up, ascending: thread t the sums t of 2.
__global__ void prune_add_rows(const double* __restrict__ row_sums, int64_t rows,
                               double* __restrict__ sums);

}  // namespace nowag::cuda
