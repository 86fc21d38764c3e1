// The two row loops of normalize.h, compiled once for each instruction set: the compiler vectorises
// them under the flags of the file that includes this. `static`, and no standard library, so that
// no instruction set's copy is ever linked in place of another's.
#pragma once

#include "cpu/base/convert_row.h"
#include "cpu/normalize/normalize_table.h"
#include "nowag/normalize.h"

namespace nowag::cpu {

// sums[j] += row[j]^2
static void add_squares(const float* row, int64_t cols, double* sums) {
    for (int64_t j = 0; j < cols; ++j) {
        const double value = row[j];
        sums[j] += value * value;
    }
}

// row -> out, normalised by col_norms and then by the row's own norm, which is returned.
static float normalize_row(const float* row, const float* col_norms, int64_t cols, float* out) {
    double lanes[kNormalizeLanes] = {};
    int64_t j = 0;
    for (; j + kNormalizeLanes <= cols; j += kNormalizeLanes) {
        for (int64_t lane = 0; lane < kNormalizeLanes; ++lane) {
            const float value = row[j + lane] / col_norms[j + lane];
            out[j + lane] = value;
            lanes[lane] += static_cast<double>(value) * value;
        }
    }
    for (int64_t lane = 0; j + lane < cols; ++lane) {
        const float value = row[j + lane] / col_norms[j + lane];
        out[j + lane] = value;
        lanes[lane] += static_cast<double>(value) * value;
    }
    for (int64_t half = kNormalizeLanes / 2; half > 0; half /= 2) {
        for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    const float norm = static_cast<float>(__builtin_sqrt(lanes[0]) + kNormEps);
    for (j = 0; j < cols; ++j) out[j] /= norm;
    return norm;
}

static constexpr NormalizeTable kNormalizeTable = {convert_row, add_squares, normalize_row};

}  // namespace nowag::cpu
