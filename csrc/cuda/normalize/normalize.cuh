// normalize.h on a GPU, in three kernels: W is read twice, the result written once.
// Predicted for an H100, 4096 x 4096 float32: 97 us.
#pragma once

#include "cuda/base/device.cuh"
#include "nowag/normalize.h"

namespace nowag::cuda {

constexpr int kNormalizeThreads = 256;
constexpr int kNormalizeMaxRowThreads = 1024;  // of a block of normalize_rows
constexpr int64_t kNormalizeRowElements = 16;  // that a thread of it divides, in most layers
constexpr int kNormalizeBatch = 4;             // of these that it loads at a time

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
//   kept       how many elements of a row fit into shared memory; those past them are read and
//              divided again in each step
//   col_norms  [cols], of normalize_column_norms
//   out        [rows, cols]
//   row_norms  out, [rows]
// A block: one row. Its threads divide by the columns' norms into shared memory, the first warp
// sums the squares, all divide by the norm: W is read once and an element divided twice. While one
// block waits in its chain of additions, others of the multiprocessor read. Shared memory: kept + 1
// floats.
// Predicted for an H100, 4096 x 4096 float32: 58 us, where the 134 MB take 45 at 3 TB/s. 8 blocks
// have 32 KB a multiprocessor on their way while they read, issue takes 30 us (56 instructions an
// element), and a block's chain is 128 additions of 16 clocks, 1.2 us in each of 4 rounds. A warp a
// row took 134: its loop had one load a thread on the way, and read W twice from memory.
template <DType kType>
__global__ void __launch_bounds__(kNormalizeMaxRowThreads)
    normalize_rows(const void* __restrict__ weight, int64_t cols, int64_t row_stride, int kept,
                   const float* __restrict__ col_norms, float* __restrict__ out,
                   float* __restrict__ row_norms) {
    using Stored = typename Element<kType>::Stored;
    float* row = reinterpret_cast<float*>(shared_memory());
    float& shared_norm = row[kept];
    const int64_t i = blockIdx.x;
    const Stored* weight_row = static_cast<const Stored*>(weight) + i * row_stride;
    const auto by_column = [&](int64_t j) {
        return Element<kType>::load(weight_row, j) / col_norms[j];
    };
    const int thread = threadIdx.x, threads = blockDim.x;
    // Several loads on their way before the first division, past which the compiler moves none.
    // Past the end of the row: the first element once more.
#pragma unroll 1
    for (int first = thread; first < kept; first += kNormalizeBatch * threads) {
        int columns[kNormalizeBatch];
        float values[kNormalizeBatch], norms[kNormalizeBatch];
#pragma unroll
        for (int e = 0; e < kNormalizeBatch; ++e) {
            columns[e] = first + e * threads < kept ? first + e * threads : first;
            values[e] = Element<kType>::load(weight_row, columns[e]);
            norms[e] = col_norms[columns[e]];
        }
#pragma unroll
        for (int e = 0; e < kNormalizeBatch; ++e) row[columns[e]] = values[e] / norms[e];
    }
    __syncthreads();
    if (thread < kWarpSize) {
        double sum = 0.0;
        const auto add_square = [&](double value) { sum += value * value; };
        int64_t j = thread;
#pragma unroll 8
        for (; j < kept; j += kWarpSize) add_square(row[j]);
#pragma unroll 1
        for (; j < cols; j += kWarpSize) add_square(by_column(j));
        for (int half = kWarpSize / 2; half > 0; half /= 2) {
            sum += __shfl_down_sync(kFullWarp, sum, half);
        }
        if (thread == 0) row_norms[i] = shared_norm = norm_of(sum);
    }
    __syncthreads();
    const float norm = shared_norm;
    float* out_row = out + i * cols;
    int64_t j = thread;
#pragma unroll 1
    for (; j < kept; j += threads) out_row[j] = row[j] / norm;
#pragma unroll 1
    for (; j < cols; j += threads) out_row[j] = by_column(j) / norm;
}

}  // namespace nowag::cuda
