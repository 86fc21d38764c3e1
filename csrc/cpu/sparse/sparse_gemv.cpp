#include "nowag/sparse_gemv.h"

#include <algorithm>
#include <vector>

#include "cpu/base/failure.h"
#include "cpu/base/parallel.h"
#include "cpu/base/simd.h"
#include "cpu/sparse/sparse_gemv_table.h"
#include "cpu/sparse/sparse_pack_values.h"
#include "nowag/format.h"

namespace nowag::cpu {
namespace {

const SparseGemvTable& table() {
#ifdef NOWAG_X86
    return *simd_pick(&kSparseGemvScalar, &kSparseGemvAvx2, &kSparseGemvAvx512,
                      &kSparseGemvAvx512Vbmi);
#else
    return kSparseGemvScalar;
#endif
}

// x as floats, every token padded with zeros to whole words of the bitmap, and arranged.
std::vector<float> arranged_floats(const void* x, DType dtype, int64_t tokens, int64_t cols,
                                   int64_t stride, DType values_dtype) {
    std::vector<float> floats(static_cast<size_t>(tokens * stride));
    const auto arrange = table().arrange[static_cast<int>(values_dtype)];
    for (int64_t t = 0; t < tokens; ++t) {
        float* token = &floats[static_cast<size_t>(t * stride)];
        for (int64_t j = 0; j < cols; ++j) token[j] = load_float(x, t * cols + j, dtype);
        if (arrange != nullptr) arrange(token, stride);
    }
    return floats;
}

}  // namespace

Status sparse_gemv(const void* x, DType dtype, int64_t tokens, const uint8_t* bitmap,
                   const void* values, DType values_dtype, const int32_t* row_offsets, int64_t kept,
                   const void* bias, int64_t rows, int64_t cols, void* y, int threads) try {
    if (rows < 1 || cols < 1 || tokens < 1 || tokens > kSparseGemvMaxTokens || threads < 1 ||
        !valid_offsets(row_offsets, rows, kept)) {
        return Status::invalid_argument;
    }
    const int64_t row_bytes = bitmap_row_bytes(cols);
    const int64_t stride = 8 * row_bytes;
    const std::vector<float> floats = arranged_floats(x, dtype, tokens, cols, stride, values_dtype);
    const ReadableValues readable(values, values_dtype, kept, row_offsets, cols);
    const auto dot = table().dot[static_cast<int>(values_dtype)];
    parallel_for(ceil_div(rows, kSparseGemvBlockRows), threads, [&](int64_t index) {
        const int64_t begin = index * kSparseGemvBlockRows;
        SparseGemvBlock block{floats.data(),
                              stride,
                              tokens,
                              bitmap + begin * row_bytes,
                              row_bytes,
                              std::min(kSparseGemvBlockRows, rows - begin),
                              {}};
        for (int64_t r = 0; r < block.rows; ++r) block.values[r] = readable.row(begin + r);
        float sums[kSparseGemvBlockRows * kSparseGemvMaxTokens];
        dot(block, sums);
        for (int64_t t = 0; t < tokens; ++t) {
            for (int64_t r = 0; r < block.rows; ++r) {
                const int64_t i = begin + r;
                const float shift = bias == nullptr ? 0.0f : load_float(bias, i, dtype);
                store_float(y, t * rows + i, dtype, sums[t * block.rows + r] + shift);
            }
        }
    });
    return Status::ok;
} catch (...) {
    return failure();
}

}  // namespace nowag::cpu
