// sparse_pack.h on a GPU: a warp a row; the running popcount of the bitmap's words says where a
// lane's value lies. Each byte is read or written once.
#pragma once

#include "cuda/base/device.cuh"
#include "nowag/format.h"
#include "nowag/sparse_pack.h"

namespace nowag::cuda {

constexpr int kSparseThreads = 256;
constexpr int kSparseWarps = kSparseThreads / kWarpSize;
constexpr int kOffsetThreads = 1024;

// The sparse form (format.h); what an operation does not read is null.
struct SparseWeight {
    const uint32_t* bitmap;      // [rows, words()]
    const void* values;          // [kept], of a type that the kernel knows
    const int32_t* row_offsets;  // [rows + 1]
    int64_t kept;                // how many values there are
    int64_t rows;
    int64_t cols;

    __device__ int64_t words() const { return padded_columns(cols) / kWarpSize; }

    // Where a row's values begin; a place among them, or their end, whatever row_offsets say.
    __device__ __forceinline__ int64_t first_value(int64_t row) const {
        const int64_t first = row_offsets[row];
        return first < 0 ? 0 : first < kept ? first : kept;
    }
};

// The row of this warp.
__device__ __forceinline__ int64_t sparse_row() {
    return static_cast<int64_t>(blockIdx.x) * kSparseWarps + threadIdx.x / kWarpSize;
}

// Word `index` of a row, without bits past the last column; 0 past the last word.
__device__ __forceinline__ unsigned bits_of_word(const SparseWeight& weight, int64_t row,
                                                 int64_t index) {
    const int64_t columns = weight.cols - index * kWarpSize;
    if (columns <= 0) return 0u;
    const unsigned word = weight.bitmap[row * weight.words() + index];
    return columns < kWarpSize ? word & ((1u << columns) - 1u) : word;
}

// Walks the 32 columns of every word of a row: body(column, kept, index of the value). Columns that
// the weight does not have, and those whose value it does not have, are not kept. A lane reads one
// word of 32 and hands it round, so that bitmap loads are whole lines; after those 1024 columns
// comes fold().
template <typename Body, typename Fold>
__device__ __forceinline__ void walk_row(const SparseWeight& weight, int64_t row, Body&& body,
                                         Fold&& fold) {
    const int64_t value = weight.first_value(row);
    const unsigned values_left = static_cast<unsigned>(weight.kept - value);
    const int lane = threadIdx.x % kWarpSize;
    const unsigned lower = (1u << lane) - 1u;
    const int64_t words = weight.words();
    int before = 0;
    for (int64_t first = 0; first < words; first += kWarpSize) {
        const unsigned mine = bits_of_word(weight, row, first + lane);
        const int count = static_cast<int>(words - first < kWarpSize ? words - first : kWarpSize);
#pragma unroll 4
        for (int w = 0; w < count; ++w) {
            const unsigned word = __shfl_sync(kFullWarp, mine, w);
            const int index = before + __popc(word & lower);
            const bool kept =
                ((word >> lane) & 1u) != 0 && static_cast<unsigned>(index) < values_left;
            body((first + w) * kWarpSize + lane, kept, value + index);
            before += __popc(word);
        }
        fold();
    }
}

// counts[row + 1] = how many weights the row keeps; counts [rows + 1]. A warp: one row.
__global__ void sparse_count_rows(SparseWeight weight, int32_t* __restrict__ counts);

// In place: counts[0] = 0, then the inclusive prefix sums of counts[1..rows]. One block of
// kOffsetThreads, a thread a row at a time.
__global__ void sparse_scan_rows(int64_t rows, int32_t* __restrict__ counts);

// Gathers the kept weights of rows.
//   Stored  the unsigned integer of the values' size, so that values keep their bits
//   dense   [rows, cols], rows row_stride elements apart
//   values  out, [kept]
// A warp: one row; a lane: one column of each word.
template <typename Stored>
__global__ void sparse_gather_rows(SparseWeight weight, const Stored* __restrict__ dense,
                                   int64_t row_stride, Stored* __restrict__ values) {
    const int64_t row = sparse_row();
    if (row >= weight.rows) return;
    walk_row(
        weight, row,
        [&](int64_t column, bool kept, int64_t index) {
            if (kept) values[index] = dense[row * row_stride + column];
        },
        [] {});
}

// Rows [row_begin, row_end) as dense values.
//   kValues  of weight.values
//   kOut     of out
//   out      [row_end - row_begin, cols], rows out_stride elements apart
// A warp: one row; a lane: one column of each word.
template <DType kValues, DType kOut>
__global__ void sparse_dequantize_rows(SparseWeight weight, int64_t row_begin, int64_t row_end,
                                       void* __restrict__ out, int64_t out_stride) {
    const int64_t row = row_begin + sparse_row();
    if (row >= row_end) return;
    walk_row(
        weight, row,
        [&](int64_t column, bool kept, int64_t index) {
            const float value = kept ? Element<kValues>::load(weight.values, index) : 0.0f;
            if (column < weight.cols) {
                Element<kOut>::store(out, (row - row_begin) * out_stride + column, value);
            }
        },
        [] {});
}

}  // namespace nowag::cuda
