// vq_gemv.h on a GPU by decoding: every legal d and code width, 1 to 16 tokens.
//
// A block takes one tile of 32 rows, a lane a row; its warps take the positions in turn, so that
// nothing is summed across blocks. The codebook is gathered from the caches. The fast paths of
// vq_gemv_lut.cuh and vq_gemv_mma.cuh replace this where they can.
#pragma once

#include "cuda/base/device.cuh"
#include "cuda/vq/vq_pack.cuh"
#include "nowag/vq_gemv.h"

namespace nowag::cuda {

constexpr int kDecodeThreads = 512;
constexpr int kDecodeWarps = kDecodeThreads / kWarpSize;
constexpr int kDecodeRun = 64;  // positions summed on their own: short sums, for the error bound

// All of the kernel's kType.
struct VqActivations {
    const void* x;     // [tokens, cols]
    const void* bias;  // [rows], or null
    void* y;           // out, [tokens, rows]
    int tokens;
};

// What an output needs beside its sum: they can be loaded before that is known.
struct RowTerms {
    float norm;
    float bias;
};

template <DType kType>
__device__ __forceinline__ RowTerms row_terms(const VqActivations& io, const VqWeight& weight,
                                              int64_t row) {
    return {half_to_float(weight.row_norms[row]),
            io.bias == nullptr ? 0.0f : Element<kType>::load(io.bias, row)};
}

// row_norm * sum + bias, rounded once.
template <DType kType>
__device__ __forceinline__ void store_output(const VqActivations& io, const VqWeight& weight,
                                             int token, int64_t row, float sum,
                                             const RowTerms& terms) {
    Element<kType>::store(io.y, token * weight.rows + row, terms.norm * sum + terms.bias);
}

template <DType kType>
__device__ __forceinline__ void store_output(const VqActivations& io, const VqWeight& weight,
                                             int token, int64_t row, float sum) {
    store_output<kType>(io, weight, token, row, sum, row_terms<kType>(io, weight, row));
}

// x_j col_norm_j of one position, its padding 0.
template <int kD, DType kType>
__device__ __forceinline__ void load_scaled(const VqActivations& io, const VqWeight& weight,
                                            int token, int64_t position, float (&x)[kD]) {
#pragma unroll
    for (int j = 0; j < kD; ++j) {
        const int64_t column = position * kD + j;
        x[j] = column < weight.cols ? Element<kType>::load(io.x, token * weight.cols + column) *
                                          half_to_float(weight.col_norms[column])
                                    : 0.0f;
    }
}

// The product T_p[k] of vq_gemv.h: every path takes it in this order.
template <int kD>
__device__ __forceinline__ float product(const float (&x)[kD], const float (&c)[kD]) {
    float sum = x[0] * c[0];
#pragma unroll
    for (int j = 1; j < kD; ++j) sum = fused(x[j], c[j], sum);
    return sum;
}

//   kD       d
//   kTokens  how many accumulators a thread holds; io.tokens of them count
//   kType    of x, bias and y
// A block: one tile, all positions and tokens; a warp: every kDecodeWarps-th position; a lane: one
// row. Not measured; gathers through L1 run at 3 lanes a cycle and multiprocessor on an H100.
template <int kD, int kTokens, DType kType>
__global__ void __launch_bounds__(kDecodeThreads, 1)
    vq_gemv_decode(VqWeight weight, VqActivations io) {
    float* sums = reinterpret_cast<float*>(shared_memory());  // [kDecodeWarps, kWarpSize]
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int64_t tile = blockIdx.x, row = tile * kTileRows + lane;
    float acc[kTokens] = {}, total[kTokens] = {};
    int run = 0;
    for (int64_t p = warp; p < weight.positions; p += kDecodeWarps) {
        const uint32_t* words = weight.packed + (tile * weight.positions + p) * weight.code_bits;
        const uint16_t* entry = weight.codebook + code_at(words, lane, weight.code_bits) * kD;
        float c[kD];
#pragma unroll
        for (int j = 0; j < kD; ++j) c[j] = half_to_float(entry[j]);
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
            if (t >= io.tokens) break;
            float x[kD];
            load_scaled<kD, kType>(io, weight, t, p, x);
            acc[t] += product<kD>(x, c);
        }
        if (++run < kDecodeRun && p + kDecodeWarps < weight.positions) continue;
        run = 0;
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
            total[t] += acc[t];
            acc[t] = 0.0f;
        }
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
        if (t >= io.tokens) break;
        __syncthreads();
        sums[warp * kWarpSize + lane] = total[t];
        __syncthreads();
        if (warp != 0) continue;
        float sum = 0.0f;
        for (int other = 0; other < kDecodeWarps; ++other) sum += sums[other * kWarpSize + lane];
        if (row < weight.rows) store_output<kType>(io, weight, t, row, sum);
    }
}

}  // namespace nowag::cuda
