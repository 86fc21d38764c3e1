// Between a dense weight with its bitmap of kept weights and the sparse form of format.h. All
// exact.
#pragma once

#include <cstdint>

#include "nowag/dtype.h"
#include "nowag/operation.h"

namespace nowag {

// row_offsets int32 [rows + 1] from a bitmap: its running popcount. More than 2^31 - 1 kept weights
// are refused (unsupported).
NOWAG_DECLARE(sparse_offsets, const uint8_t* bitmap, int64_t rows, int64_t cols,
              int32_t* row_offsets);

// Gathers the kept weights of a dense weight (of `dtype`, rows row_stride elements apart) into
// `kept` values, and back: zeros elsewhere. Values keep their bits. row_offsets that are not the
// running popcount of the bitmap's first `cols` columns are refused (invalid_argument), with
// nothing written; on a GPU, whose answer nobody waits for, values are then unspecified.
NOWAG_DECLARE(sparse_pack, const void* weight, DType dtype, int64_t rows, int64_t cols,
              int64_t row_stride, const uint8_t* bitmap, const int32_t* row_offsets, int64_t kept,
              void* values);

// Rows [row_begin, row_end) of a sparse weight as dense values of out_dtype (rounded from
// values_dtype), out_stride elements between rows. No more than `kept` values are read (format.h).
NOWAG_DECLARE(sparse_dequantize, const uint8_t* bitmap, const void* values, DType values_dtype,
              const int32_t* row_offsets, int64_t kept, int64_t rows, int64_t cols,
              int64_t row_begin, int64_t row_end, void* out, DType out_dtype, int64_t out_stride);

}  // namespace nowag
