#include <algorithm>

#include "cuda/base/dispatch.h"
#include "cuda/base/launch.h"
#include "cuda/normalize/normalize.cuh"
#include "nowag/normalize.h"

namespace nowag::cuda {

__global__ void normalize_column_norms(const double* __restrict__ block_sums, int64_t blocks,
                                       int64_t cols, float* __restrict__ col_norms) {
    const int64_t j = static_cast<int64_t>(blockIdx.x) * kNormalizeThreads + threadIdx.x;
    if (j >= cols) return;
    double sum = block_sums[j];
#pragma unroll 8
    for (int64_t block = 1; block < blocks; ++block) sum += block_sums[block * cols + j];
    col_norms[j] = norm_of(sum);
}

namespace {

unsigned row_threads(int64_t cols) {
    const int64_t warps = ceil_div(cols, kNormalizeRowElements * kWarpSize);
    return static_cast<unsigned>(
        std::min(warps * kWarpSize, static_cast<int64_t>(kNormalizeMaxRowThreads)));
}

template <DType kType>
Status normalize_typed(const void* weight, int64_t rows, int64_t cols, int64_t row_stride,
                       float* out, float* row_norms, float* col_norms, double* block_sums,
                       Stream stream) {
    const unsigned column_blocks = blocks_for(cols, kNormalizeThreads);
    const unsigned row_blocks = blocks_for(rows, kNormalizeRowBlock);
    const int64_t room = device_limits().shared_bytes / static_cast<int64_t>(sizeof(float)) - 1;
    const int kept = static_cast<int>(std::min(cols, room));
    return in_order(
        [&] {
            return launch(normalize_square_columns<kType>, dim3(column_blocks, row_blocks),
                          kNormalizeThreads, 0, stream, weight, rows, cols, row_stride, block_sums);
        },
        [&] {
            return launch(normalize_column_norms, column_blocks, kNormalizeThreads, 0, stream,
                          block_sums, static_cast<int64_t>(row_blocks), cols, col_norms);
        },
        [&] {
            return launch(normalize_rows<kType>, static_cast<unsigned>(rows), row_threads(cols),
                          sizeof(float) * static_cast<size_t>(kept + 1), stream, weight, cols,
                          row_stride, kept, col_norms, out, row_norms);
        });
}

}  // namespace

int64_t normalize_workspace(const void*, DType, int64_t rows, int64_t cols, int64_t, float*, float*,
                            float*) {
    return ceil_div(rows, kNormalizeRowBlock) * cols * static_cast<int64_t>(sizeof(double));
}

Status normalize(const void* weight, DType dtype, int64_t rows, int64_t cols, int64_t row_stride,
                 float* out, float* row_norms, float* col_norms, void* workspace, Stream stream) {
    if (rows < 1 || cols < 1 || row_stride < cols || rows > kMaxGridY * kNormalizeRowBlock) {
        return Status::invalid_argument;
    }
    return with_dtype(dtype, [&](auto type) {
        return normalize_typed<type.value>(weight, rows, cols, row_stride, out, row_norms,
                                           col_norms, static_cast<double*>(workspace), stream);
    });
}

}  // namespace nowag::cuda
