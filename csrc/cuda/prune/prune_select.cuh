// prune_select (prune.h) on a GPU: exact, and the keys, the bits of saliencies, which are not
// negative and so sort as integers, are never stored. Two kernels around one that reads W once:
//   prune_sample  a histogram of a few saliencies gives a bracket, which holds the threshold in
//                 all likelihood
//   prune_split   reads W, decides whatever lies outside the bracket, lists the few undecided
//                 weights and counts them by their place in the bracket: that gives the rank of
//                 the threshold among them, and the bin that it lies in
//   prune_finish  decides the undecided weights outside that bin, then ranks those inside it by
//                 (key, flat index)
// A crowd, many equal keys in the bracket (the zeros of a layer that has been pruned, say), is not
// listed: prune_split marks its weights in a bitmap of their own and counts them by row, and
// prune_finish keeps all, none, or all but the first of them.
// Where the sample misled, or too many weights are nearly equal, prune_finish ignores all that and
// runs a radix select of its own, which reads W four or five times. So the result depends neither
// on the sample nor on the order of the list.
//
// Measured on an H100, 4096 x 4096, half pruned, before prune_sample had few blocks: 70 us, where
// reading W once takes 31; 6.4 ms where half of the weights were 0, before crowds. Predicted since:
// 58 us, as prune_sample takes 9 instead of 21; with a crowd 75, for its bitmap of 2 MB is written
// and read, and half of another.
#pragma once

#include "cuda/base/block.cuh"
#include "cuda/prune/prune.cuh"

namespace nowag::cuda {

constexpr int kMostSampleBits = 16;
constexpr double kSampleDeviations = 4.0;  // half the bracket's width, in standard deviations

constexpr int kBins = 8192;
constexpr int kSampleShift = 18;    // a sampled key's bin: exponent and 5 bits of mantissa
constexpr int kSampleEach = 4;      // samples of a thread
constexpr int kSampledKeys = 4096;  // keys that are kept, among which a crowd shows

// The list takes a sixteenth of the weights, at 8 bytes a candidate an eighth of W. That is twice
// to four times what a bracket of normally distributed weights holds: 4 standard deviations of
// 65536 samples on either side are up to 1.6 % of the weights, rounding to bins adds up to one
// percent.
constexpr int64_t kWeightsPerCandidate = 16;
constexpr int64_t kLeastCandidates = 4096;  // small layers have a small sample, a wide bracket
constexpr unsigned kMostTied = 4096;        // weights in the threshold's bin

constexpr int kDigits = 3;
constexpr int kDigitBins = 2048;

// The digits of a key, most significant first: 11, 11 and 10 bits.
__device__ __forceinline__ int digit_shift(int digit) {
    return digit == 0 ? 21 : digit == 1 ? 10 : 0;
}
__device__ __forceinline__ unsigned digit_mask(int digit) { return digit == 2 ? 1023u : 2047u; }

// The keys before < key <= last, in bins of 2^shift keys. Keys are below 2^31, so that the sign of
// a difference compares them; before may be -1. crowded: weights with the key `crowd`, inside, are
// not listed.
struct PruneBracket {
    unsigned before;
    unsigned last;
    int shift;
    bool crowded;
    unsigned crowd;
};

// A bin of a histogram that holds the element of some rank.
struct PruneBin {
    unsigned bin;
    unsigned rank;   // in the bin, from 1
    unsigned count;  // elements of the bin
};

// What is to be pruned, given the candidates and the crowd.
struct PruneThreshold {
    bool found;         // or else they are of no use
    bool in_crowd;      // candidates before the crowd, and some of the crowd; or else
    PruneBin bin;       // candidates before the bin, and of the bin those before the rank
    unsigned of_crowd;  // how many of the crowd: the first by flat index
};

// The sample's ranks, from 1, whose bins bound the bracket; outside 1..size that side is open.
struct PruneSample {
    int bits;  // the sample has 2^bits saliencies
    int64_t low;
    int64_t high;
};

// An undecided weight: its key and flat index, so that they sort as integers.
using PruneCandidate = unsigned long long;

// The bin of a candidate in its bracket.
__device__ __forceinline__ unsigned bin_of(const PruneBracket& bracket, PruneCandidate candidate) {
    const unsigned key = static_cast<unsigned>(candidate >> 32);
    // The mask is for negative importances only: they give no order, but must not write elsewhere.
    return (key - bracket.before - 1) >> bracket.shift & (kBins - 1);
}

struct PruneCounts {
    unsigned sampled_blocks, split_blocks;  // that have ended
    unsigned kept;                          // weights beyond the bracket
    unsigned candidates;                    // weights in the bracket, even if the list is too short
    unsigned before_crowd;                  // of them those before the crowd
    unsigned crowd;
    unsigned tied;
    unsigned arrived;  // at barriers
};

struct PruneScratch {
    // Zero at the start.
    PruneCounts counts;
    unsigned sampled[kBins];
    unsigned bracketed[kBins];
    unsigned digits[kDigits][kDigitBins];
    // Written before they are read.
    PruneBracket bracket;
    PruneThreshold threshold;
    unsigned keys[kSampledKeys];  // of samples at regular intervals
    PruneCandidate tied[kMostTied];
};

// A crowd's weights: bits, in the form of the layer's bitmap, and how many a row has.
struct PruneCrowd {
    unsigned* bitmap;
    unsigned* of_rows;
};

struct PruneCandidates {
    PruneCandidate* list;
    unsigned capacity;
};

// Shared memory of find_bin, in integers.
constexpr int kFindBinShared = kPruneWarps + 3;

// Where the element of rank `rank`, from 1, lies in a histogram that has as many. Every thread of
// the block calls it and gets the result. A warp adds up its share of the bins, then the block
// looks at the share of one warp.
template <int kCount>
__device__ __forceinline__ PruneBin find_bin(const unsigned* histogram, unsigned rank,
                                             unsigned* shared) {
    constexpr int kShare = kCount / kPruneWarps, kEach = kShare / kPruneThreads;
    static_assert(kEach * kPruneThreads * kPruneWarps == kCount, "bins a thread");
    unsigned* found = shared + kPruneWarps;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    unsigned sum = 0;
#pragma unroll 16
    for (int b = lane; b < kShare; b += kWarpSize) sum += histogram[warp * kShare + b];
    sum = __reduce_add_sync(kFullWarp, sum);
    __syncthreads();
    if (lane == 0) shared[warp] = sum;
    __syncthreads();
    int share = 0;
    unsigned below = 0;
    while (share < kPruneWarps - 1 && below + shared[share] < rank) below += shared[share++];
    unsigned bins[kEach], own = 0;
    const int first = share * kShare + static_cast<int>(threadIdx.x) * kEach;
#pragma unroll
    for (int b = 0; b < kEach; ++b) {
        bins[b] = histogram[first + b];
        own += bins[b];
    }
    below += block_scan<kPruneThreads>(own, shared).upto - own;
#pragma unroll
    for (int b = 0; b < kEach; ++b) {
        if (below < rank && rank <= below + bins[b]) {
            found[0] = static_cast<unsigned>(first + b);
            found[1] = rank - below;
            found[2] = bins[b];
        }
        below += bins[b];
    }
    __syncthreads();
    const PruneBin bin{found[0], found[1], found[2]};
    __syncthreads();
    return bin;
}

// True in every thread of the block that ends last of the grid: it sees what the others wrote.
// Every thread calls it.
__device__ __forceinline__ bool last_block(unsigned* ended, unsigned* shared) {
    __syncthreads();
    // Behind the barrier one thread's fence holds for what all have written.
    if (threadIdx.x == 0) {
        __threadfence();
        shared[0] = atomicAdd(ended, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    const bool last = shared[0] != 0;
    if (last) __threadfence();
    return last;
}

// Where in the layer sample k is: one to each of 2^bits strata, at a place that does not fall in
// with the length of a row (steps of the golden ratio).
__device__ __forceinline__ uint64_t sample_index(uint64_t k, uint64_t numel, int bits) {
    const uint64_t place = static_cast<uint32_t>(k) * 2654435769u;
    return (k * numel + (place * numel >> 32)) >> bits;
}

// n_prune = 0: sets the bits of all columns. bitmap [rows, padded columns / 8], a thread a byte.
__global__ void prune_keep_all(int64_t rows, int64_t cols, uint8_t* bitmap);

}  // namespace nowag::cuda
