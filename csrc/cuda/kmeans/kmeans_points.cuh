// What the k-means kernels share: the padded sub-vectors of a problem, their sums.
#pragma once

#include "cuda/base/device.cuh"
#include "nowag/format.h"
#include "nowag/kmeans.h"

namespace nowag::cuda {

__device__ __forceinline__ int64_t positions_of(const KmeansProblem& problem, int d) {
    return (problem.cols + d - 1) / d;
}

// The point of `row` at `position`, its padding 0.
template <int kD>
__device__ __forceinline__ void read_point(const KmeansProblem& problem, int64_t row,
                                           int64_t position, float (&x)[kD]) {
    const float* source = problem.w + row * problem.cols + position * kD;
    const int64_t inside = problem.cols - position * kD;
#pragma unroll
    for (int j = 0; j < kD; ++j) x[j] = j < inside ? source[j] : 0.0f;
}

__device__ __forceinline__ void add_integer(int64_t* sum, int64_t value) {
    atomicAdd(reinterpret_cast<unsigned long long*>(sum), static_cast<unsigned long long>(value));
}

// Takes the points of the lanes in `moved` out of the sums of entry `before`, if warm, and adds
// them to those of `entry`. Integers: any order gives the same sums. The warp together, one point
// after another and a lane a sum, so that its atomic operations meet in few sectors: 13 sums are 4
// or 5 of 32 bytes. Every lane calls it, with the same position.
// It is what a first assignment waits for: on an H100 that of 4096 x 4096, d = 4, K = 256 took 0.85
// ms longer than the others, with a lane a point and 38 M operations in as many sectors. Predicted:
// 0.4, issue of 60 instructions a point.
template <int kD>
__device__ __forceinline__ void move_points(const KmeansProblem& problem, unsigned moved,
                                            int64_t row, int64_t position, unsigned before,
                                            unsigned entry, double scale, bool warm) {
    constexpr int kSums = 2 * kD + 1;
    const int lane = threadIdx.x % kWarpSize;
    float x[kD] = {};
    if (moved >> lane & 1) read_point<kD>(problem, row, position, x);
    for (; moved != 0; moved &= moved - 1) {
        const int source = lowest_bit(moved);
        const int64_t from = __shfl_sync(kFullWarp, before, source);
        const int64_t to = __shfl_sync(kFullWarp, entry, source);
        float point[kD];
#pragma unroll
        for (int j = 0; j < kD; ++j) point[j] = __shfl_sync(kFullWarp, x[j], source);
        for (int i = lane; i < (warm ? 2 * kSums : kSums); i += kWarpSize) {
            const int sum = i < kSums ? i : i - kSums;
            int64_t value = 1;  // the last is the number of points
            if (sum < 2 * kD) {
                const int coordinate = sum < kD ? sum : sum - kD;
                double weight = problem.h[position * kD + coordinate];
#pragma unroll
                for (int j = 0; j < kD; ++j) {
                    if (sum == j) weight *= point[j];
                }
                value = round_to_integer(weight * scale);
            }
            const int64_t first = (i < kSums ? to : from) * kSums;
            add_integer(problem.sums + first + sum, i < kSums ? value : -value);
        }
    }
}

// Stores the code of the point of `row`, if there is such a row, and moves it between the sums;
// whether it counts as changed. Every lane of a warp calls it, with the same position.
template <int kD>
__device__ __forceinline__ bool settle_point(const KmeansProblem& problem, int64_t row,
                                             int64_t position, unsigned entry, double scale,
                                             bool warm) {
    bool moved = row < problem.rows;
    unsigned before = 0;
    if (moved) {
        uint16_t& code = problem.codes[row * positions_of(problem, kD) + position];
        if (warm) before = code;
        moved = !warm || before != entry;
        if (moved) code = static_cast<uint16_t>(entry);
    }
    if (problem.sums != nullptr) {
        move_points<kD>(problem, __ballot_sync(kFullWarp, moved), row, position, before, entry,
                        scale, warm);
    }
    return moved;
}

// Adds to *changed in how many threads of the block `moved` is true. Every thread calls it.
__device__ __forceinline__ void count_changed(bool moved, unsigned long long* changed) {
    const int total = __syncthreads_count(moved);
    if (threadIdx.x == 0 && total > 0) {
        atomicAdd(changed, static_cast<unsigned long long>(total));
    }
}

// The pinned bias of kmeans.h.
template <int kD>
__device__ __forceinline__ float bias_of(const float* h, const float (&c)[kD]) {
    float bias = 0.0f;
#pragma unroll
    for (int j = 0; j < kD; ++j) bias = fused(h[j] * c[j], c[j], bias);
    return bias;
}

}  // namespace nowag::cuda
