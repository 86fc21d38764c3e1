// normalize.h on a GPU, in three kernels, each bound by memory: W is read three times, the result
// written once (the second of the two reads of a row by normalize_rows comes from cache).
#pragma once

#include "cuda/base/device.cuh"
#include "nowag/normalize.h"

namespace nowag::cuda {

constexpr int kNormalizeThreads = 256;

// float(sqrt(squares) + eps): both norms.
__device__ __forceinline__ float norm_of(double squares) {
    return static_cast<float>(sqrt(squares) + kNormEps);
}

// A thread sums the squares of one column over kNormalizeRowBlock rows.
// block_sums [ceil(rows / kNormalizeRowBlock), cols]
template <DType kType>
__global__ void normalize_square_columns(const void* __restrict__ weight, int64_t rows,
                                         int64_t cols, int64_t row_stride,
                                         double* __restrict__ block_sums) {
    const int64_t j = static_cast<int64_t>(blockIdx.x) * kNormalizeThreads + threadIdx.x;
    if (j >= cols) return;
    const int64_t begin = static_cast<int64_t>(blockIdx.y) * kNormalizeRowBlock;
    const int64_t end = rows < begin + kNormalizeRowBlock ? rows : begin + kNormalizeRowBlock;
    double sum = 0.0;
#pragma unroll 8
    for (int64_t i = begin; i < end; ++i) {
        const double value = Element<kType>::load(weight, i * row_stride + j);
        sum += value * value;
    }
    block_sums[blockIdx.y * cols + j] = sum;
}

__global__ void normalize_column_norms(const double* __restrict__ block_sums, int64_t blocks,
                                       int64_t cols, float* __restrict__ col_norms);

// A warp a row, in the pinned order: a lane sums every 32nd element, then the lanes fold.
template <DType kType>
__global__ void normalize_rows(const void* __restrict__ weight, int64_t rows, int64_t cols,
                               int64_t row_stride, const float* __restrict__ col_norms,
                               float* __restrict__ out, float* __restrict__ row_norms) {
    const int lane = threadIdx.x % kWarpSize;
    const int64_t i =
        (static_cast<int64_t>(blockIdx.x) * kNormalizeThreads + threadIdx.x) / kWarpSize;
    if (i >= rows) return;
    double sum = 0.0;
#pragma unroll 4
    for (int64_t j = lane; j < cols; j += kWarpSize) {
        const double value = Element<kType>::load(weight, i * row_stride + j) / col_norms[j];
        sum += value * value;
    }
    for (int half = kWarpSize / 2; half > 0; half /= 2) {
        sum += __shfl_down_sync(kFullWarp, sum, half);
    }
    const float norm = norm_of(__shfl_sync(kFullWarp, sum, 0));
    if (lane == 0) row_norms[i] = norm;
#pragma unroll 4
    for (int64_t j = lane; j < cols; j += kWarpSize) {
        const float column = Element<kType>::load(weight, i * row_stride + j) / col_norms[j];
        out[i * cols + j] = column / norm;
    }
}

}  // namespace nowag::cuda
