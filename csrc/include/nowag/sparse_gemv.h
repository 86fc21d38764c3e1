// y = x W^T + bias for few tokens, straight from the sparse form (format.h), unstructured or N:M.
//
//   x     [tokens, cols] of `dtype`, contiguous;  y [tokens, rows] of `dtype`, contiguous
//   bias  [rows] of `dtype`, or null
//   values are of values_dtype, which need not be `dtype`.
//
// Accumulation is float32 (on a GPU's tensor cores, where x and the values have the same 16-bit
// type and x, its rows and the values begin at multiples of 16 bytes); rounded to `dtype` once,
// after the bias. A token's outputs do not depend on the other tokens or on the number of threads;
// they may differ between instruction sets in the last bits. Error bound, up to 50000 cols:
//   |y - y64| <= 8e-6 * sum over j of |x_j W_ij| + rounding to `dtype`.
// It holds because no product goes through more than 134 roundings of 2^-24: sums of at most 64
// products, summed up over 1024 columns, those over the row; or, by tensor cores, as
// csrc/cuda/sparse/sparse_gemv_mma.cuh says.
// An input that is not finite makes the outputs of its token inf or NaN in the rows that keep its
// column; by tensor cores in all rows. Values that row_offsets or bitmap claim and that are not
// among the `kept` ones are never read (format.h); what y is then is not specified.
#pragma once

#include <cstdint>

#include "nowag/dtype.h"
#include "nowag/operation.h"

namespace nowag {

constexpr int64_t kSparseGemvMaxTokens = 16;

NOWAG_DECLARE(sparse_gemv, const void* x, DType dtype, int64_t tokens, const uint8_t* bitmap,
              const void* values, DType values_dtype, const int32_t* row_offsets, int64_t kept,
              const void* bias, int64_t rows, int64_t cols, void* y);

}  // namespace nowag
