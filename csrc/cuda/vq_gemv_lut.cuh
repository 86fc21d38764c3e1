// vq_gemv.h on a GPU for one or two tokens, (d = 6, 12 bits) and (d = 4, 8 bits): products are
// looked up, not computed.
//
// For a position p the table T_p[k] = x_p . c_k is built once and then serves every row: one 4-byte
// gather from shared memory a code, where decoding needs a 16-byte one and d multiply-adds. Bound
// by shared memory: 32 codes hit 32 banks at random, in about 3.5 cycles, so that one
// multiprocessor takes 55 (d = 6) or 36 (d = 4) weights a cycle.
//
//           positions of one segment (blockIdx.x)
//          +-----------+-----------+---
//   rows   | table of  |  next     |        A block: one segment of positions, all rows (or a chunk
//   of a   | 4096      |  table,   |        of kSets * 4096 of them). Two tables: one is read while
//   chunk  | products  |  built    |        the next is built, one barrier between.
//          |           |  meanwhile|        A warp: 8 tiles of 32 rows; a lane: 8 rows of one tile,
//          +-----------+-----------+---     whose codes are 3 (or 2) whole words, and 8 sums.
//
// The sums of a segment go to scratch memory, [segment, token, row], and vq_gemv_finish adds them
// up: the segments s = w mod kResidues ascending, then w ascending. Segments depend on the shape
// and the device alone, and vq_gemv_gather.cuh adds in the same order, so that a token's bits do
// not depend on how many came with it.
#pragma once

#include "vq_gemv.cuh"

namespace nowag::cuda {

constexpr int kLutThreads = 512;
constexpr int kLutWarps = kLutThreads / kWarpSize;
constexpr int kTable = 4096;  // products of a table, for one token
constexpr int kLaneRows = 8;  // rows whose codes one lane reads
constexpr int kLanesPerTile = kTileRows / kLaneRows;
constexpr int kWarpTiles = kWarpSize / kLanesPerTile;
constexpr int kSetTiles = kLutWarps * kWarpTiles;  // tiles that a block takes with one set of sums
constexpr int kResidues = 16;

// Positions [begin, end) of one segment.
struct Segments {
    int count;
    int length;
};

template <int kBits>
struct LaneCodes {
    static constexpr int kWords = kLaneRows * kBits / 32;
    uint32_t words[kWords];

    // Code r of the lane's 8; r is known to the compiler.
    __device__ __forceinline__ unsigned code(int r) const {
        const int bit = r * kBits, word = bit / 32, shift = bit % 32;
        uint32_t bits = words[word] >> shift;
        if (shift + kBits > 32) bits |= words[word + 1] << (32 - shift);
        return bits & ((1u << kBits) - 1u);
    }
};

template <int kBits>
__device__ __forceinline__ LaneCodes<kBits> load_codes(const VqWeight& weight, int64_t tile,
                                                       int64_t position, int part) {
    constexpr int kWords = LaneCodes<kBits>::kWords;
    const uint32_t* source =
        weight.packed + (tile * weight.positions + position) * kBits + part * kWords;
    LaneCodes<kBits> codes;
    if constexpr (kWords == 2) {
        const uint2 pair = *reinterpret_cast<const uint2*>(source);
        codes.words[0] = pair.x, codes.words[1] = pair.y;
    } else {
#pragma unroll
        for (int w = 0; w < kWords; ++w) codes.words[w] = source[w];
    }
    return codes;
}

// Floats of one scaled sub-vector of the inputs in shared memory: whole 16-byte loads.
template <int kD>
constexpr int kInputStride = kD <= 4 ? 4 : 8;

template <int kD>
__device__ __forceinline__ void read_input(const float* input, float (&x)[kD]) {
    float four[kInputStride<kD>];
#pragma unroll
    for (int j = 0; j < kInputStride<kD>; j += 4) {
        const float4 loaded = *reinterpret_cast<const float4*>(input + j);
        four[j] = loaded.x, four[j + 1] = loaded.y, four[j + 2] = loaded.z, four[j + 3] = loaded.w;
    }
#pragma unroll
    for (int j = 0; j < kD; ++j) x[j] = four[j];
}

// What a block of vq_gemv_lut keeps in shared memory: two tables [kTable][kTokens], then the scaled
// inputs of its segment, [position][token][kInputStride].
template <int kD, int kTokens>
constexpr size_t lut_shared(int segment_length) {
    return sizeof(float) * kTokens *
           (2 * kTable + static_cast<size_t>(segment_length) * kInputStride<kD>);
}

// Builds tables: a thread's entries never change, so that they stay in registers.
template <int kD, int kBits, int kTokens>
struct TableBuilder {
    static constexpr int kEntries = 1 << kBits;
    static constexpr int kPositions = kTable / kEntries;  // of one table
    static constexpr int kOwn = kEntries < kLutThreads ? 1 : kEntries / kLutThreads;
    float c[kOwn][kD];

    __device__ __forceinline__ explicit TableBuilder(const uint16_t* codebook) {
#pragma unroll
        for (int e = 0; e < kOwn; ++e) {
            const int k = (threadIdx.x + e * kLutThreads) % kEntries;
#pragma unroll
            for (int j = 0; j < kD; ++j) c[e][j] = half_to_float(codebook[k * kD + j]);
        }
    }

    // The products of positions [first, first + kPositions) of the segment; inputs past its end are
    // not read.
    __device__ __forceinline__ void build(const float* inputs, int first, int length,
                                          float* table) const {
        float x[kTokens][kD];
#pragma unroll
        for (int i = 0; i < kTable / kLutThreads; ++i) {
            const int place = threadIdx.x + i * kLutThreads;
            const int position = kPositions == 1 ? first : first + place / kEntries;
            if (position >= length) break;
#pragma unroll
            for (int t = 0; t < kTokens; ++t) {
                if (kPositions > 1 || i == 0) {
                    read_input<kD>(inputs + (position * kTokens + t) * kInputStride<kD>, x[t]);
                }
                table[place * kTokens + t] = product<kD>(x[t], c[i % kOwn]);
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
template <int kD, int kBits, DType kType, int kTokens, int kSets>
__global__ void __launch_bounds__(kLutThreads, 1)
    vq_gemv_lut(VqWeight weight, VqActivations io, Segments segments, int64_t padded_rows,
                float* __restrict__ partial) {
    using Builder = TableBuilder<kD, kBits, kTokens>;
    constexpr int kPositions = Builder::kPositions;
    constexpr int kBatch = kPositions < 4 ? kPositions : 4;  // positions whose codes are in flight
    float* tables = reinterpret_cast<float*>(shared_memory());
    float* inputs = tables + 2 * kTable * kTokens;
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * segments.length;
    const int64_t left = weight.positions - begin;
    const int length = static_cast<int>(left < segments.length ? left : segments.length);

    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int part = lane % kLanesPerTile;
    const int64_t tiles = padded_rows / kTileRows;
    int64_t tile[kSets];
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
        tile[s] = (static_cast<int64_t>(blockIdx.y) * kSets + s) * kSetTiles + warp * kWarpTiles +
                  lane / kLanesPerTile;
    }

    const Builder builder(weight.codebook);
    for (int i = threadIdx.x; i < length * kTokens; i += kLutThreads) {
        float x[kD];
        load_scaled<kD, kType>(io, weight, i % kTokens, begin + i / kTokens, x);
#pragma unroll
        for (int j = 0; j < kD; ++j) inputs[i * kInputStride<kD> + j] = x[j];
    }
    __syncthreads();
    builder.build(inputs, 0, length, tables);
    __syncthreads();

    float acc[kSets][kLaneRows][kTokens] = {};
    for (int first = 0, turn = 0; first < length; first += kPositions, turn ^= 1) {
        const float* table = tables + turn * kTable * kTokens;
#pragma unroll
        for (int batch = 0; batch < kPositions; batch += kBatch) {
            LaneCodes<kBits> codes[kSets][kBatch];
#pragma unroll
            for (int s = 0; s < kSets; ++s) {
#pragma unroll
                for (int q = 0; q < kBatch; ++q) {
                    if (tile[s] >= tiles || first + batch + q >= length) continue;
                    codes[s][q] =
                        load_codes<kBits>(weight, tile[s], begin + first + batch + q, part);
                }
            }
            // The next table is built while the first codes are on their way.
            if (batch == 0 && first + kPositions < length) {
                builder.build(inputs, first + kPositions, length,
                              tables + (turn ^ 1) * kTable * kTokens);
            }
#pragma unroll
            for (int s = 0; s < kSets; ++s) {
#pragma unroll
                for (int q = 0; q < kBatch; ++q) {
                    if (tile[s] >= tiles || first + batch + q >= length) continue;
#pragma unroll
                    for (int r = 0; r < kLaneRows; ++r) {
                        const unsigned entry =
                            (batch + q) * Builder::kEntries + codes[s][q].code(r);
                        add_entry<kTokens>(table + entry * kTokens, acc[s][r]);
                    }
                }
            }
        }
        __syncthreads();
    }

#pragma unroll
    for (int s = 0; s < kSets; ++s) {
        if (tile[s] >= tiles) continue;
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
            float* sums = partial + (static_cast<int64_t>(blockIdx.x) * kTokens + t) * padded_rows +
                          tile[s] * kTileRows + part * kLaneRows;
#pragma unroll
            for (int r = 0; r < kLaneRows; r += 4) {
                *reinterpret_cast<float4*>(sums + r) =
                    make_float4(acc[s][r][t], acc[s][r + 1][t], acc[s][r + 2][t], acc[s][r + 3][t]);
            }
        }
    }
}

// Adds the segments of 32 rows up, a warp a residue, and finishes the outputs of one token.
template <DType kType>
__global__ void __launch_bounds__(kResidues* kWarpSize)
    vq_gemv_finish(VqWeight weight, VqActivations io, int segments, int64_t padded_rows,
                   const float* __restrict__ partial) {
    float* sums = reinterpret_cast<float*>(shared_memory());
    const int lane = threadIdx.x % kWarpSize, residue = threadIdx.x / kWarpSize;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kTileRows + lane;
    const int token = blockIdx.y;
    float sum = 0.0f;
#pragma unroll 9
    for (int s = residue; s < segments; s += kResidues) {
        sum += partial[(static_cast<int64_t>(s) * io.tokens + token) * padded_rows + row];
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (residue != 0 || row >= weight.rows) return;
    float total = 0.0f;
    for (int other = 0; other < kResidues; ++other) total += sums[other * kWarpSize + lane];
    store_output<kType>(io, weight, token, row, total);
}

}  // namespace nowag::cuda
