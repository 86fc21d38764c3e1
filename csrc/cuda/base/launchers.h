// The CUDA side of include/nowag: every operation of namespace cpu again, with the same meaning.
//
// Pointers are the device's, except the array of problems itself. Packed codes and bitmaps are read
// in words: they lie where slices of an aligned tensor along its first dimension do. In place of
// the number of threads stand scratch memory, of <op>_workspace(the same arguments) bytes, aligned
// to 256, and the stream. pack_codes differs: it cannot refuse a code that is too wide, but keeps
// its low bits. And kmeans_assign leaves the working memory between iterations (previous, gaps)
// alone.
#pragma once

#include "nowag/dtype.h"
#include "nowag/kmeans.h"
#include "nowag/status.h"

namespace nowag::cuda {

using Stream = void*;  // a cudaStream_t, without the headers of CUDA

// What the CUDA runtime said when it last failed on this thread, since this was last asked; or "".
const char* take_error();

// Declares an operation and the query of its scratch memory.
#define NOWAG_CUDA_OP(name, ...)           \
    int64_t name##_workspace(__VA_ARGS__); \
    Status name(__VA_ARGS__, void* workspace, Stream stream)

NOWAG_CUDA_OP(normalize, const void* weight, DType dtype, int64_t rows, int64_t cols,
              int64_t row_stride, float* out, float* row_norms, float* col_norms);

NOWAG_CUDA_OP(kmeans_assign, const KmeansProblem* problems, int64_t count, int64_t entries, int d,
              double scale, bool warm, int64_t* changed);
NOWAG_CUDA_OP(kmeans_update, const int64_t* sums, int64_t entries, int d, double scale,
              float* codebook, double* objective_drop, uint8_t* empty);
NOWAG_CUDA_OP(kmeans_errors, const KmeansProblem* problems, int64_t count, int64_t entries, int d,
              float* errors);
NOWAG_CUDA_OP(kmeans_spread, const KmeansProblem* problems, int64_t count, int64_t entries, int d,
              double scale, int64_t* spread);
NOWAG_CUDA_OP(kmeans_merge_costs, const int64_t* sums, const float* codebook, int64_t entries,
              int d, double scale, const int64_t* chosen, int64_t count, float* costs);
NOWAG_CUDA_OP(kmeans_energy, const KmeansProblem* problems, int64_t count, int d, double* energy);
NOWAG_CUDA_OP(kmeans_seed, const KmeansProblem* problems, int64_t count, int64_t entries, int d,
              int init, int64_t seed, float* codebook);

NOWAG_CUDA_OP(prune_select, const float* w, const float* h, int64_t rows, int64_t cols,
              int64_t n_prune, uint8_t* bitmap);
NOWAG_CUDA_OP(prune_select_nm, const float* w, const float* h, int64_t rows, int64_t cols, int n,
              int m, uint8_t* bitmap);

NOWAG_CUDA_OP(prune_objective, const float* w, const float* h, const uint8_t* bitmap, int64_t rows,
              int64_t cols, double* sums);

NOWAG_CUDA_OP(pack_codes, const uint16_t* codes, int64_t rows, int64_t positions, int code_bits,
              uint8_t* packed);
NOWAG_CUDA_OP(unpack_codes, const uint8_t* packed, int64_t rows, int64_t positions, int code_bits,
              uint16_t* codes);
// Here and in vq_gemv the codebook is aligned to 4 bytes.
NOWAG_CUDA_OP(vq_dequantize, const uint8_t* packed, const uint16_t* codebook,
              const uint16_t* row_norms, const uint16_t* col_norms, int64_t rows, int64_t cols,
              int d, int code_bits, int64_t row_begin, int64_t row_end, void* out, DType dtype,
              int64_t out_stride);

NOWAG_CUDA_OP(sparse_offsets, const uint8_t* bitmap, int64_t rows, int64_t cols,
              int32_t* row_offsets);
NOWAG_CUDA_OP(sparse_pack, const void* weight, DType dtype, int64_t rows, int64_t cols,
              int64_t row_stride, const uint8_t* bitmap, const int32_t* row_offsets, void* values);
NOWAG_CUDA_OP(sparse_dequantize, const uint8_t* bitmap, const void* values, DType values_dtype,
              const int32_t* row_offsets, int64_t rows, int64_t cols, int64_t row_begin,
              int64_t row_end, void* out, DType out_dtype, int64_t out_stride);

NOWAG_CUDA_OP(vq_gemv, const void* x, DType dtype, int64_t tokens, const uint8_t* packed,
              const uint16_t* codebook, const uint16_t* row_norms, const uint16_t* col_norms,
              const void* bias, int64_t rows, int64_t cols, int d, int code_bits, void* y);
NOWAG_CUDA_OP(sparse_gemv, const void* x, DType dtype, int64_t tokens, const uint8_t* bitmap,
              const void* values, DType values_dtype, const int32_t* row_offsets, const void* bias,
              int64_t rows, int64_t cols, void* y);

#undef NOWAG_CUDA_OP

}  // namespace nowag::cuda
