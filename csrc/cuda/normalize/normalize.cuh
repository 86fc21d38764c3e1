// normalize.h on a GPU, in three kernels: W is read three times, the result written once (the
// second of the two reads of a row by normalize_rows comes from cache).
// Measured on an H100, 4096 x 4096 float32: 171 us, of which normalize_rows 134.
#pragma once

#include "cuda/base/device.cuh"
#include "nowag/normalize.h"

namespace nowag::cuda {

constexpr int kNormalizeThreads = 256;

// float(sqrt(squares) + eps): both norms.
__device__ __forceinline__ float norm_of(double squares) {
    return static_cast<float>(sqrt(squares) + kNormEps);
}

// Sums the squares of each column over blocks of rows.
//   kType       of W
//   weight      W [rows, cols], rows row_stride elements apart
//   block_sums  out, [ceil(rows / kNormalizeRowBlock), cols]
// Block (x, y): kNormalizeThreads columns, block y of kNormalizeRowBlock rows; a thread: one column
// of it. Bound by memory: 31 us, the time of reading W once.
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

// Adds the blocks of a column up, ascending.
//   block_sums  [blocks, cols], of normalize_square_columns
//   col_norms   out, [cols]
// A thread: one column. 6 us: a chain of loads, 8 at a time.
__global__ void normalize_column_norms(const double* __restrict__ block_sums, int64_t blocks,
                                       int64_t cols, float* __restrict__ col_norms);

// Normalises rows, in the pinned order: a lane sums every 32nd element, then the lanes fold.
//   kType      of W
//   weight     W [rows, cols], rows row_stride elements apart
//   col_norms  [cols], of normalize_column_norms
//   out        [rows, cols]
//   row_norms  out, [rows]
// A warp: one row. 134 us, three times what its bytes take: each element is divided three times.
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
