// y = x W^T + bias for few tokens, straight from the packed form (format.h); W is never expanded.
//
//   x     [tokens, cols] of `dtype`, contiguous;  y [tokens, rows] of `dtype`, contiguous
//   bias  [rows] of `dtype`, or null
//   y[t, i] = row_norms[i] * sum_p T_p[code(i, p)] + bias[i],   T_p[k] = sum_j (x_j col_norms_j)
//   c_kj
//
// Two algorithms; which one runs depends on the instruction set and the layer's shape only.
//   decode: fetches the codebook entry of each code and multiplies. float32 throughout.
//   lookup: computes T_p once for every position and adds T_p[code] for every row. Codes of 8 bits
//           on AVX-512 VBMI: T_p is rounded to 16-bit integers, and sums of integers are exact.
//           Each group of at most kVqLookupGroup positions has two scales, one for the positions
//           whose products are small, one for the others (those of a model's outlier channels).
// The sum, times the norm, plus the bias is rounded to `dtype` once. A token's outputs do not
// depend on the other tokens or on the number of threads. They differ between instruction sets,
// within
//
// Error bound, y64 being the same product in float64:
//   |y - y64| <= 8e-6 * sum_j |x_j W_ij| + rounding to `dtype`                     and, for lookup,
//                + row_norms[i] * sum over groups and scales of (their positions) * L / 62000,
//                L = their largest  sum_j |x_j col_norms_j| max_k |c_kj|,  a bound of |T_p[k]|.
// In practice rounding errors cancel: ||y - y64|| / ||y64|| <= 2e-3 on inputs with outlier channels
// (tested; on SmolLM2's layers with its own activations 1e-3 at most, 2e-4 typically).
#pragma once

#include <cstdint>

#include "nowag/dtype.h"
#include "nowag/status.h"

namespace nowag {

// The most tokens the kernel takes; ops.py dequantises tiles into a dense GEMM beyond.
constexpr int64_t kVqGemvMaxTokens = 16;

// The most positions whose tables share one scale: 16-bit sums of 256 bytes cannot overflow, and
// the tables, 128 KiB, stay in an L2 cache. Long runs of positions let codes stream from memory.
constexpr int64_t kVqLookupGroup = 256;

namespace cpu {

Status vq_gemv(const void* x, DType dtype, int64_t tokens, const uint8_t* packed,
               const uint16_t* codebook, const uint16_t* row_norms, const uint16_t* col_norms,
               const void* bias, int64_t rows, int64_t cols, int d, int code_bits, void* y,
               int threads);

}  // namespace cpu
}  // namespace nowag
