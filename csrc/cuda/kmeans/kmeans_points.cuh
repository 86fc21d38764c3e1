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
#pragma unroll
    for (int j = 0; j < kD; ++j) {
        x[j] = position * kD + j < problem.cols ? source[j] : 0.0f;
    }
}

__device__ __forceinline__ void add_integer(int64_t* sum, int64_t value) {
    atomicAdd(reinterpret_cast<unsigned long long*>(sum), static_cast<unsigned long long>(value));
}

// Adds the point to the sums of `entry`, or takes it out. Integers: any order gives the same sums.
template <int kD>
__device__ __forceinline__ void add_point(int64_t* sums, unsigned entry, const float (&x)[kD],
                                          const float* h, double scale, int64_t sign) {
    int64_t* sum = sums + static_cast<int64_t>(entry) * (2 * kD + 1);
#pragma unroll
    for (int j = 0; j < kD; ++j) {
        const double weight = h[j];
        add_integer(sum + j, sign * round_to_integer(weight * x[j] * scale));
        add_integer(sum + kD + j, sign * round_to_integer(weight * scale));
    }
    add_integer(sum + 2 * kD, sign);
}

// Stores the code of a point and moves it between the sums; whether it counts as changed.
template <int kD>
__device__ __forceinline__ bool settle_point(const KmeansProblem& problem, int64_t row,
                                             int64_t position, const float* h, unsigned entry,
                                             double scale, bool warm) {
    uint16_t& code = problem.codes[row * positions_of(problem, kD) + position];
    const unsigned before = warm ? code : 0u;
    if (warm && before == entry) return false;
    code = static_cast<uint16_t>(entry);
    if (problem.sums != nullptr) {
        float x[kD];
        read_point<kD>(problem, row, position, x);
        if (warm) add_point<kD>(problem.sums, before, x, h, scale, -1);
        add_point<kD>(problem.sums, entry, x, h, scale, 1);
    }
    return true;
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
