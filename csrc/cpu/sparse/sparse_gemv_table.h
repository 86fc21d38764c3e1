// What each instruction set provides for sparse_gemv.cpp.
#pragma once

#include <cstdint>

#include "nowag/dtype.h"

namespace nowag::cpu {

constexpr int64_t kSparseGemvBlockRows = 32;

// Columns that are summed on their own: sums of sums keep chains of rounding errors short, as the
// error bound of sparse_gemv.h asks.
constexpr int64_t kSparseGemvChunk = 1024;

// At most kSparseGemvBlockRows adjacent rows of a layer, and what they are multiplied by.
struct SparseGemvBlock {
    const float* x;  // [tokens, x_stride], arranged, zeros from cols on
    int64_t x_stride;
    int64_t tokens;
    const uint8_t* bitmap;  // [rows, row_bytes]
    int64_t row_bytes;
    int64_t rows;
    // Where each row's values start; kValuesOverread bytes past a row's end may be read, not used.
    const void* values[kSparseGemvBlockRows];
};

struct SparseGemvTable {
    // For values of each DType: sums[t * rows + r] = x_t . row r.
    void (*dot[3])(const SparseGemvBlock& block, float* sums);
    // For values of each DType: puts the `stride` floats of one token, a multiple of 64, into the
    // order in which `dot` wants them; null if that is their own.
    void (*arrange[3])(float* x, int64_t stride);
};

extern const SparseGemvTable kSparseGemvScalar, kSparseGemvAvx2, kSparseGemvAvx512,
    kSparseGemvAvx512Vbmi;

}  // namespace nowag::cpu
