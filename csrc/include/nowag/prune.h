// Selection of the weights to prune (NoWag-P), by saliency in float32, with two roundings:
//   S[i, j] = h[j] * (Wn[i, j] * Wn[i, j]),   h = act_norms^2 / mean(act_norms^2) >= 0, Wn finite.
//
// The result is a bitmap of the weights that are KEPT, as in format.h: uint8
// [rows, 8 * ceil(cols / 64)], bits past cols are 0.
//   unstructured: of all rows * cols weights exactly n_prune are pruned: the smallest saliencies;
//                 among equal saliencies the lower flat index i * cols + j first (the result of a
//                 stable ascending sort).
//   N:M:          in each group of m consecutive inputs of a row the m - n smallest are pruned,
//                 ties likewise. cols is a multiple of m; 1 <= n <= m <= 32.
#pragma once

#include <cstdint>

#include "nowag/status.h"

namespace nowag {

constexpr int64_t kObjectiveLanes = 8;

namespace cpu {

Status prune_select(const float* w, const float* h, int64_t rows, int64_t cols, int64_t n_prune,
                    uint8_t* bitmap, int threads);

Status prune_select_nm(const float* w, const float* h, int64_t rows, int64_t cols, int n, int m,
                       uint8_t* bitmap, int threads);

// sums[0] = sum of the pruned saliencies, sums[1] = sum of all, where a saliency is
// h[j] * (Wn[i, j] * Wn[i, j]) in float64 (the square is exact). Fixed order, whatever the
// instruction set: lane l of kObjectiveLanes sums j = l mod kObjectiveLanes of a row, ascending;
// then lane l += lane l + 4, + 2, + 1; then rows ascending.
Status prune_objective(const float* w, const float* h, const uint8_t* bitmap, int64_t rows,
                       int64_t cols, double* sums, int threads);

}  // namespace cpu
}  // namespace nowag
