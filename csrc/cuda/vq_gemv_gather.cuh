// vq_gemv.h on a GPU for 3 to 16 tokens, (d = 6, 12 bits) and (d = 4, 8 bits): one gather of a
// codebook entry from shared memory serves kTokens tokens.
//
// A block takes kTiles tiles of 32 rows, a lane a row of each; warp w takes the segments s = w mod
// kResidues, ascending, each summed on its own: the order of vq_gemv_lut.cuh, to the bit. Inputs
// are scaled by a warp for itself, kStage positions at a time. Bound at d = 6 and 8 tokens by
// issue: about 80 instructions for 32 codes, beside 11 + 16 / kTiles cycles of shared memory.
#pragma once

#include "vq_gemv_lut.cuh"

namespace nowag::cuda {

constexpr int kGatherThreads = kResidues * kWarpSize;
constexpr int kStage = 4;

// Bytes of a codebook entry in shared memory: one load of 8 or 16.
template <int kD>
constexpr int kEntryBytes = kD <= 4 ? 8 : 16;

template <int kD, int kBits, int kTokens>
constexpr size_t kGatherShared = (static_cast<size_t>(kEntryBytes<kD>) << kBits) +
                                 sizeof(float) * kResidues * kStage * kTokens * kInputStride<kD>;

template <int kD>
__device__ __forceinline__ void read_entry(const unsigned char* entries, unsigned code,
                                           float (&c)[kD]) {
    uint32_t words[kEntryBytes<kD> / 4];
    if constexpr (kEntryBytes<kD> == 8) {
        const uint2 two = reinterpret_cast<const uint2*>(entries)[code];
        words[0] = two.x, words[1] = two.y;
    } else {
        const uint4 four = reinterpret_cast<const uint4*>(entries)[code];
        words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
    }
#pragma unroll
    for (int j = 0; j < kD; ++j) {
        c[j] = half_to_float(static_cast<uint16_t>(words[j / 2] >> (16 * (j % 2))));
    }
}

template <int kD, int kBits, DType kType, int kTokens, int kTiles>
__global__ void __launch_bounds__(kGatherThreads, 1)
    vq_gemv_gather(VqWeight weight, VqActivations io, Segments segments, int first_token) {
    unsigned char* entries = shared_memory();
    float* stages = reinterpret_cast<float*>(entries + (size_t{kEntryBytes<kD>} << kBits));
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    float* stage = stages + warp * kStage * kTokens * kInputStride<kD>;
    const int tokens = io.tokens - first_token < kTokens ? io.tokens - first_token : kTokens;
    const int64_t first_tile = static_cast<int64_t>(blockIdx.x) * kTiles;
    const int64_t tiles = (weight.rows + kTileRows - 1) / kTileRows;

    uint16_t* halves = reinterpret_cast<uint16_t*>(entries);
    for (int i = threadIdx.x; i < kD << kBits; i += kGatherThreads) {
        halves[i / kD * (kEntryBytes<kD> / 2) + i % kD] = weight.codebook[i];
    }
    __syncthreads();

    float total[kTiles][kTokens] = {};
    for (int s = warp; s < segments.count; s += kResidues) {
        const int64_t begin = static_cast<int64_t>(s) * segments.length;
        const int64_t after = begin + segments.length;
        const int64_t end = after < weight.positions ? after : weight.positions;
        float acc[kTiles][kTokens] = {};
        for (int64_t first = begin; first < end; first += kStage) {
            const int count = static_cast<int>(end - first < kStage ? end - first : kStage);
            __syncwarp();
            for (int i = lane; i < count * kTokens; i += kWarpSize) {
                float x[kD] = {};
                const int token = i % kTokens;
                if (token < tokens) {
                    load_scaled<kD, kType>(io, weight, first_token + token, first + i / kTokens, x);
                }
#pragma unroll
                for (int j = 0; j < kD; ++j) stage[i * kInputStride<kD> + j] = x[j];
            }
            __syncwarp();
            for (int q = 0; q < count; ++q) {
                float c[kTiles][kD];
#pragma unroll
                for (int u = 0; u < kTiles; ++u) {
                    if (first_tile + u >= tiles) continue;
                    const uint32_t* words =
                        weight.packed + ((first_tile + u) * weight.positions + first + q) * kBits;
                    read_entry<kD>(entries, code_at(words, lane, kBits), c[u]);
                }
#pragma unroll
                for (int t = 0; t < kTokens; ++t) {
                    float x[kD];
                    read_input<kD>(stage + (q * kTokens + t) * kInputStride<kD>, x);
#pragma unroll
                    for (int u = 0; u < kTiles; ++u) {
                        if (first_tile + u < tiles) acc[u][t] += product<kD>(x, c[u]);
                    }
                }
            }
        }
#pragma unroll
        for (int u = 0; u < kTiles; ++u) {
#pragma unroll
            for (int t = 0; t < kTokens; ++t) total[u][t] += acc[u][t];
        }
    }

    // The stages' place is free now: the residues of one tile and token at a time, [warp, lane].
#pragma unroll
    for (int u = 0; u < kTiles; ++u) {
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
            __syncthreads();
            stages[threadIdx.x] = total[u][t];
            __syncthreads();
            const int64_t row = (first_tile + u) * kTileRows + lane;
            if (warp != 0 || row >= weight.rows || t >= tokens) continue;
            float sum = 0.0f;
            for (int other = 0; other < kResidues; ++other) sum += stages[other * kWarpSize + lane];
            store_output<kType>(io, weight, first_token + t, row, sum);
        }
    }
}

}  // namespace nowag::cuda
