#include "nowag/sparse_pack.h"

#include <omp.h>

#include <atomic>
#include <cstring>
#include <limits>

#include "cpu/base/buffer.h"
#include "cpu/base/failure.h"
#include "cpu/base/parallel.h"
#include "cpu/base/simd.h"
#include "cpu/sparse/sparse_pack_table.h"
#include "cpu/sparse/sparse_pack_values.h"
#include "nowag/format.h"

namespace nowag::cpu {
namespace {

constexpr int64_t kPartRows = 16;

const SparsePackTable& table() {
#ifdef NOWAG_X86
    return *simd_pick(&kSparsePackScalar, &kSparsePackAvx2, &kSparsePackAvx512,
                      &kSparsePackAvx512Vbmi);
#else
    return kSparsePackScalar;
#endif
}

int64_t popcount(const uint8_t* bits, int64_t bytes) {
    int64_t count = 0;
    for (int64_t byte = 0; byte < bytes; byte += 8) {
        uint64_t word;
        std::memcpy(&word, bits + byte, sizeof word);
        count += __builtin_popcountll(word);
    }
    return count;
}

// The kept weights among a row's columns; bits past them, which no row should have, do not count.
int64_t kept_columns(const uint8_t* bits, int64_t cols) {
    const int64_t whole = cols / kBitmapAlign * (kBitmapAlign / 8);
    int64_t count = popcount(bits, whole);
    for (int64_t j = 8 * whole; j < cols; ++j) count += (bits[j / 8] >> (j % 8)) & 1;
    return count;
}

// One row as elements of its values' own dtype.
void expand_row(const void* values, DType dtype, const uint8_t* bits, int64_t cols, void* out) {
    if (dtype == DType::float32) {
        table().expand32(static_cast<const uint32_t*>(values), bits, cols,
                         static_cast<uint32_t*>(out));
    } else {
        table().expand16(static_cast<const uint16_t*>(values), bits, cols,
                         static_cast<uint16_t*>(out));
    }
}

}  // namespace

Status sparse_offsets(const uint8_t* bitmap, int64_t rows, int64_t cols, int32_t* row_offsets,
                      int threads) try {
    if (rows < 1 || cols < 1 || threads < 1) return Status::invalid_argument;
    const int64_t row_bytes = bitmap_row_bytes(cols);
    parallel_for(rows, threads, [&](int64_t i) {
        row_offsets[i + 1] = static_cast<int32_t>(popcount(bitmap + i * row_bytes, row_bytes));
    });
    int64_t sum = 0;
    row_offsets[0] = 0;
    for (int64_t i = 1; i <= rows; ++i) {
        sum += row_offsets[i];
        if (sum > std::numeric_limits<int32_t>::max()) return Status::unsupported;
        row_offsets[i] = static_cast<int32_t>(sum);
    }
    return Status::ok;
} catch (...) {
    return failure();
}

Status sparse_pack(const void* weight, DType dtype, int64_t rows, int64_t cols, int64_t row_stride,
                   const uint8_t* bitmap, const int32_t* row_offsets, int64_t kept, void* values,
                   int threads) try {
    if (rows < 1 || cols < 1 || row_stride < cols || threads < 1 ||
        !valid_offsets(row_offsets, rows, kept)) {
        return Status::invalid_argument;
    }
    const int64_t row_bytes = bitmap_row_bytes(cols);
    std::atomic<bool> fits{true};
    parallel_for(rows, threads, [&](int64_t i) {
        if (kept_columns(bitmap + i * row_bytes, cols) != row_offsets[i + 1] - row_offsets[i]) {
            fits = false;
        }
    });
    if (!fits) return Status::invalid_argument;
    parallel_for(rows, threads, [&](int64_t i) {
        const uint8_t* bits = bitmap + i * row_bytes;
        if (dtype == DType::float32) {
            table().gather32(static_cast<const uint32_t*>(weight) + i * row_stride, bits, cols,
                             static_cast<uint32_t*>(values) + row_offsets[i]);
        } else {
            table().gather16(static_cast<const uint16_t*>(weight) + i * row_stride, bits, cols,
                             static_cast<uint16_t*>(values) + row_offsets[i]);
        }
    });
    return Status::ok;
} catch (...) {
    return failure();
}

Status sparse_dequantize(const uint8_t* bitmap, const void* values, DType values_dtype,
                         const int32_t* row_offsets, int64_t kept, int64_t rows, int64_t cols,
                         int64_t row_begin, int64_t row_end, void* out, DType out_dtype,
                         int64_t out_stride, int threads) try {
    if (cols < 1 || row_begin < 0 || row_begin >= row_end || row_end > rows || out_stride < cols ||
        threads < 1 || !valid_offsets(row_offsets, rows, kept)) {
        return Status::invalid_argument;
    }
    const int64_t row_bytes = bitmap_row_bytes(cols);
    const ReadableValues readable(values, values_dtype, kept, row_offsets, cols);
    const bool same = out_dtype == values_dtype;
    const int64_t row_size = out_stride * dtype_size(out_dtype);
    const int64_t count = row_end - row_begin;
    // A row for each thread, where it must change its dtype.
    const Buffer<uint32_t> rows_to_convert = buffer<uint32_t>(same ? 0 : threads * cols);
    const int64_t parts = ceil_div(count, kPartRows);
    parallel_for(parts, threads, [&](int64_t part) {
        uint32_t* scratch = rows_to_convert.get() + omp_get_thread_num() * (same ? 0 : cols);
        for (int64_t r = count * part / parts; r < count * (part + 1) / parts; ++r) {
            const int64_t i = row_begin + r;
            void* row = static_cast<uint8_t*>(out) + r * row_size;
            expand_row(readable.row(i), values_dtype, bitmap + i * row_bytes, cols,
                       same ? row : scratch);
            if (!same) table().convert(scratch, values_dtype, cols, row, out_dtype);
        }
    });
    return Status::ok;
} catch (...) {
    return failure();
}

}  // namespace nowag::cpu
