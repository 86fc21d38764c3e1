// Normalisation of a weight matrix: columns first, then rows (NoWag, section "normalisation").
//
//   col_norms[j]  = float(sqrt(sum_i W[i, j]^2) + eps)
//   W1[i, j]      = W[i, j] / col_norms[j]
//   row_norms[i]  = float(sqrt(sum_j W1[i, j]^2) + eps)
//   out[i, j]     = W1[i, j] / row_norms[i]                    eps = 1e-5
//
// W is [rows, cols] of `dtype`, row i starting row_stride elements after row i - 1, elements of a
// row adjacent. Outputs are float32: out [rows, cols] contiguous, row_norms [rows], col_norms
// [cols]. Divisions are IEEE float32 divisions. Squares are exact in float64 and summed in float64
// in a fixed order, so results are the same bits on every instruction set, device and thread count:
//   columns: blocks of kNormalizeRowBlock rows, ascending within a block; then blocks ascending.
//   rows:    lane l of kNormalizeLanes sums elements j = l mod kNormalizeLanes, ascending; then
//            lane l += lane l + 16, + 8, + 4, + 2, + 1.
// A NaN or an infinity in W shows as a non-finite col_norm of its column.
#pragma once

#include <cstdint>

#include "nowag/dtype.h"
#include "nowag/operation.h"

namespace nowag {

constexpr double kNormEps = 1e-5;
constexpr int64_t kNormalizeRowBlock = 64;
constexpr int64_t kNormalizeLanes = 32;

NOWAG_DECLARE(normalize, const void* weight, DType dtype, int64_t rows, int64_t cols,
              int64_t row_stride, float* out, float* row_norms, float* col_norms);

}  // namespace nowag
