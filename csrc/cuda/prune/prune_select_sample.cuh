// The first kernel of prune_select.cuh: where the threshold lies in all likelihood, and a key that
// many weights have.
#pragma once

#include "cuda/prune/prune_select.cuh"

namespace nowag::cuda {

struct SampleShared {
    unsigned histogram[kBins];
    unsigned keys[kPruneThreads];
    unsigned find_bin[kFindBinShared];
};

__device__ __forceinline__ unsigned sampled_key(const PruneLayer& layer, uint64_t k, int bits) {
    const uint64_t numel = static_cast<uint64_t>(layer.rows * layer.cols);
    const uint64_t index = sample_index(k, numel, bits);
    return saliency_bits(layer.w[index], layer.h[index % static_cast<uint64_t>(layer.cols)]);
}

// How many of the sample's keys have a place in scratch->keys, each interval-th of them.
struct KeptKeys {
    unsigned count;
    unsigned interval;

    __device__ __forceinline__ explicit KeptKeys(int bits)
        : count(1u << bits < kSampledKeys ? 1u << bits : kSampledKeys),
          interval((1u << bits) / count) {}
};

// The key that most threads of the block, and not one alone, find first of those inside the bracket
// among the few kept keys that each looks at. Every thread calls it; whether there is one.
__device__ __forceinline__ bool find_crowd(const PruneScratch* scratch, int bits,
                                           const PruneBracket& bracket, SampleShared& shared,
                                           unsigned* crowd) {
    constexpr unsigned kNone = ~0u;  // no key is as large
    const unsigned count = KeptKeys(bits).count;
    unsigned mine = kNone;
    for (unsigned i = threadIdx.x; i < count; i += kPruneThreads) {
        const unsigned key = scratch->keys[i];
        const bool inside = key - bracket.before - 1 < bracket.last - bracket.before;
        if (mine == kNone && inside) mine = key;
    }
    shared.keys[threadIdx.x] = mine;
    __syncthreads();
    unsigned votes = 0;
    for (int t = 0; t < kPruneThreads; ++t) votes += shared.keys[t] == mine;
    if (mine == kNone || votes == 1) votes = 0;
    // The most votes, and among equals the first thread.
    unsigned best = (kPruneThreads - votes) * kPruneThreads + threadIdx.x;
    best = __reduce_min_sync(kFullWarp, best);
    if (lane_of_thread() == 0) shared.find_bin[warp_of_thread()] = best;
    __syncthreads();
    for (int warp = 0; warp < kPruneWarps; ++warp) best = min(best, shared.find_bin[warp]);
    *crowd = shared.keys[best % kPruneThreads];
    return best < kPruneThreads * kPruneThreads;
}

// Counts 2^sample.bits saliencies in scratch->sampled, by the top bits of their keys; the block
// that ends last turns the ranks of `sample` into scratch->bracket.
//   crowd  out: of_rows, set to 0
// A thread: kSampleEach saliencies; a block adds its own up before it adds them to the others'.
__global__ void prune_sample(PruneLayer layer, PruneSample sample, PruneScratch* scratch,
                             PruneCrowd crowd) {
    SampleShared& shared = *reinterpret_cast<SampleShared*>(shared_memory());
    const unsigned size = 1u << sample.bits;
    const KeptKeys kept(sample.bits);
    const unsigned first = blockIdx.x * (kPruneThreads * kSampleEach) + threadIdx.x;
    unsigned keys[kSampleEach] = {};
#pragma unroll
    for (int s = 0; s < kSampleEach; ++s) {
        const unsigned k = first + s * kPruneThreads;
        if (k < size) keys[s] = sampled_key(layer, k, sample.bits);
    }
    for (int bin = threadIdx.x; bin < kBins; bin += kPruneThreads) shared.histogram[bin] = 0;
    const int64_t threads = static_cast<int64_t>(gridDim.x) * kPruneThreads;
    for (int64_t i = blockIdx.x * static_cast<int64_t>(kPruneThreads) + threadIdx.x; i < layer.rows;
         i += threads) {
        crowd.of_rows[i] = 0;
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < kSampleEach; ++s) {
        const unsigned k = first + s * kPruneThreads;
        if (k >= size) continue;
        atomicAdd(&shared.histogram[keys[s] >> kSampleShift & (kBins - 1)], 1u);
        if (k % kept.interval == 0) scratch->keys[k / kept.interval] = keys[s];
    }
    __syncthreads();
    for (int bin = threadIdx.x; bin < kBins; bin += kPruneThreads) {
        if (shared.histogram[bin] > 0) atomicAdd(&scratch->sampled[bin], shared.histogram[bin]);
    }
    if (!last_block(&scratch->counts.sampled_blocks, shared.find_bin)) return;

    PruneBracket bracket{~0u, ~0u >> 1, 0, false, 0u};
    if (sample.low >= 1) {
        const auto rank = static_cast<unsigned>(sample.low);
        const unsigned bin = find_bin<kBins>(scratch->sampled, rank, shared.find_bin).bin;
        bracket.before = (bin << kSampleShift) - 1;
    }
    if (sample.high <= size) {
        const auto rank = static_cast<unsigned>(sample.high);
        const unsigned bin = find_bin<kBins>(scratch->sampled, rank, shared.find_bin).bin;
        bracket.last = ((bin + 1) << kSampleShift) - 1;
    }
    while ((bracket.last - bracket.before - 1) >> bracket.shift >= kBins) ++bracket.shift;
    bracket.crowded = find_crowd(scratch, sample.bits, bracket, shared, &bracket.crowd);
    if (threadIdx.x == 0) scratch->bracket = bracket;
}

}  // namespace nowag::cuda
