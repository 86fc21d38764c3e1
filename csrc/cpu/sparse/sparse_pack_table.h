// What each instruction set provides for sparse_pack.cpp: one row at a time, elements as raw bits
// of 16 or 32, so that values never change.
#pragma once

#include <cstdint>

#include "nowag/dtype.h"

namespace nowag::cpu {

struct SparsePackTable {
    // row's elements whose bit is set -> values, adjacent. Writes nothing past the last of them.
    void (*gather16)(const uint16_t* row, const uint8_t* bits, int64_t cols, uint16_t* values);
    void (*gather32)(const uint32_t* row, const uint8_t* bits, int64_t cols, uint32_t* values);
    // values -> row, zeros where no bit is set. May read, not use, kValuesOverread bytes past the
    // last value.
    void (*expand16)(const uint16_t* values, const uint8_t* bits, int64_t cols, uint16_t* row);
    void (*expand32)(const uint32_t* values, const uint8_t* bits, int64_t cols, uint32_t* row);
    // `count` elements from one type to another (dtype.h).
    void (*convert)(const void* from, DType from_dtype, int64_t count, void* to, DType to_dtype);
};

extern const SparsePackTable kSparsePackScalar, kSparsePackAvx2, kSparsePackAvx512,
    kSparsePackAvx512Vbmi;

}  // namespace nowag::cpu
