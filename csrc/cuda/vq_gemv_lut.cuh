// vq_gemv.h on a GPU for one or two tokens, d = 6 and 12 bits: products are looked up, not
// computed.
//
// For a position p the table T_p[k] = x_p . c_k is built once and then serves every row: one 4-byte
// gather from shared memory a code, where decoding needs a 12-byte one. Bound by shared memory: 32
// codes hit 32 banks at random, in about 3.5 cycles, and take 1.4 on their own way through the same
// L1: 39 weights a cycle and multiprocessor, where vq_gemv_mma.cuh takes 16.
//
//           positions of one segment (blockIdx.x)
//          +-----------+-----------+---
//   rows   | table of  |  next     |        A block: one segment of positions, all rows (or a chunk
//   of a   | 4096      |  table,   |        of kSets * 4096 of them). Two tables: one is read while
//   chunk  | products  |  built    |        the next is built, one barrier between.
//          |           |  meanwhile|        A warp: 8 tiles of 32 rows; a lane: 8 rows of one tile,
//          +-----------+-----------+---     whose codes are 3 whole words, and 8 sums.
//
// The sums of a segment go to scratch memory, [segment, token, row], and vq_gemv_finish adds them
// up.
#pragma once

#include "vq_gemv_fast.cuh"

namespace nowag::cuda {

constexpr int kLutThreads = 512;
constexpr int kLutWarps = kLutThreads / kWarpSize;
constexpr int kLutD = 6;
constexpr int kLutBits = 12;
constexpr int kTable = 1 << kLutBits;  // products of a table, for one token
constexpr int kWarpTiles = kWarpSize / kLanesPerTile;
constexpr int kSetTiles = kLutWarps * kWarpTiles;  // tiles that a block takes with one set of sums
constexpr int kLutResidues = 16;                   // of vq_gemv_finish
constexpr int kInputStride = 8;  // floats of a scaled sub-vector of the inputs: whole 16-byte loads

__device__ __forceinline__ void read_input(const float* input, float (&x)[kLutD]) {
    const float4 low = *reinterpret_cast<const float4*>(input);
    const float2 high = *reinterpret_cast<const float2*>(input + 4);
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w, x[4] = high.x, x[5] = high.y;
}

// What a block of vq_gemv_lut keeps in shared memory: two tables [kTable][kTokens], then the scaled
// inputs of its segment, [position][token][kInputStride].
template <int kTokens>
constexpr size_t lut_shared(int segment_length) {
    return sizeof(float) * kTokens *
           (2 * kTable + static_cast<size_t>(segment_length) * kInputStride);
}

// Builds tables: a thread's entries never change, so that they stay in registers.
template <int kTokens>
struct TableBuilder {
    static constexpr int kOwn = kTable / kLutThreads;
    float c[kOwn][kLutD];

    __device__ __forceinline__ explicit TableBuilder(const uint16_t* codebook) {
        const uint32_t* pairs = reinterpret_cast<const uint32_t*>(codebook);
#pragma unroll
        for (int e = 0; e < kOwn; ++e) {
            const int k = threadIdx.x + e * kLutThreads;
#pragma unroll
            for (int j = 0; j < kLutD; j += 2) {
                const uint32_t pair = pairs[k * (kLutD / 2) + j / 2];
                c[e][j] = half_to_float(static_cast<uint16_t>(pair));
                c[e][j + 1] = half_to_float(static_cast<uint16_t>(pair >> 16));
            }
        }
    }

    // The products of one position from its inputs, [token][kInputStride].
    __device__ __forceinline__ void build(const float* inputs, float* table) const {
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
            float x[kLutD];
            read_input(inputs + t * kInputStride, x);
#pragma unroll
            for (int e = 0; e < kOwn; ++e) {
                table[(threadIdx.x + e * kLutThreads) * kTokens + t] = product<kLutD>(x, c[e]);
            }
        }
    }
};

template <int kTokens>
__device__ __forceinline__ void add_entry(const float* entry, float (&acc)[kTokens]) {
    if constexpr (kTokens == 2) {
        const float2 two = *reinterpret_cast<const float2*>(entry);
        acc[0] += two.x;
        acc[1] += two.y;
    } else {
        acc[0] += *entry;
    }
}

// partial [segment, kTokens, padded_rows]
template <DType kType, int kTokens, int kSets>
__global__ void __launch_bounds__(kLutThreads, 1)
    vq_gemv_lut(VqWeight weight, VqActivations io, Segments segments, int64_t padded_rows,
                float* __restrict__ partial) {
    // Positions whose codes are on their way from memory: one set takes 600 cycles, less than that.
    constexpr int kAhead = kSets == 1 ? 2 : 1;
    float* tables = reinterpret_cast<float*>(shared_memory());
    float* inputs = tables + 2 * kTable * kTokens;
    let_next_kernel_start();
    const int begin = blockIdx.x * segments.length;
    const int64_t left = weight.positions - begin;
    const int length = static_cast<int>(left < segments.length ? left : segments.length);

    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int part = lane % kLanesPerTile;
    const int64_t tile = static_cast<int64_t>(blockIdx.y) * kSets * kSetTiles + warp * kWarpTiles +
                         lane / kLanesPerTile;  // of the first set
    const int64_t tiles_left = padded_rows / kTileRows - tile;
    const uint32_t* words = lane_words<kLutBits>(weight, tile, begin, part);
    const int64_t set_words = kSetTiles * kLutBits * weight.positions;

    LaneCodes<kLutBits> ahead[kAhead][kSets];
    const auto start_loading = [&](int p, int s, LaneCodes<kLutBits>& codes) {
        if (p >= length || s * kSetTiles >= tiles_left) return;
        codes = load_codes<kLutBits>(words + s * set_words + p * kLutBits);
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
#pragma unroll
        for (int s = 0; s < kSets; ++s) start_loading(i, s, ahead[i][s]);
    }

    const TableBuilder<kTokens> builder(weight.codebook);
    for (int i = threadIdx.x; i < length * kTokens; i += kLutThreads) {
        float x[kLutD];
        load_scaled<kLutD, kType>(io, weight, i % kTokens, begin + i / kTokens, x);
#pragma unroll
        for (int j = 0; j < kLutD; ++j) inputs[i * kInputStride + j] = x[j];
    }
    __syncthreads();
    builder.build(inputs, tables);
    __syncthreads();

    float acc[kSets][kLaneRows][kTokens] = {};
    for (int p = 0, turn = 0; p < length; ++p, turn ^= 1) {
        const float* table = tables + turn * kTable * kTokens;
        if (p + 1 < length) {
            builder.build(inputs + (p + 1) * kTokens * kInputStride,
                          tables + (turn ^ 1) * kTable * kTokens);
        }
#pragma unroll
        for (int s = 0; s < kSets; ++s) {
            if (s * kSetTiles >= tiles_left) continue;
            const LaneCodes<kLutBits> codes = ahead[0][s];
#pragma unroll
            for (int i = 1; i < kAhead; ++i) ahead[i - 1][s] = ahead[i][s];
            start_loading(p + kAhead, s, ahead[kAhead - 1][s]);
#pragma unroll
            for (int r = 0; r < kLaneRows; ++r) {
                add_entry<kTokens>(table + codes.code(r) * kTokens, acc[s][r]);
            }
        }
        __syncthreads();
    }

#pragma unroll
    for (int s = 0; s < kSets; ++s) {
        if (s * kSetTiles >= tiles_left) continue;
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
            float* sums = partial + (static_cast<int64_t>(blockIdx.x) * kTokens + t) * padded_rows +
                          (tile + s * kSetTiles) * kTileRows + part * kLaneRows;
#pragma unroll
            for (int r = 0; r < kLaneRows; r += 4) {
                *reinterpret_cast<float4*>(sums + r) =
                    make_float4(acc[s][r][t], acc[s][r + 1][t], acc[s][r + 2][t], acc[s][r + 3][t]);
            }
        }
    }
}

}  // namespace nowag::cuda
