// sparse_gemv.h on a GPU for every type and shape: a warp a row, a lane a column of each bitmap
// word, so that values, inputs and bitmap are read in whole lines, each byte of the weight once.
// Bound by instructions, 23 a word of 32 columns for one token; sparse_gemv_mma.cuh replaces it
// where it can.
#pragma once

#include "cuda/sparse/sparse_pack.cuh"
#include "nowag/sparse_gemv.h"

namespace nowag::cuda {

// All of the kernel's kType.
struct SparseActivations {
    const void* x;     // [tokens, cols]
    const void* bias;  // [rows], or null
    void* y;           // out, [tokens, rows]
    int tokens;
};

//   kTokens  how many accumulators a thread holds; io.tokens of them count
//   kType    of x, bias and y
//   kValues  of weight.values
// A block: kSparseWarps rows; a warp: one row, all tokens; a lane: one column of each word.
template <int kTokens, DType kType, DType kValues>
__global__ void __launch_bounds__(kSparseThreads, 2)
    sparse_gemv_rows(SparseWeight weight, SparseActivations io) {
    const int64_t row = sparse_row();
    if (row >= weight.rows) return;
    // A lane sums 32 columns of every 1024 on their own: the error bound asks for short sums.
    float acc[kTokens] = {}, total[kTokens] = {};
    walk_row(
        weight, row,
        [&](int64_t column, bool kept, int64_t index) {
            if (!kept) return;
            const float value = Element<kValues>::load(weight.values, index);
#pragma unroll
            for (int t = 0; t < kTokens; ++t) {
                if (t >= io.tokens) break;
                acc[t] = fused(value, Element<kType>::load(io.x, t * weight.cols + column), acc[t]);
            }
        },
        [&] {
#pragma unroll
            for (int t = 0; t < kTokens; ++t) {
                total[t] += acc[t];
                acc[t] = 0.0f;
            }
        });
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
        if (t >= io.tokens) break;
        for (int flip = kWarpSize / 2; flip > 0; flip /= 2) {
            total[t] += __shfl_xor_sync(kFullWarp, total[t], flip);
        }
        if (threadIdx.x % kWarpSize != 0) continue;
        if (io.bias != nullptr) total[t] += Element<kType>::load(io.bias, row);
        Element<kType>::store(io.y, t * weight.rows + row, total[t]);
    }
}

}  // namespace nowag::cuda
