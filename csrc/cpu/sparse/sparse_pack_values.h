// Where a row's values start, such that a kernel may read a whole vector past the row's end.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "nowag/dtype.h"

namespace nowag::cpu {

// Bytes that the sparse kernels may read, not use, past the values of a row.
constexpr int64_t kValuesOverread = 64;

// The last rows, whose values lie within kValuesOverread of the end of the buffer, are served from
// a padded copy; that is one row as a rule.
class ReadableValues {
  public:
    ReadableValues(const void* values, DType dtype, const int32_t* row_offsets, int64_t rows)
        : values_(static_cast<const uint8_t*>(values)),
          size_(dtype_size(dtype)),
          row_offsets_(row_offsets),
          tail_row_(rows) {
        const int64_t end = row_offsets[rows] * size_;
        while (tail_row_ > 0 && row_offsets[tail_row_] * size_ + kValuesOverread > end) --tail_row_;
        const int64_t begin = row_offsets[tail_row_] * size_;
        tail_.resize(static_cast<size_t>(end - begin + kValuesOverread));
        if (end > begin)
            std::memcpy(tail_.data(), values_ + begin, static_cast<size_t>(end - begin));
    }

    const void* row(int64_t i) const {
        if (i < tail_row_) return values_ + row_offsets_[i] * size_;
        return tail_.data() + (row_offsets_[i] - row_offsets_[tail_row_]) * size_;
    }

  private:
    const uint8_t* values_;
    int64_t size_;
    const int32_t* row_offsets_;
    int64_t tail_row_;  // the first row that is served from the copy
    std::vector<uint8_t> tail_;
};

}  // namespace nowag::cpu
