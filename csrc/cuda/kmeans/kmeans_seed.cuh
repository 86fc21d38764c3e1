// Greedy k-means++ (kmeans.h) on a GPU.
//
// Entries are chosen one after another, so one kernel stays on the device for all of them. Each of
// its blocks keeps a stretch of the sample, and they meet at a grid-wide barrier twice an entry:
//   every block: how much q its stretch would have left with each candidate -> the board
//   barrier; every block: adds up the board, takes the best candidate as the next entry, draws the
//            next candidates; brings its stretch down to the new entry, and where the draws fall
//            into its share of the running sum of q, finds the points -> the board
//   barrier; every block: reads the candidates
// A block that runs ahead cannot overwrite what another still reads: between the two stands the
// other barrier.
// Bound by latency: measured on an H100 at K = 4096, d = 6: 7.8 us an entry, 1.2 us at each barrier
// and the rest a chain of short steps, each of a few dependent reads from the second-level cache.
#pragma once

#include "cuda/kmeans/kmeans_sample.cuh"

namespace nowag::cuda {

constexpr int kCandidates = cpu::kKmeansCandidates;
constexpr int kMaxSeedBlocks = 256;
constexpr int64_t kSeedPointsPerBlock = 1024;  // fewer would only make the barrier wider
constexpr int kDistanceBits = 40;              // of the largest q after the first entry

// The sample, coordinate by coordinate: x and h [d, size], nearest [size].
struct SeedSample {
    float* x;
    float* h;
    float* nearest;
    int64_t size;
};

// What the blocks tell each other; all zero at the start.
struct SeedBoard {
    unsigned arrived;
    unsigned largest;  // bits of the largest distance to the first entry
    int64_t candidates[kCandidates];
    unsigned long long left[kCandidates][kMaxSeedBlocks];
};

// A block's shared memory.
struct SeedShared {
    unsigned long long warps[kCandidates][kSeedWarps];
    // Sums of q with each candidate: over this block, the blocks before it, all blocks.
    unsigned long long own[kCandidates], before[kCandidates], total[kCandidates];
    float candidates[kCandidates][kMaxSubvector];
};

// A block's stretch of the sample and what it does with it.
template <int kD>
struct SeedBlock {
    SeedSample sample;
    int64_t begin, end;
    SeedShared& shared;
    SeedBoard* board;

    __device__ float distance(int64_t i, const float (&entry)[kD]) const {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kD; ++j) {
            const float t = sample.x[j * sample.size + i] - entry[j];
            sum = fused(sample.h[j * sample.size + i] * t, t, sum);
        }
        return sum;
    }

    // Distances to the first entry, which is also put down as the only candidate.
    __device__ void start(int64_t first) {
        float entry[kD], largest = 0.0f;
#pragma unroll
        for (int j = 0; j < kD; ++j) entry[j] = sample.x[j * sample.size + first];
        for (int64_t i = begin + threadIdx.x; i < end; i += kSeedThreads) {
            const float far = distance(i, entry);
            sample.nearest[i] = far;
            largest = fmaxf(largest, far);
        }
        raise_to_warp(&board->largest, largest);
        if (blockIdx.x == 0 && threadIdx.x < kCandidates) put_down(threadIdx.x, first);
    }

    __device__ void put_down(int candidate, int64_t index) {
        volatile int64_t* candidates = board->candidates;
        candidates[candidate] = index;
    }

    __device__ void read_candidates() {
        if (threadIdx.x < kCandidates * kD) {
            const int candidate = threadIdx.x / kD, j = threadIdx.x % kD;
            const volatile int64_t* candidates = board->candidates;
            shared.candidates[candidate][j] = sample.x[j * sample.size + candidates[candidate]];
        }
        __syncthreads();
    }

    // What would be left of q over this block with each candidate.
    __device__ void consider(double scale) {
        float entries[kCandidates][kD];
        unsigned long long left[kCandidates] = {};
#pragma unroll
        for (int c = 0; c < kCandidates; ++c) {
#pragma unroll
            for (int j = 0; j < kD; ++j) entries[c][j] = shared.candidates[c][j];
        }
        for (int64_t i = begin + threadIdx.x; i < end; i += kSeedThreads) {
            const float nearest = sample.nearest[i];
#pragma unroll
            for (int c = 0; c < kCandidates; ++c) {
                left[c] += quantized(fminf(distance(i, entries[c]), nearest), scale);
            }
        }
        const int warp = warp_of_thread(), lane = lane_of_thread();
#pragma unroll
        for (int c = 0; c < kCandidates; ++c) {
            left[c] = warp_sum(left[c]);
            if (lane == 0) shared.warps[c][warp] = left[c];
        }
        __syncthreads();
        if (warp < kCandidates) {
            const unsigned long long own =
                warp_sum(lane < kSeedWarps ? shared.warps[warp][lane] : 0u);
            volatile unsigned long long* sums = board->left[warp];
            if (lane == 0) {
                shared.own[warp] = own;
                sums[blockIdx.x] = own;
            }
        }
    }

    // Adds the board up, a warp a candidate; returns the best candidate.
    __device__ int best_candidate() {
        constexpr int kEach = kMaxSeedBlocks / kWarpSize;
        const int warp = warp_of_thread(), lane = lane_of_thread();
        if (warp < kCandidates) {
            const volatile unsigned long long* sums = board->left[warp];
            unsigned long long left[kEach], before = 0, total = 0;
            // All on their way before the first is needed; beyond the grid the board holds zeros.
#pragma unroll
            for (int e = 0; e < kEach; ++e) left[e] = sums[e * kWarpSize + lane];
#pragma unroll
            for (int e = 0; e < kEach; ++e) {
                const unsigned block = static_cast<unsigned>(e * kWarpSize + lane);
                before += block < blockIdx.x ? left[e] : 0u;
                total += left[e];
            }
            before = warp_sum(before);
            total = warp_sum(total);
            if (lane == 0) {
                shared.before[warp] = before;
                shared.total[warp] = total;
            }
        }
        __syncthreads();
        int best = 0;
        for (int c = 1; c < kCandidates; ++c) {
            if (shared.total[c] < shared.total[best]) best = c;
        }
        return best;
    }

    // Makes a candidate an entry, and puts down the points of this block in whose share of the
    // running sum of q the targets lie.
    __device__ void accept(int candidate, double scale, const uint64_t (&targets)[kCandidates]) {
        const unsigned long long share_begin = shared.before[candidate];
        const unsigned long long share_end = share_begin + shared.own[candidate];
        bool drawn_here = false;
        float entry[kD];
#pragma unroll
        for (int c = 0; c < kCandidates; ++c) {
            drawn_here |= share_begin <= targets[c] && targets[c] < share_end;
        }
#pragma unroll
        for (int j = 0; j < kD; ++j) entry[j] = shared.candidates[candidate][j];
        unsigned long long passed = share_begin;
        for (int64_t first = begin; first < end; first += kSeedThreads) {
            const int64_t i = first + threadIdx.x;
            float nearest = 0.0f;
            if (i < end) {
                nearest = fminf(distance(i, entry), sample.nearest[i]);
                sample.nearest[i] = nearest;
            }
            if (!drawn_here) continue;
            const unsigned long long q = quantized(nearest, scale);
            const auto scan = block_scan<kSeedThreads>(q, shared.warps[0]);
            const unsigned long long upto = passed + scan.upto;
#pragma unroll
            for (int c = 0; c < kCandidates; ++c) {
                if (upto - q <= targets[c] && targets[c] < upto) put_down(c, i);
            }
            passed += scan.total;
        }
    }
};

// Entries [from, entries), once every point of the sample is an entry: any points.
template <int kD>
__device__ __forceinline__ void draw_uniformly(const SeedSample& sample, int64_t from,
                                               int64_t entries, const SeedRandom& random,
                                               int64_t drawn, float* codebook) {
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kSeedThreads + threadIdx.x;
    const int64_t threads = static_cast<int64_t>(gridDim.x) * kSeedThreads;
    for (int64_t k = from + thread; k < entries; k += threads) {
        const int64_t index = static_cast<int64_t>(
            random.below(drawn + k - from, static_cast<uint64_t>(sample.size)));
#pragma unroll
        for (int j = 0; j < kD; ++j) codebook[k * kD + j] = sample.x[j * sample.size + index];
    }
}

// k-means++ on the sample.
//   kD        d
//   sample    x and h in, nearest worked with
//   entries   K
//   drawn     how many random numbers have been used to draw the sample
//   board     zero at the start
//   codebook  out, [K, kD]
// Launched cooperatively: blocks meet at grid barriers. A block: a stretch of the sample, an equal
// share. Shared memory: SeedShared.
template <int kD>
__global__ void __launch_bounds__(kSeedThreads, 1)
    kmeans_plus_plus(SeedSample sample, int64_t entries, SeedRandom random, int64_t drawn,
                     SeedBoard* board, float* __restrict__ codebook) {
    const int64_t share = (sample.size + gridDim.x - 1) / gridDim.x;
    const int64_t begin = blockIdx.x * share < sample.size ? blockIdx.x * share : sample.size;
    const int64_t end = begin + share < sample.size ? begin + share : sample.size;
    SeedBlock<kD> block{sample, begin, end, *reinterpret_cast<SeedShared*>(shared_memory()), board};
    const uint64_t size = static_cast<uint64_t>(sample.size);
    unsigned generation = 0;
    block.start(static_cast<int64_t>(random.below(drawn++, size)));
    grid_barrier(&board->arrived, ++generation);
    const double scale = scale_to_bits(&board->largest, kDistanceBits);
    for (int64_t k = 0; k < entries; ++k) {
        block.read_candidates();
        block.consider(scale);
        grid_barrier(&board->arrived, ++generation);
        const int best = block.best_candidate();
        if (blockIdx.x == 0 && threadIdx.x < kD) {
            codebook[k * kD + threadIdx.x] = block.shared.candidates[best][threadIdx.x];
        }
        const unsigned long long total = block.shared.total[best];
        if (k + 1 == entries) return;
        if (total == 0) {
            draw_uniformly<kD>(sample, k + 1, entries, random, drawn, codebook);
            return;
        }
        uint64_t targets[kCandidates];
#pragma unroll
        for (int c = 0; c < kCandidates; ++c) targets[c] = random.below(drawn + c, total);
        drawn += kCandidates;
        block.accept(best, scale, targets);
        grid_barrier(&board->arrived, ++generation);
    }
}

}  // namespace nowag::cuda
