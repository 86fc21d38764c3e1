// vq_gemv.h on a GPU for one token, or two of 16 bits, d = 6 and 12 bits: products are looked up,
// not computed.
//
// For a position p the table T_p[k] = x_p . c_k is built once and then serves every row: one 4-byte
// gather from shared memory a code, where decoding needs a 12-byte one: 32 codes hit 32 banks at
// random, in about 3.5 cycles, and take 0.8 more to be staged and read: shared memory has time for
// 45 weights a cycle and multiprocessor, where vq_gemv_mma.cuh takes 16.
//
// Measured on an H100 at 11008 x 4096 with two stages of codes: 19 us, 21.5 with vq_gemv_finish; a
// read of the codes takes 6. Latency bounded it, not shared memory (30 % of its rate): each
// position waited for a copy that was started one position ago, 3 us each of a block's 6.
// Predicted with kDeepStages (benchmarks/predict.py): 17 us with vq_gemv_finish; 28672 x 8192 in 47
// where it took 55. If nothing but gathers, tables and first bytes counted it were 12.5 and 33.
//
// Two tokens: an entry is a pair of float16, gathered at the price of one float32. What a product
// T loses: each token's at a position are scaled by a power of two s that takes
//   L = sum_j |x_j| * max |c|  >=  |T|
// to [2^14, 2^15), both in float32, so that none overflows (L is at least 2^-112 for s to be
// normal). float16 rounds |s T| to 11 bits, and below 2^-14 to a multiple of 2^-24: T loses
// 2^-11 |T| or 2^-25 / s <= 2^-39 L, and a rounded L is below 2 L.
// float32 sums hold 64 accumulators in 4 sets beside the builder's 48 entries: 2 sets fit.
// Predicted (benchmarks/predict.py): 12, 18, 55 us at 4096 x 4096, 11008 x 4096, 28672 x 8192,
// where vq_gemv_mma takes 12, 20 and 75 for 4. At the last, 33 segments of 42 positions by 4 chunks
// are one wave of 132 blocks; a position of 8192 rows takes shared memory 900 cycles for gathers,
// 190 for codes and 130 for the table, and 296 instructions of each warp 1180 cycles beside it.
//
//           positions of one segment (blockIdx.x)
//          +-----------+-----------+---
//   rows   | table of  |  next     |        A block: one segment of positions, all rows (or a chunk
//   of a   | 4096      |  table,   |        of kSets * 4096 of them). Two tables: one is read while
//   chunk  | products  |  built    |        the next is built, one barrier between.
//          |           |  meanwhile|        A warp: 8 tiles of 32 rows; a lane: 8 rows of one tile,
//          +-----------+-----------+---     whose codes are 3 whole words, and 8 sums.
//
// Codes come through shared memory, so that loads are of whole 16-byte chunks, and far ahead:
// kStages stages of kRun positions for each warp, one being read, the others on their way.
//
// The sums of a segment go to scratch memory, [segment, token, row], and vq_gemv_finish adds them
// up.
#pragma once

#include "cuda/vq/vq_gemv_fast.cuh"

namespace nowag::cuda {

constexpr int kLutThreads = 512;
constexpr int kLutWarps = kLutThreads / kWarpSize;
constexpr int kLutD = 6;
constexpr int kLutBits = 12;
constexpr int kTable = 1 << kLutBits;  // entries of a table
constexpr int kWarpTiles = kWarpSize / kLanesPerTile;
constexpr int kSetTiles = kLutWarps * kWarpTiles;  // tiles that a block takes with one set of sums
constexpr int kLutResidues = 16;                   // of vq_gemv_finish
constexpr int kInputStride = 8;  // floats of a scaled sub-vector of the inputs: whole 16-byte loads
constexpr int kInputUnit = 6;    // where what takes its products back is
constexpr int kChunk = 16;       // bytes of a copy
constexpr int kTileChunks = kTileRows * kLutBits / 8 / kChunk;  // of a tile's codes at a position

// Sets of sums that a thread's registers hold.
template <int kTokens>
constexpr int kMaxSets = kTokens == 1 ? 4 : 2;

// The most tokens of a type whose products are looked up.
constexpr int lut_tokens(DType dtype) { return dtype == DType::float32 ? 1 : 2; }

__device__ __forceinline__ void read_input(const float* input, float (&x)[kLutD]) {
    const float4 low = *reinterpret_cast<const float4*>(input);
    const float2 high = *reinterpret_cast<const float2*>(input + 4);
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w, x[4] = high.x, x[5] = high.y;
}

// The codes of one warp for kRun positions: [set][position][tile][kTileChunks] chunks. Where kRun
// is not 1 a position is an odd number of chunks, so that the copies of a tile's positions, which
// are made side by side, do not meet in banks.
template <int kSets, int kRun>
struct LutStage {
    static constexpr int kPosition = (kWarpTiles + (kRun > 1)) * kTileChunks;
    static constexpr int kSet = kRun * kPosition;
    static constexpr int kBytes = kSets * kSet * kChunk;
};

// Stages where shared memory has room for more than two: 98 or 110 KB of codes on their way, where
// 16 KB would do if they were read as fast as they come.
constexpr int kDeepStages = 4;

// What a block of vq_gemv_lut keeps in shared memory: two tables [kTable], the stages
// [kStages][warp], then the scaled inputs of its segment, [position][token][kInputStride].
template <int kTokens, int kSets, int kStages>
struct LutMemory {
    static constexpr int kRun = kSets > 1 ? 1 : 4;
    using Stage = LutStage<kSets, kRun>;
    static constexpr unsigned kOneTable = sizeof(uint32_t) * kTable;
    static constexpr unsigned kFirstStage = 2 * kOneTable;
    static constexpr unsigned kOneStage = kLutWarps * Stage::kBytes;
    static constexpr unsigned kInputs = kFirstStage + kStages * kOneStage;

    static constexpr size_t bytes(int segment_length) {
        return kInputs + sizeof(float) * segment_length * kTokens * kInputStride;
    }
};

// Copies the codes of one warp, stage by stage; `tile` is its first, `begin` its first position.
template <int kSets, int kRun>
class LutCopier {
  public:
    __device__ __forceinline__ LutCopier(const VqWeight& weight, int64_t tile, int64_t begin,
                                         int length)
        : left_(length) {
        const int lane = threadIdx.x % kWarpSize;
        const int chunk = lane % kTileChunks, of_tile = lane / kTileRun;
        run_ = lane % kTileRun / kTileChunks;
        place_ = (run_ * Stage::kPosition + of_tile * kTileChunks + chunk) * kChunk;
        stride_ = weight.positions * kTileChunks * kStep;
        source_ = reinterpret_cast<const uint4*>(weight.packed) +
                  ((tile + of_tile) * weight.positions + begin + run_) * kTileChunks + chunk;
        const int64_t tiles = (weight.rows + kTileRows - 1) / kTileRows - tile - of_tile;
        count_ = lane < kLanes && tiles > 0 ? static_cast<int>((tiles + kStep - 1) / kStep) : 0;
    }

    // Starts copying the next stage, as much of it as there is, to `stage`.
    __device__ __forceinline__ void start(unsigned char* stage) {
        if (run_ < left_) {
#pragma unroll
            for (int i = 0; i < kCopies; ++i) {
                if (i >= count_) break;
                start_copy(stage + place_ + i * kTogether * kTileChunks * kChunk,
                           source_ + i * stride_);
            }
        }
        commit_copies();
        source_ += kTileRun;
        left_ -= kRun;
    }

  private:
    using Stage = LutStage<kSets, kRun>;
    static constexpr int kLanes = kWarpTiles * kTileChunks;  // those that copy
    static constexpr int kTileRun = kRun * kTileChunks;      // chunks side by side in memory
    static constexpr int kTogether = kLanes / kTileRun;      // tiles that are copied at once
    static constexpr int kCopies = kSets * kRun;             // of a lane in a stage
    static constexpr int kStep = kSets == 1 ? kTogether : kSetTiles;  // tiles from one to the next
    static_assert(kSets == 1 || kRun == 1, "one stride");

    const uint4* source_;  // of the lane's first copy
    int64_t stride_;
    int count_;  // how many of the lane's tiles exist
    int run_;    // the lane's position in the stage
    int left_;   // positions that are left
    int place_;
};

// Entries of tables: float32 for one token, a float16 for each of two, token 0 the low one.
__device__ __forceinline__ uint32_t table_entry(const float (&products)[1]) {
    return __float_as_uint(products[0]);
}
__device__ __forceinline__ uint32_t table_entry(const float (&products)[2]) {
    return Element<DType::float16>::pair(products[0], products[1]);
}

// Adds an entry of tables to the sums of a row; `units` take its products back.
__device__ __forceinline__ void add_entry(uint32_t entry, const float (&units)[1],
                                          float (&sums)[1]) {
    sums[0] = fused(__uint_as_float(entry), units[0], sums[0]);
}
__device__ __forceinline__ void add_entry(uint32_t entry, const float (&units)[2],
                                          float (&sums)[2]) {
    sums[0] = fused(half_to_float(static_cast<uint16_t>(entry)), units[0], sums[0]);
    sums[1] = fused(half_to_float(static_cast<uint16_t>(entry >> 16)), units[1], sums[1]);
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

    // The products of one position from its inputs.
    __device__ __forceinline__ void build(const float* inputs, unsigned char* memory) const {
        uint32_t* table = reinterpret_cast<uint32_t*>(memory);
        float x[kTokens][kLutD];
#pragma unroll
        for (int t = 0; t < kTokens; ++t) read_input(inputs + t * kInputStride, x[t]);
#pragma unroll
        for (int e = 0; e < kOwn; ++e) {
            float products[kTokens];
#pragma unroll
            for (int t = 0; t < kTokens; ++t) products[t] = product<kLutD>(x[t], c[e]);
            table[threadIdx.x + e * kLutThreads] = table_entry(products);
        }
    }

    // The largest coordinate of the codebook, in magnitude, and at least the smallest float16 that
    // is not 0. `warps` is kLutWarps floats of shared memory, free again behind the next barrier.
    __device__ __forceinline__ float largest(float* warps) const {
        float most = 0x1p-24f;
#pragma unroll
        for (int e = 0; e < kOwn; ++e) {
#pragma unroll
            for (int j = 0; j < kLutD; ++j) most = fmaxf(most, fabsf(c[e][j]));
        }
#pragma unroll
        for (int apart = kWarpSize / 2; apart > 0; apart /= 2) {
            most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, apart));
        }
        if (threadIdx.x % kWarpSize == 0) warps[threadIdx.x / kWarpSize] = most;
        __syncthreads();
        for (int w = 0; w < kLutWarps; ++w) most = fmaxf(most, warps[w]);
        return most;
    }
};

// Scales the inputs of two tokens for their tables: no product of the position reaches 2^15.
__device__ __forceinline__ float scale_input(float largest_entry, float (&x)[kLutD]) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kLutD; ++j) sum += fabsf(x[j]);
    const PowerOfTwo scale(sum * largest_entry);
#pragma unroll
    for (int j = 0; j < kLutD; ++j) x[j] *= scale.value;
    return scale.inverse;
}

//   kType    of x
//   kTokens  1, or 2 of 16 bits
//   kSets    sets of sums in a thread's registers, a set being kSetTiles tiles of the block's
//   kStages  of codes
//   partial  out, [segment, token, row of all members]: sums of each segment, padded rows included
// Block (x, y): segment x, chunk y, of kSets * kSetTiles tiles of one member; a warp: kWarpTiles
// tiles of each set; a lane: kLaneRows rows of one tile of each set, and kTable / kLutThreads
// entries of each table.
template <DType kType, int kTokens, int kSets, int kStages>
__global__ void __launch_bounds__(kLutThreads, 1)
    vq_gemv_lut(const __grid_constant__ VqGroup group, Segments segments, float* partial) {
    using Memory = LutMemory<kTokens, kSets, kStages>;
    using Stage = typename Memory::Stage;
    constexpr int kRun = Memory::kRun;
    constexpr int kScale = 2;  // log2 of an entry's bytes
    let_next_kernel_start();
    const int chunk = blockIdx.y;
    const VqGroup::Member& member = group.members[group.of_piece(chunk)];
    const VqWeight& weight = member.weight;
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * segments.length;
    const int64_t left = weight.positions - begin;
    const int length = static_cast<int>(left < segments.length ? left : segments.length);

    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int64_t tile =
        static_cast<int64_t>(chunk - member.first_piece) * kSets * kSetTiles + warp * kWarpTiles;
    const int64_t lane_tile = tile + lane / kLanesPerTile;  // of the first set
    const int64_t tiles_left = member.padded_rows / kTileRows - lane_tile;

    // Places in shared memory, in bytes. Which of the two tables, which of the warp's stages.
    unsigned char* memory = shared_memory();
    unsigned table = 0;
    const unsigned first_stage = Memory::kFirstStage + warp * Stage::kBytes;
    unsigned stage = first_stage;
    LutCopier<kSets, kRun> copier(weight, tile, begin, length);
#pragma unroll
    for (int s = 0; s < kStages; ++s) copier.start(memory + first_stage + s * Memory::kOneStage);

    const TableBuilder<kTokens> builder(weight.codebook);
    float* inputs = reinterpret_cast<float*>(memory + Memory::kInputs);
    float largest_entry = 0.0f;
    if constexpr (kTokens > 1) largest_entry = builder.largest(reinterpret_cast<float*>(memory));
    for (int i = threadIdx.x; i < length * kTokens; i += kLutThreads) {
        float x[kLutD];
        float* input = inputs + i * kInputStride;
        load_scaled<kLutD, kType>(member.io, weight, i % kTokens, begin + i / kTokens, x);
        input[kInputUnit] = kTokens == 1 ? 1.0f : scale_input(largest_entry, x);
#pragma unroll
        for (int j = 0; j < kLutD; ++j) input[j] = x[j];
    }
    __syncthreads();
    builder.build(inputs, memory);
    wait_for_copies<kStages - 1>();
    __syncthreads();

    float acc[kSets][kLaneRows][kTokens] = {};
    for (int p = 0, run = 0; p < length; ++p, table ^= Memory::kOneTable) {
        float units[kTokens];
#pragma unroll
        for (int t = 0; t < kTokens; ++t) units[t] = inputs[t * kInputStride + kInputUnit];
        if (p + 1 < length) {
            inputs += kTokens * kInputStride;
            builder.build(inputs, memory + (table ^ Memory::kOneTable));
        }
#pragma unroll
        for (int s = 0; s < kSets; ++s) {
            if (s * kSetTiles >= tiles_left) continue;
            const LaneCodes<kLutBits> codes = load_codes<kLutBits>(
                reinterpret_cast<const uint32_t*>(
                    memory + stage + (s * Stage::kSet + run * Stage::kPosition) * kChunk) +
                lane * LaneCodes<kLutBits>::kWords);
#pragma unroll
            for (int r = 0; r < kLaneRows; ++r) {
                add_entry(*reinterpret_cast<const uint32_t*>(
                              memory + (codes.template code<kScale>(r) | table)),
                          units, acc[s][r]);
            }
        }
        // The barrier is the tables', and the stages': behind it this one is free, and the next
        // has come.
        const bool stage_ends = ++run == kRun;
        if (stage_ends) wait_for_copies<kStages - 2>();
        __syncthreads();
        if (!stage_ends) continue;
        copier.start(memory + stage);
        stage += Memory::kOneStage;
        if (stage == first_stage + kStages * Memory::kOneStage) stage = first_stage;
        run = 0;
    }

    float* sums = partial + static_cast<int64_t>(blockIdx.x) * kTokens * group.padded_rows +
                  member.first_row + lane_tile * kTileRows + lane % kLanesPerTile * kLaneRows;
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
        if (s * kSetTiles >= tiles_left) continue;
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
#pragma unroll
            for (int r = 0; r < kLaneRows; r += 4) {
                *reinterpret_cast<float4*>(sums + t * group.padded_rows +
                                           s * kSetTiles * kTileRows + r) =
                    make_float4(acc[s][r][t], acc[s][r + 1][t], acc[s][r + 2][t], acc[s][r + 3][t]);
            }
        }
    }
}

}  // namespace nowag::cuda
