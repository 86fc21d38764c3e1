// Seeding (kmeans.h) on a GPU in as many launches as there are matrices, plus one.
//
// k-means++ chooses entries one after another, so one kernel stays on the device for all of them:
// its blocks each keep a stretch of the sample and meet at a grid-wide barrier twice an entry, once
// to know how much distance every block has left, once to learn which point was drawn. About 4 us
// an entry, most of it waiting at the barriers.
#pragma once

#include "kmeans_points.cuh"

namespace nowag::cuda {

constexpr int kSeedThreads = 512;
constexpr int kSeedWarps = kSeedThreads / kWarpSize;
constexpr int kMaxSeedBlocks = 256;
constexpr int64_t kSeedPointsPerBlock = 1024;  // fewer would only make the barrier wider

// splitmix64 as a function of how many numbers were drawn before.
struct SeedRandom {
    static constexpr uint64_t kIncrement = 0x9e3779b97f4a7c15u;
    uint64_t start;

    static __device__ __host__ uint64_t mix(uint64_t bits) {
        bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
        bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
        return bits ^ (bits >> 31);
    }

    __device__ uint64_t below(int64_t drawn, uint64_t n) const {
        return product_high(mix(start + static_cast<uint64_t>(drawn + 1) * kIncrement), n);
    }
};

// The points of one problem among all: [first, first + count).
struct SeedRange {
    int64_t first;
    int64_t count;
    int64_t total;  // points of all problems
};

// The sample, coordinate by coordinate: x and h [d, size], nearest [size].
struct SeedSample {
    float* x;
    float* h;
    float* nearest;
    int64_t size;
};

// What the blocks of kmeans_plus_plus tell each other; all zero at the start. Two of each, for even
// and odd entries: a block may be one barrier ahead of another.
struct SeedBoard {
    unsigned arrived;
    unsigned largest;  // bits of the largest distance to the first entry
    unsigned long long sums[2][kMaxSeedBlocks];
    float entry[2][kMaxSubvector];
};

// Draws one point of each of `wanted` strata; those that fall into this problem are written to
// x [point * x_point + j * x_coordinate], and h likewise where not null.
struct SeedTarget {
    float* x;
    float* h;
    int64_t point_stride;
    int64_t coordinate_stride;
};

template <int kD>
__global__ void kmeans_draw_strata(KmeansProblem problem, SeedRange range, int64_t wanted,
                                   SeedRandom random, SeedTarget target) {
    const int64_t s = static_cast<int64_t>(blockIdx.x) * kSeedThreads + threadIdx.x;
    if (s >= wanted) return;
    const int64_t low = s * range.total / wanted, high = (s + 1) * range.total / wanted;
    const int64_t drawn =
        low + static_cast<int64_t>(random.below(s, static_cast<uint64_t>(high - low)));
    const int64_t point = drawn - range.first;
    if (point < 0 || point >= range.count) return;
    const int64_t positions = positions_of(problem, kD), position = point % positions;
    float x[kD];
    read_point<kD>(problem, point / positions, position, x);
#pragma unroll
    for (int j = 0; j < kD; ++j) {
        const int64_t place = s * target.point_stride + j * target.coordinate_stride;
        target.x[place] = x[j];
        if (target.h != nullptr) target.h[place] = problem.h[position * kD + j];
    }
}

// Waits until every block of the grid has come here `generation` times. Blocks must all be
// resident.
__device__ __forceinline__ void grid_barrier(unsigned* arrived, unsigned generation) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(arrived, 1u);
        const volatile unsigned* count = arrived;
        while (*count < generation * gridDim.x) spin_pause();
        __threadfence();
    }
    __syncthreads();
}

__device__ __forceinline__ unsigned long long warp_sum(unsigned long long value) {
    for (int flip = kWarpSize / 2; flip > 0; flip /= 2) {
        value += __shfl_xor_sync(kFullWarp, value, flip);
    }
    return value;
}

// The sum over the block, in every thread. shared: kSeedWarps numbers.
__device__ __forceinline__ unsigned long long block_sum(unsigned long long value,
                                                        unsigned long long* shared) {
    value = warp_sum(value);
    __syncthreads();
    if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = value;
    __syncthreads();
    unsigned long long sum = 0;
    for (int warp = 0; warp < kSeedWarps; ++warp) sum += shared[warp];
    return sum;
}

__device__ __forceinline__ unsigned long long quantized(float distance, double scale) {
    return static_cast<unsigned long long>(round_to_integer(distance * scale));
}

// A block's stretch of the sample and what it does with it for one entry.
template <int kD>
struct SeedBlock {
    SeedSample sample;
    int64_t begin, end;
    unsigned long long* shared;  // kSeedWarps + 1 numbers

    // Brings every distance down to `entry`; returns the sum of q over the block, and the largest
    // distance of this thread.
    __device__ unsigned long long narrow(const float (&entry)[kD], double scale, float* largest) {
        unsigned long long sum = 0;
        for (int64_t i = begin + threadIdx.x; i < end; i += kSeedThreads) {
            float distance = 0.0f;
#pragma unroll
            for (int j = 0; j < kD; ++j) {
                const float t = sample.x[j * sample.size + i] - entry[j];
                distance = fused(sample.h[j * sample.size + i] * t, t, distance);
            }
            distance = fminf(distance, sample.nearest[i]);
            sample.nearest[i] = distance;
            *largest = fmaxf(*largest, distance);
            sum += quantized(distance, scale);
        }
        return block_sum(sum, shared);
    }

    // The point of this block whose share of the running sum of q holds `target`.
    __device__ int64_t find(unsigned long long target, double scale) {
        const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
        for (int64_t first = begin; first < end; first += kSeedThreads) {
            const int64_t i = first + threadIdx.x;
            const unsigned long long q = i < end ? quantized(sample.nearest[i], scale) : 0u;
            unsigned long long upto = q;
            for (int step = 1; step < kWarpSize; step *= 2) {
                const unsigned long long before = __shfl_up_sync(kFullWarp, upto, step);
                if (lane >= step) upto += before;
            }
            const unsigned long long total = block_sum(q, shared);
            for (int other = 0; other < warp; ++other) {
                upto += shared[other];
            }
            if (upto - q <= target && target < upto)
                shared[kSeedWarps] = static_cast<unsigned long long>(i);
            if (target < total) break;
            target -= total;
        }
        __syncthreads();
        return static_cast<int64_t>(shared[kSeedWarps]);
    }
};

// k-means++ on the sample; `drawn` numbers have been used to draw it. Launched cooperatively.
template <int kD>
__global__ void __launch_bounds__(kSeedThreads, 1)
    kmeans_plus_plus(SeedSample sample, int64_t entries, SeedRandom random, int64_t drawn,
                     SeedBoard* board, float* __restrict__ codebook) {
    const int64_t share = (sample.size + gridDim.x - 1) / gridDim.x;
    const int64_t begin = blockIdx.x * share;
    SeedBlock<kD> block{sample, begin < sample.size ? begin : sample.size,
                        begin + share < sample.size ? begin + share : sample.size,
                        reinterpret_cast<unsigned long long*>(shared_memory())};
    for (int64_t i = block.begin + threadIdx.x; i < block.end; i += kSeedThreads) {
        sample.nearest[i] = INFINITY;
    }
    double scale = 1.0;
    unsigned generation = 0;
    unsigned long long total = 0;
    for (int64_t k = 0; k < entries; ++k) {
        volatile unsigned long long* sums = board->sums[(k + 1) % 2];
        volatile float* chosen = board->entry[k % 2];
        // The block that holds the drawn point, and the target within it.
        unsigned long long target = 0;
        int64_t index = -1;
        if (total == 0) {
            index =
                static_cast<int64_t>(random.below(drawn + k, static_cast<uint64_t>(sample.size)));
            if (index < block.begin || index >= block.end) index = -1;
        } else {
            target = random.below(drawn + k, total);
            unsigned owner = 0;
            while (target >= sums[owner]) target -= sums[owner++];
            if (owner == blockIdx.x) index = block.find(target, scale);
        }
        if (index >= 0 && threadIdx.x < kD) {
            const float value = sample.x[threadIdx.x * sample.size + index];
            chosen[threadIdx.x] = value;
            codebook[k * kD + threadIdx.x] = value;
        }
        grid_barrier(&board->arrived, ++generation);
        float entry[kD], largest = 0.0f;
#pragma unroll
        for (int j = 0; j < kD; ++j) entry[j] = chosen[j];
        unsigned long long sum = block.narrow(entry, scale, &largest);
        if (k == 0) {
            atomicMax(&board->largest, __float_as_uint(largest));
            grid_barrier(&board->arrived, ++generation);
            const volatile unsigned* bits = &board->largest;
            int exponent = 0;
            frexpf(__uint_as_float(*bits), &exponent);
            scale = ldexp(1.0, 40 - exponent);
            sum = block.narrow(entry, scale, &largest);
        }
        volatile unsigned long long* next = board->sums[k % 2];
        if (threadIdx.x == 0) next[blockIdx.x] = sum;
        grid_barrier(&board->arrived, ++generation);
        total = 0;
        for (unsigned other = 0; other < gridDim.x; ++other) total += next[other];
    }
}

}  // namespace nowag::cuda
