// What each instruction set provides for normalize.cpp.
#pragma once

#include <cstdint>

#include "nowag/dtype.h"

namespace nowag::cpu {

struct NormalizeTable {
    // `count` elements from one type to another (dtype.h).
    void (*convert)(const void* from, DType from_dtype, int64_t count, void* to, DType to_dtype);
    void (*add_squares)(const float* row, int64_t cols, double* sums);
    float (*normalize_row)(const float* row, const float* col_norms, int64_t cols, float* out);
};

extern const NormalizeTable kNormalizeScalar, kNormalizeAvx2, kNormalizeAvx512;

}  // namespace nowag::cpu
