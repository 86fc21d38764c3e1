// vq_gemv.h on a GPU for 17 to 64 tokens of 16-bit inputs, d = 4 at 8 and 12 bits, d = 6 at 12: as
// vq_gemv_mma.cuh, but that a gather serves all tokens, and inputs are not split: x_j col_norms_j
// is one float16 number, scaled by a power of two for each token.
//
//   block: 2 bands of 64 rows, 4 warps each. In a turn the warps of a band take 4 consecutive
//          steps, one each; what they multiply with, 6 KB a step at 64 tokens and d = 6, is copied
//          to shared memory one turn ahead.
//   warp:  for each of a lane's 8 rows one gather of both positions, and kD / 2 products of 16
//          tokens by 8 rows for every tile of tokens. Sums stay in registers, 32 a lane and tile,
//          and are added up by tensor cores alone until the item ends.
//
// Predicted for an H100, 11008 x 4096, d = 6, 64 tokens: 27 us (32 by benchmarks/predict.py), where
// cuBLAS takes 36: prepare 3.5,
// this 17, add 3.5, fill and drain 3. Of 512 codes (8 warps, a row of each lane) gathers take the
// L1 155 cycles, operands 48, codes 24: 25 k cycles in all, 14.4 us; tensor cores 168 beside those.
// d = 4 at 8 bits: 32, 32 and 16, tensor cores 112: they bound it, 22 us.
//
// Error: x_j col_norms_j is rounded to 11 bits, 4.9e-4 of the absolute sum; what float16 loses
// below 2^-24 is the same term as for vq_gemv_mma.cuh, over a whole token. At most
// kBatchWarpSteps * kD / 2 additions in a row lose what lies 2 bits below the largest of 17 terms,
// and the rest of float32 when they are truncated: 7e-5, within vq_gemv.h's 5.7e-4 and 8e-6.
#pragma once

#include "cuda/vq/vq_gemv_mma.cuh"

namespace nowag::cuda {

constexpr int kTokenTile = 16;
constexpr int kBatchTiles = kVqGemvBatchTokens / kTokenTile;
constexpr int kBatchThreads = 256;
constexpr int kBatchSlices = kBatchThreads / kWarpSize / kBands;
constexpr int kBatchWarpSteps = 32;  // of a warp in one segment
// What an item's end takes, in turns: the sums are added up, and no operands are on their way.
constexpr double kBatchItemEndTurns = 1.0;
constexpr int kPrepareBatchThreads = 512;
constexpr int kAddThreads = 256;
constexpr int kAddRows = 4;

// Pieces of 16 bytes: what all lanes multiply with in a step.
template <int kD, int kTiles>
constexpr int kStepOperands = kTiles * (kD / 2) * kWarpSize;
// Quads of rows that a slice has of one tile of tokens.
constexpr int kTileSums = 2 * kBlockSums;

// The table, then two stages of operands, which at an item's end are the sums of a tile of tokens.
template <int kD, int kTiles>
constexpr size_t kStageBytes = sizeof(uint4) * kBatchSlices * kStepOperands<kD, kTiles>;
constexpr size_t kBatchSumBytes = sizeof(float4) * kBatchSlices * kTileSums;
template <int kD, int kBits, int kTiles>
constexpr size_t kBatchShared =
    kTableBytes<kD, kBits> +
    (2 * kStageBytes<kD, kTiles> > kBatchSumBytes ? 2 * kStageBytes<kD, kTiles> : kBatchSumBytes);

// Rounds and scales the inputs for vq_gemv_batch.
//   kD      4 or 6
//   kType   of x
//   tiles   of tokens
//   inputs  out: operands [step, tile, kD / 2, lane], scales [token]; absent tokens are 0
// Block x: token x; a thread: columns, then the two positions of lane 4 g + t of a step, in turn.
// Bound by latency: two passes over a row, which the second finds in caches.
template <int kD, DType kType>
__global__ void __launch_bounds__(kPrepareBatchThreads)
    vq_gemv_prepare_batch(VqWeight weight, VqActivations io, int tiles, MmaInputs inputs) {
    float* of_warps = reinterpret_cast<float*>(shared_memory());
    let_next_kernel_start();
    const int token = blockIdx.x;
    const bool present = token < io.tokens;
    float largest = 0.0f;
    for (int64_t column = threadIdx.x; present && column < weight.cols;
         column += kPrepareBatchThreads) {
        const float x = Element<kType>::load(io.x, token * weight.cols + column);
        largest = fmaxf(largest, fabsf(x * half_to_float(weight.col_norms[column])));
    }
#pragma unroll
    for (int apart = kWarpSize / 2; apart > 0; apart /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, apart));
    }
    if (threadIdx.x % kWarpSize == 0) of_warps[threadIdx.x / kWarpSize] = largest;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kPrepareBatchThreads / kWarpSize; ++w) {
        largest = fmaxf(largest, of_warps[w]);
    }
    const PowerOfTwo scale(largest);
    if (threadIdx.x == 0) inputs.scales[token] = scale.inverse;

    const int tile = token / kTokenTile, half = token / 8 % 2, g = token % 8;
    uint32_t* words = reinterpret_cast<uint32_t*>(inputs.operands);
    for (int i = threadIdx.x; i < inputs.steps * 4; i += kPrepareBatchThreads) {
        const int step = i / 4, t = i % 4;
        float x[2][kD] = {};
#pragma unroll
        for (int q = 0; q < 2; ++q) {
            if (present) {
                load_scaled<kD, kType>(io, weight, token,
                                       static_cast<int64_t>(step) * kStep + t + 4 * q, x[q]);
            }
#pragma unroll
            for (int j = 0; j < kD; ++j) x[q][j] *= scale.value;
        }
        // The token is row g of the first operand, words 0 and 2, or g + 8, words 1 and 3.
        const auto store = [&](int product, const float (&left)[kD], const float (&right)[kD],
                               int from_left, int from_right) {
            using Half = Element<DType::float16>;
            const int64_t operand =
                ((static_cast<int64_t>(step) * tiles + tile) * (kD / 2) + product) * kWarpSize +
                4 * g + t;
            words[operand * 4 + half] = Half::pair(left[from_left], left[from_left + 1]);
            words[operand * 4 + half + 2] = Half::pair(right[from_right], right[from_right + 1]);
        };
        store(0, x[0], x[0], 0, 2);
        store(1, x[1], x[1], 0, 2);
        if constexpr (kD == 6) store(2, x[0], x[1], 4, 4);
    }
}

//   kD, kBits  4 and 8 or 12, or 6 and 12: d and the bits of a code
//   kTiles     of tokens, up to kBatchTiles
//   inputs     of vq_gemv_prepare_batch
//   segments   of steps
//   partial    out, [segment, token, padded_rows]
// A block: items (segment, bands of a block) in turn; a warp: one band of each, every
// kBatchSlices-th step; a lane: 8 rows at 2 positions of each step.
template <int kD, int kBits, int kTiles>
__global__ void __launch_bounds__(kBatchThreads, 1)
    vq_gemv_batch(VqWeight weight, int tokens, MmaInputs inputs, Segments segments,
                  int64_t padded_rows, float* partial) {
    constexpr int kOperands = kStepOperands<kD, kTiles>;
    unsigned char* table = shared_memory();
    uint4* stages = reinterpret_cast<uint4*>(table + kTableBytes<kD, kBits>);
    float4* sums = reinterpret_cast<float4*>(stages);
    let_next_kernel_start();
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int band = warp % kBands, slice = warp / kBands;
    const int pieces = static_cast<int>((padded_rows + kBlockRows - 1) / kBlockRows);
    const auto place_of = [&](const MmaItem& i) {
        return i.place<kBits>(weight, segments, inputs.steps, padded_rows, i.piece * kBlockRows,
                              band, 0);
    };
    MmaItem item(pieces);
    MmaPlace place = place_of(item);
    StepCodes<kBits> ahead;
    ahead.load(place, place.step + slice);
    fill_table<kD, kBits, kBatchThreads>(weight.codebook, table);
    wait_for_previous_kernel();

    while (item.segment < segments.count) {
        int stage = 0;
        const auto start_copying = [&](int step) {
            const int count = min(kBatchSlices, place.end - step) * kOperands;
            const uint4* source = inputs.operands + static_cast<int64_t>(step) * kOperands;
            uint4* to = stages + stage * kBatchSlices * kOperands;
            for (int i = threadIdx.x; i < count; i += kBatchThreads) start_copy(to + i, source + i);
            commit_copies();
            stage ^= 1;
        };
        start_copying(place.step);
        MmaC total[kTiles][kLaneRows] = {};
        for (int first = place.step; first < place.end; first += kBatchSlices) {
            wait_for_copies<0>();
            __syncthreads();  // this turn's operands have come, and nobody reads the last one's
            const uint4* operands =
                stages + ((stage ^ 1) * kBatchSlices + slice) * kOperands + lane;
            if (first + kBatchSlices < place.end) start_copying(first + kBatchSlices);
            const StepCodes<kBits> codes = ahead;
            ahead.load(place, first + kBatchSlices + slice);
            if (first + slice >= place.end) continue;
            MmaA a[kTiles][kD / 2];
#pragma unroll
            for (int m = 0; m < kTiles; ++m) {
#pragma unroll
                for (int i = 0; i < kD / 2; ++i) {
                    const uint4 words = operands[(m * (kD / 2) + i) * kWarpSize];
                    a[m][i] = MmaA{{words.x, words.y, words.z, words.w}};
                }
            }
#pragma unroll
            for (int u = 0; u < kLaneRows; ++u) {
                uint2 b[kD / 2];
                gather<kD, kBits>(table, codes, u, b);
#pragma unroll
                for (int m = 0; m < kTiles; ++m) {
#pragma unroll
                    for (int i = 0; i < kD / 2; ++i) {
                        mma_16<DType::float16>(a[m][i], b[i].x, b[i].y, total[m][u]);
                    }
                }
            }
        }

        const int segment = item.segment;
        const int first_row = item.piece * kBlockRows;
        item.advance(pieces);
        place = place_of(item);
        ahead.load(place, place.step + slice);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
            __syncthreads();  // nobody reads the operands, or the tile before, any more
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int quad = 0; quad < kQuads; ++quad) {
                    const auto sum = [&](int e) {
                        return total[m][quad % 2 * 4 + e].x[2 * half + quad / 2];
                    };
                    sums[slice * kTileSums + half * kBlockSums +
                         (band * kQuads + quad) * kWarpSize + lane] =
                        make_float4(sum(0), sum(1), sum(2), sum(3));
                }
            }
            __syncthreads();
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int token = m * kTokenTile + half * kOctet;
                add_slices<kBatchThreads, kBatchSlices>(
                    sums + half * kBlockSums, kTileSums, first_row, tokens - token, padded_rows,
                    padded_rows,
                    partial + (static_cast<int64_t>(segment) * tokens + token) * padded_rows);
            }
        }
        __syncthreads();
    }
}

// Adds the segments of vq_gemv_batch up and finishes the outputs.
//   kType    of bias and y
//   scales   of the tokens
//   partial  [segment, token, padded_rows]
// Block (x, y): token y; a thread: kAddRows rows. Bound by the partial sums' bytes.
template <DType kType>
__global__ void __launch_bounds__(kAddThreads)
    vq_gemv_add(VqWeight weight, VqActivations io, int segments, int64_t padded_rows,
                const float* scales, const float* partial) {
    const int64_t row = (static_cast<int64_t>(blockIdx.x) * kAddThreads + threadIdx.x) * kAddRows;
    const int token = blockIdx.y;
    wait_for_previous_kernel();
    if (row >= weight.rows) return;
    const int64_t segment = static_cast<int64_t>(io.tokens) * padded_rows;
    const float* sums = partial + token * padded_rows + row;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
    for (int s = 0; s < segments; ++s) {
        sum = sum_of(sum, *reinterpret_cast<const float4*>(sums + s * segment));
    }
    const float scale = scales[token];
    const float values[kAddRows] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int r = 0; r < kAddRows; ++r) {
        if (row + r < weight.rows) {
            store_output<kType>(io, weight, token, row + r, values[r] * scale);
        }
    }
}

}  // namespace nowag::cuda
