#include "cuda/base/dispatch.h"
#include "cuda/base/launch.h"
#include "cuda/sparse/sparse_gemv.cuh"
#include "cuda/sparse/sparse_gemv_mma.cuh"
#include "nowag/sparse_gemv.h"

namespace nowag::cuda {
namespace {

template <typename T>
bool whole_chunks(const T* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % sizeof(uint4) == 0;
}

template <DType kType, DType kValues>
Status by_rows(const SparseWeight& sparse, const SparseActivations& io, Stream stream) {
    const auto kernel = io.tokens == 1   ? sparse_gemv_rows<1, kType, kValues>
                        : io.tokens <= 4 ? sparse_gemv_rows<4, kType, kValues>
                                         : sparse_gemv_rows<16, kType, kValues>;
    return launch(kernel, blocks_for(sparse.rows, kSparseWarps), kSparseThreads, 0, stream, sparse,
                  io);
}

template <DType kType>
Status multiply(const SparseWeight& sparse, const SparseActivations& io, Stream stream) {
    const auto kernel =
        io.tokens <= kSparseOctet ? sparse_gemv_mma<1, kType> : sparse_gemv_mma<2, kType>;
    return launch(kernel, blocks_for(sparse.rows, kSparseMmaRows), kSparseMmaThreads,
                  kSparseMmaShared, stream, sparse, io);
}

}  // namespace

int64_t sparse_gemv_workspace(const void*, DType, int64_t, const uint8_t*, const void*, DType,
                              const int32_t*, int64_t, const void*, int64_t, int64_t, void*) {
    return 0;
}

Status sparse_gemv(const void* x, DType dtype, int64_t tokens, const uint8_t* bitmap,
                   const void* values, DType values_dtype, const int32_t* row_offsets, int64_t kept,
                   const void* bias, int64_t rows, int64_t cols, void* y, void*, Stream stream) {
    if (rows < 1 || cols < 1 || tokens < 1 || tokens > kSparseGemvMaxTokens || kept < 0) {
        return Status::invalid_argument;
    }
    const SparseWeight sparse{
        reinterpret_cast<const uint32_t*>(bitmap), values, row_offsets, kept, rows, cols};
    const SparseActivations io{x, bias, y, static_cast<int>(tokens)};
    return with_dtype(dtype, [&](auto type) {
        return with_dtype(values_dtype, [&](auto values_type) {
            constexpr DType kType = type.value, kValues = values_type.value;
            if constexpr (kType == kValues && kType != DType::float32) {
                if (whole_chunks(x) && whole_chunks(values) && cols % kValueChunk == 0 &&
                    cols <= kSparseMmaMaxCols) {
                    return multiply<kType>(sparse, io, stream);
                }
            }
            return by_rows<kType, kValues>(sparse, io, stream);
        });
    });
}

}  // namespace nowag::cuda
