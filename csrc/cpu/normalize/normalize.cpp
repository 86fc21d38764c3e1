#include "nowag/normalize.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/base/buffer.h"
#include "cpu/base/failure.h"
#include "cpu/base/huge_pages.h"
#include "cpu/base/parallel.h"
#include "cpu/base/simd.h"
#include "cpu/normalize/normalize_table.h"
#include "nowag/format.h"

namespace nowag::cpu {
namespace {

const NormalizeTable* table() {
#ifdef NOWAG_X86
    return simd_pick(&kNormalizeScalar, &kNormalizeAvx2, &kNormalizeAvx512,
                     static_cast<const NormalizeTable*>(nullptr));
#else
    return &kNormalizeScalar;
#endif
}

// Row i as floats: itself if it is float32 already, else converted into scratch.
const float* float_row(const NormalizeTable& kernel, const void* weight, DType dtype,
                       int64_t row_stride, int64_t i, int64_t cols, float* scratch) {
    const auto* row = static_cast<const uint8_t*>(weight) + i * row_stride * dtype_size(dtype);
    if (dtype == DType::float32) return reinterpret_cast<const float*>(row);
    kernel.convert(row, dtype, cols, scratch, DType::float32);
    return scratch;
}

}  // namespace

Status normalize(const void* weight, DType dtype, int64_t rows, int64_t cols, int64_t row_stride,
                 float* out, float* row_norms, float* col_norms, int threads) try {
    if (rows < 1 || cols < 1 || row_stride < cols || threads < 1) return Status::invalid_argument;
    const NormalizeTable& kernel = *table();
    const int64_t blocks = ceil_div(rows, kNormalizeRowBlock);
    advise_huge_pages(out, rows * cols * int64_t{sizeof(float)});

    // A row of floats for each thread.
    const Buffer<float> rows_of_floats = buffer<float>(threads * cols);
    const auto scratch = [&] { return rows_of_floats.get() + omp_get_thread_num() * cols; };
    std::vector<double> block_sums(static_cast<size_t>(blocks * cols), 0.0);
    parallel_for(blocks, threads, [&](int64_t block) {
        const int64_t end = std::min(rows, (block + 1) * kNormalizeRowBlock);
        for (int64_t i = block * kNormalizeRowBlock; i < end; ++i) {
            const float* row = float_row(kernel, weight, dtype, row_stride, i, cols, scratch());
            kernel.add_squares(row, cols, &block_sums[static_cast<size_t>(block * cols)]);
        }
    });
    for (int64_t block = 1; block < blocks; ++block) {
        for (int64_t j = 0; j < cols; ++j) {
            block_sums[static_cast<size_t>(j)] += block_sums[static_cast<size_t>(block * cols + j)];
        }
    }
    for (int64_t j = 0; j < cols; ++j) {
        col_norms[j] = static_cast<float>(std::sqrt(block_sums[static_cast<size_t>(j)]) + kNormEps);
    }

    parallel_for(blocks, threads, [&](int64_t block) {
        const int64_t end = std::min(rows, (block + 1) * kNormalizeRowBlock);
        for (int64_t i = block * kNormalizeRowBlock; i < end; ++i) {
            const float* row = float_row(kernel, weight, dtype, row_stride, i, cols, scratch());
            row_norms[i] = kernel.normalize_row(row, col_norms, cols, out + i * cols);
        }
    });
    return Status::ok;
} catch (...) {
    return failure();
}

}  // namespace nowag::cpu
