// Assignment with error feedback: NoWag-VQ under the full Hessian of a layer's inputs.
//
// The metric of a layer is V V^T, V float32 upper triangular, with rows and columns in the order in
// which positions are settled (nowag_ext/hessian.py). The squared error of a row, (x - q) V V^T
// (x - q)^T, is a sum over positions, in that order, of |y_p - e_p|^2: e_p = c V_pp for the entry c
// chosen, V_pp being the d x d block of V, and y_p = x_p V_pp + what the errors x - q of all
// positions before carry here through V. So positions are settled one after another, each by the
// search of kmeans.h for y among the entries e, in the plain metric: this is the feedback of GPTQ
// (Frantar et al., 2022) and GPTVQ (van Baalen et al., 2024) without an inverse.
//
// A call settles a block of positions, columns [0, n), n = positions * d, of operands that begin
// there; the errors of earlier blocks come in `carried`, summed up by a matrix product. Rows do not
// depend on each other. For row i and positions p ascending, j in [0, d):
//   y_j    = fma over columns c ascending, from carried[i][p*d + j], of  x[i][c] * V[c][p*d + j],
//            c in [0, p*d + d): errors where c < p*d, the point of p itself from there on
//   e_kj   = fma over a ascending, from 0, of  codebook[k][a] * V[p*d + a][p*d + j]
//   code   = the k of the smallest score(y, k) of kmeans.h, with h = 1 and entries e; the lowest k
//            among equals
//   x[i][p*d + j]       -= codebook[code][j]
//   carried[i][p*d + j]  = y_j - e_j of that code
// all in float32. Where a column stands for none of the layer's (padding of a sub-vector), its row
// and column of V are 0, and x is of no account.
//
// Sums, if not null, are int64 [K, d + d (d + 1) / 2 + 1], to which every point of entry k adds
//   for a:       round(scale * sum over j >= a of y_j V_aj)     M x~, x~ = y V_pp^-1 being where
//                                                               feedback has moved the point
//   for a <= b:  round(scale * sum over j >= b of V_aj V_bj)    M = V_pp V_pp^T, row by row
//   1
// (V_aj is V[p*d + a][p*d + j]; sums over j ascending, in float64; rounding to nearest even): the
// entry that suits these points best solves (sum M) c = sum M x~. Integers, as those of kmeans.h,
// so that the order of points does not matter; the caller picks a scale that leaves room.
#pragma once

#include <cstdint>

#include "nowag/operation.h"

namespace nowag {

// x [rows, n] with `x_stride` floats from row to row, factor (V) [n, n] with `factor_stride`;
// carried [rows, n], codebook [entries, d], codes [rows, positions] contiguous. x and carried are
// read and overwritten. sums is added to.
NOWAG_DECLARE(kmeans_feedback, float* x, int64_t x_stride, float* carried, const float* factor,
              int64_t factor_stride, const float* codebook, int64_t rows, int64_t positions,
              int64_t entries, int d, uint16_t* codes, double scale, int64_t* sums);

}  // namespace nowag
