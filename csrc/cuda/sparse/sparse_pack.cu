#include "cuda/base/block.cuh"
#include "cuda/base/dispatch.h"
#include "cuda/base/launch.h"
#include "cuda/sparse/sparse_pack.cuh"
#include "nowag/sparse_pack.h"

namespace nowag::cuda {

__global__ void sparse_count_rows(SparseWeight weight, int32_t* __restrict__ counts) {
    const int64_t row = sparse_row();
    if (row >= weight.rows) return;
    const int64_t words = weight.words();
    unsigned count = 0;
    for (int64_t w = threadIdx.x % kWarpSize; w < words; w += kWarpSize) {
        count += static_cast<unsigned>(__popc(weight.bitmap[row * words + w]));
    }
    count = __reduce_add_sync(kFullWarp, count);
    if (threadIdx.x % kWarpSize == 0) counts[row + 1] = static_cast<int32_t>(count);
}

__global__ void sparse_scan_rows(int64_t rows, int32_t* __restrict__ counts) {
    int32_t* warp_sums = reinterpret_cast<int32_t*>(shared_memory());
    if (threadIdx.x == 0) counts[0] = 0;
    int32_t before = 0;
    for (int64_t first = 0; first < rows; first += kOffsetThreads) {
        const int64_t row = first + threadIdx.x;
        const int32_t count = row < rows ? counts[row + 1] : 0;
        const auto scan = block_scan<kOffsetThreads>(count, warp_sums);
        if (row < rows) counts[row + 1] = before + scan.upto;
        before += scan.total;
    }
}

namespace {

constexpr int64_t kMaxOffset = 0x7fffffff;

SparseWeight sparse_weight(const uint8_t* bitmap, const void* values, const int32_t* row_offsets,
                           int64_t kept, int64_t rows, int64_t cols) {
    return {reinterpret_cast<const uint32_t*>(bitmap), values, row_offsets, kept, rows, cols};
}

template <typename Stored>
Status gather(const SparseWeight& sparse, const void* dense, int64_t row_stride, void* values,
              Stream stream) {
    return launch(sparse_gather_rows<Stored>, blocks_for(sparse.rows, kSparseWarps), kSparseThreads,
                  0, stream, sparse, static_cast<const Stored*>(dense), row_stride,
                  static_cast<Stored*>(values));
}

}  // namespace

int64_t sparse_offsets_workspace(const uint8_t*, int64_t, int64_t, int32_t*) { return 0; }

// A matrix that could hold more than 2^31 - 1 kept weights is refused, whatever its bitmap: its
// launcher cannot look.
Status sparse_offsets(const uint8_t* bitmap, int64_t rows, int64_t cols, int32_t* row_offsets,
                      void*, Stream stream) {
    if (rows < 1 || cols < 1) return Status::invalid_argument;
    if (rows > kMaxOffset / cols) return Status::unsupported;
    const SparseWeight sparse = sparse_weight(bitmap, nullptr, nullptr, 0, rows, cols);
    return in_order(
        [&] {
            return launch(sparse_count_rows, blocks_for(rows, kSparseWarps), kSparseThreads, 0,
                          stream, sparse, row_offsets);
        },
        [&] {
            return launch(sparse_scan_rows, 1, kOffsetThreads,
                          sizeof(int32_t) * kOffsetThreads / kWarpSize, stream, rows, row_offsets);
        });
}

int64_t sparse_pack_workspace(const void*, DType, int64_t, int64_t, int64_t, const uint8_t*,
                              const int32_t*, int64_t, void*) {
    return 0;
}

Status sparse_pack(const void* weight, DType dtype, int64_t rows, int64_t cols, int64_t row_stride,
                   const uint8_t* bitmap, const int32_t* row_offsets, int64_t kept, void* values,
                   void*, Stream stream) {
    if (rows < 1 || cols < 1 || row_stride < cols || kept < 0) return Status::invalid_argument;
    const SparseWeight sparse = sparse_weight(bitmap, nullptr, row_offsets, kept, rows, cols);
    return dtype_size(dtype) == 4 ? gather<uint32_t>(sparse, weight, row_stride, values, stream)
                                  : gather<uint16_t>(sparse, weight, row_stride, values, stream);
}

int64_t sparse_dequantize_workspace(const uint8_t*, const void*, DType, const int32_t*, int64_t,
                                    int64_t, int64_t, int64_t, int64_t, void*, DType, int64_t) {
    return 0;
}

Status sparse_dequantize(const uint8_t* bitmap, const void* values, DType values_dtype,
                         const int32_t* row_offsets, int64_t kept, int64_t rows, int64_t cols,
                         int64_t row_begin, int64_t row_end, void* out, DType out_dtype,
                         int64_t out_stride, void*, Stream stream) {
    if (rows < 1 || cols < 1 || kept < 0 || row_begin < 0 || row_end > rows ||
        row_begin > row_end || out_stride < cols) {
        return Status::invalid_argument;
    }
    if (row_begin == row_end) return Status::ok;
    const SparseWeight sparse = sparse_weight(bitmap, values, row_offsets, kept, rows, cols);
    return with_dtype(values_dtype, [&](auto values_type) {
        return with_dtype(out_dtype, [&](auto out_type) {
            return launch(sparse_dequantize_rows<values_type.value, out_type.value>,
                          blocks_for(row_end - row_begin, kSparseWarps), kSparseThreads, 0, stream,
                          sparse, row_begin, row_end, out, out_stride);
        });
    });
}

}  // namespace nowag::cuda
