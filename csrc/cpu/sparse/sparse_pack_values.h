// Where a row's values start, such that a kernel may read as many as its bitmap can claim, and a
// whole vector more.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/base/buffer.h"
#include "nowag/dtype.h"
#include "nowag/format.h"

namespace nowag::cpu {

// Bytes that the sparse kernels may read, not use, past the values of a row.
constexpr int64_t kValuesOverread = 64;

// Whether row_offsets ascend from 0 to at most `kept`, so that each is a place among the values.
inline bool valid_offsets(const int32_t* row_offsets, int64_t rows, int64_t kept) {
    if (row_offsets[0] != 0 || row_offsets[rows] > kept) return false;
    unsigned falling = 0;  // without a branch in the loop, which the compiler then vectorises
    for (int64_t i = 0; i < rows; ++i) falling |= row_offsets[i + 1] < row_offsets[i];
    return falling == 0;
}

// Values that lie so near to the end of the buffer that a row's bitmap, which may lie, could claim
// more than there are, are served from a copy with zeros behind it.
class ReadableValues {
  public:
    ReadableValues(const void* values, DType dtype, int64_t kept, const int32_t* row_offsets,
                   int64_t cols)
        : values_(static_cast<const uint8_t*>(values)),
          size_(dtype_size(dtype)),
          row_offsets_(row_offsets) {
        const int64_t most = 8 * bitmap_row_bytes(cols) + kValuesOverread / size_;  // a row reads
        tail_begin_ = std::max<int64_t>(0, kept - most);
        const int64_t present = (kept - tail_begin_) * size_;
        tail_ = buffer<uint8_t>(present + most * size_);
        if (present > 0) {
            std::memcpy(tail_.get(), values_ + tail_begin_ * size_, static_cast<size_t>(present));
        }
        std::memset(tail_.get() + present, 0, static_cast<size_t>(most * size_));
    }

    const void* row(int64_t i) const {
        const int64_t first = row_offsets_[i];
        if (first < tail_begin_) return values_ + first * size_;
        return tail_.get() + (first - tail_begin_) * size_;
    }

  private:
    const uint8_t* values_;
    int64_t size_;
    const int32_t* row_offsets_;
    int64_t tail_begin_;  // the first value that is served from the copy
    Buffer<uint8_t> tail_;
};

}  // namespace nowag::cpu
