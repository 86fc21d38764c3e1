// vq_gemv.h on a GPU with tensor cores, up to 8 tokens, where blocks come in clusters (compute
// capability 9.0): the products of vq_gemv_mma.cuh in one kernel instead of three.
//
//   cluster: rows in bands, one after another; its blocks share the positions, a segment each
//   block:   prepares the inputs of its segment in shared memory, once for all its rows of a
//            member, where it keeps the codebook too; then as in vq_gemv_mma
//   sums:    each block leaves those of an item in its shared memory; behind a barrier of the
//            cluster each adds up and finishes a part of the outputs, segments ascending
//
// A kernel that prepares the inputs and one that adds segments up cost 4 to 6 us of launches, first
// bytes and last sums before: of 9.2 us at 4096 x 4096, d = 4, one token (an H100).
//
// d = 6: entries are 16 bytes in shared memory, two of them unused: one load of 16 bytes, 8 cycles
// for 32 lanes at random, where loads of 8 and 4 take 9.7.
//
// Predicted for an H100 (benchmarks/predict.py), beside what three kernels took or would:
//   d = 4, 1 token     4096 x 4096: 32 clusters of 4, an item of 4 turns, 7.4 us (measured 9.2);
//                      11008 x 4096: 3 items of each, 14 (14); 28672 x 8192: 32 of 4, 7
//                      items of 8, 49 (44, which the model gives 51)
//   d = 6, 8 tokens    10 (13), 22 (24) and 87 (85), where gathers bound it
#pragma once

#include "cuda/vq/vq_gemv_mma.cuh"

namespace nowag::cuda {

// What the end of an item takes, in turns.
template <int kD>
constexpr double kClusterItemEndTurns = kD == 4 ? 1.5 : 0.4;

// The codebook as vq_gemv_cluster keeps it.
template <int kD, int kBits>
struct ClusterTable {
    static constexpr bool kWide = kD == 6;
    static constexpr int kWideShift = 4;  // log2 of an entry's bytes
    static constexpr unsigned kBytes =
        kWide ? 1u << (kBits + kWideShift) : static_cast<unsigned>(kTableBytes<kD, kBits>);

    static __device__ __forceinline__ void fill(const uint16_t* codebook, unsigned char* table) {
        if constexpr (kWide) {
            const uint32_t* pairs = reinterpret_cast<const uint32_t*>(codebook);
#pragma unroll
            for (int i = 0; i < (1 << kBits) / kMmaThreads; ++i) {
                const int k = threadIdx.x + i * kMmaThreads;
                reinterpret_cast<uint4*>(table)[k] =
                    make_uint4(pairs[3 * k], pairs[3 * k + 1], pairs[3 * k + 2], 0u);
            }
        } else {
            fill_table<kD, kBits, kMmaThreads>(codebook, table);
        }
    }

    // The second operands of product u.
    static __device__ __forceinline__ void gather(const unsigned char* table,
                                                  const StepCodes<kBits>& codes, int u,
                                                  uint2 (&b)[kD / 2]) {
        if constexpr (kWide) {
            const auto entry = [&](int q) {
                return *reinterpret_cast<const uint4*>(table +
                                                       codes.at[q].template code<kWideShift>(u));
            };
            const uint4 first = entry(0), second = entry(1);
            b[0] = make_uint2(first.x, first.y);
            b[1] = make_uint2(second.x, second.y);
            b[2] = make_uint2(first.z, second.z);
        } else {
            nowag::cuda::gather<kD, kBits>(table, codes, u, b);
        }
    }
};

// Shared memory: the codebook; the slices' sums of an item, [slice][kBlockSums] quads; those of all
// slices, twice, [kBlockSums] quads; then the inputs of the segment: operands
// [step][kD / 2][token][4] and scales [step][token].
template <int kD, int kBits>
struct ClusterMemory {
    static constexpr size_t kSlicesSums = ClusterTable<kD, kBits>::kBytes;
    static constexpr size_t kItemSums = kSlicesSums + sizeof(float4) * kSlices * kBlockSums;
    static constexpr size_t kOperands = kItemSums + 2 * sizeof(float4) * kBlockSums;
    static constexpr size_t kOfStep = sizeof(uint4) * (kD / 2) * 4 + sizeof(float);  // and token

    static constexpr size_t bytes(int tokens, int steps) {
        return kOperands + kOfStep * tokens * steps;
    }
    // The longest segment, whatever the number of tokens: bits must not depend on it.
    static constexpr int most_steps(size_t bytes) {
        return bytes < kOperands ? 0 : static_cast<int>((bytes - kOperands) / (kOfStep * kOctet));
    }
};

// A segment's inputs in shared memory.
template <int kD>
struct SegmentInputs {
    uint4* operands;
    float* scales;
    int tokens;
    int begin;  // step
    int steps;

    // Four lanes take a token's step.
    template <DType kType>
    __device__ __forceinline__ void prepare(const VqGroup::Member& member) const {
        constexpr int kFours = kMmaThreads / 4;
        const int t = threadIdx.x % 4, pairs = steps * tokens;
        const unsigned lanes = 0xfu << (threadIdx.x % kWarpSize - t);
        for (int i = threadIdx.x / 4; i < pairs; i += kFours) {
            const int step = i / tokens, token = i % tokens;
            const auto prepared = PreparedInputs<kD>::template of<kType>(
                member.io, member.weight, token, begin + step, lanes);
#pragma unroll
            for (int part = 0; part < kD / 2; ++part) {
                operands[place(step, part, token) + t] = prepared.operands[part];
            }
            if (t == 0) scales[i] = prepared.scale;
        }
    }

    __device__ __forceinline__ StepInputs<kD> at(int step) const {
        const int lane = threadIdx.x % kWarpSize, token = lane / 4;
        StepInputs<kD> found{};
        if (token >= tokens) return found;
        found.scale = scales[(step - begin) * tokens + token];
#pragma unroll
        for (int part = 0; part < kD / 2; ++part) {
            const uint4 words = operands[place(step - begin, part, token) + lane % 4];
            found.operands[part] = {{words.x, words.y, words.z, words.w}};
        }
        return found;
    }

  private:
    __device__ __forceinline__ int place(int step, int part, int token) const {
        return ((step * (kD / 2) + part) * tokens + token) * 4;
    }
};

constexpr int kItemOutputs = kBlockSums * 4;  // floats of all slices' sums
constexpr int kOutputsOfThread = kItemOutputs / kMmaThreads;

// An output of an item that a thread finishes; blocks of a cluster have a run of its sums each.
struct ItemOutput {
    int index = -1;  // of its sum, or none
    int token;
    int row;  // of the item's

    __device__ __forceinline__ ItemOutput() {}
    __device__ __forceinline__ ItemOutput(int rank, int ranks, int turn, int tokens, int64_t rows) {
        const int share = (kItemOutputs + ranks - 1) / ranks;
        const int of_share = static_cast<int>(threadIdx.x) + turn * kMmaThreads;
        const int i = rank * share + of_share, quad = i / 4;
        token = quad % kWarpSize / 4;
        row = quad / (kWarpSize * kQuads) * kBandRows + quad % 4 * 16 +
              quad / kWarpSize % kQuads * 4 + i % 4;
        if (of_share < share && i < kItemOutputs && token < tokens && row < rows) index = i;
    }
};

//   kD, kBits  as of vq_gemv_mma
//   kType      of x, bias and y
//   group      members that share a codebook, of up to 8 tokens
//   segments   of steps, one for each block of a cluster; some may be empty
// Cluster c of n: pieces [c P / n, (c + 1) P / n) of all P, kBlockRows rows each, so that few meet
// two members; a warp: one band of each item, every kSlices-th step of the block's segment; a lane:
// 8 rows at 2 positions of each step.
template <int kD, int kBits, DType kType>
__global__ void __launch_bounds__(kMmaThreads, 1)
    vq_gemv_cluster(const __grid_constant__ VqGroup group, Segments segments) {
    using Table = ClusterTable<kD, kBits>;
    using Memory = ClusterMemory<kD, kBits>;
    // Steps of codes on their way from memory: 24 or 12 KB of a block. d = 6 has no more registers.
    constexpr int kAhead = kD == 4 ? 3 : 1;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int band = warp % kBands, slice = warp / kBands;
    const int rank = static_cast<int>(blockIdx.x) % segments.count;
    const int64_t cluster = static_cast<int>(blockIdx.x) / segments.count;
    const int64_t clusters = static_cast<int>(gridDim.x) / segments.count;
    const int tokens = group.tokens();
    const int steps = static_cast<int>((group.positions() + kStep - 1) / kStep);
    const int begin = min(rank * segments.length, steps);
    const int end = min(begin + segments.length, steps);

    unsigned char* memory = shared_memory();
    auto* sums = reinterpret_cast<float4*>(memory + Memory::kSlicesSums);
    auto* both_item_sums = reinterpret_cast<float4*>(memory + Memory::kItemSums);
    auto* operands = reinterpret_cast<uint4*>(memory + Memory::kOperands);
    const int operand_count = (end - begin) * (kD / 2) * tokens * 4;
    const SegmentInputs<kD> inputs{operands, reinterpret_cast<float*>(operands + operand_count),
                                   tokens, begin, end - begin};

    int piece = static_cast<int>(cluster * group.pieces / clusters);
    const int last_piece = static_cast<int>((cluster + 1) * group.pieces / clusters);
    MmaPlace place{};
    StepCodes<kBits> ahead[kAhead];
    const auto first_row_of = [&](const VqGroup::Member& member) {
        return (piece - member.first_piece) * kBlockRows;
    };
    const auto start_piece = [&] {
        if (piece >= last_piece) return;
        const VqGroup::Member& member = group.members[group.of_piece(piece)];
        place = lane_place<kBits>(member.weight, member.padded_rows, first_row_of(member), band,
                                  begin + slice, end);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) ahead[i].load(place, place.step + i * kSlices);
    };
    start_piece();
    Table::fill(group.members[0].weight.codebook, memory);
    inputs.template prepare<kType>(group.members[group.of_piece(piece)]);
    __syncthreads();

    for (int half = 0; piece < last_piece; half ^= 1) {
        LaneSums total{};
        for (int step = place.step; step < end; step += kSlices) {
            const StepInputs<kD> a = inputs.at(step);
            const StepCodes<kBits> codes = ahead[0];
#pragma unroll
            for (int i = 1; i < kAhead; ++i) ahead[i - 1] = ahead[i];
            ahead[kAhead - 1].load(place, step + kAhead * kSlices);
#pragma unroll
            for (int u = 0; u < kLaneRows; ++u) {
                uint2 b[kD / 2];
                Table::gather(memory, codes, u, b);
                multiply<kD>(a, b, u, total);
            }
        }

        const VqGroup::Member& done = group.members[group.of_piece(piece)];
        const int first_row = first_row_of(done);
        ++piece;
        start_piece();
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad) {
            const float* x = total.x[quad / 2] + quad % 2 * 4;
            sums[slice * kBlockSums + (band * kQuads + quad) * kWarpSize + lane] =
                make_float4(x[0], x[1], x[2], x[3]);
        }
        __syncthreads();
        if (piece < last_piece && group.of_piece(piece) != group.of_piece(piece - 1)) {
            inputs.template prepare<kType>(group.members[group.of_piece(piece)]);
        }
        // Two halves in turn: whoever passes this item's barrier has read the last one's.
        float4* item_sums = both_item_sums + half * kBlockSums;
        if (threadIdx.x < kBlockSums) {
            float4 sum = sums[threadIdx.x];
#pragma unroll
            for (int other = 1; other < kSlices; ++other) {
                sum = sum_of(sum, sums[other * kBlockSums + threadIdx.x]);
            }
            item_sums[threadIdx.x] = sum;
        }
        ItemOutput outputs[kOutputsOfThread];
        RowTerms terms[kOutputsOfThread];
#pragma unroll
        for (int o = 0; o < kOutputsOfThread; ++o) {
            outputs[o] = ItemOutput(rank, segments.count, o, tokens, done.weight.rows - first_row);
            if (outputs[o].index < 0) continue;
            terms[o] = row_terms<kType>(done.io, done.weight, first_row + outputs[o].row);
        }
        cluster_barrier();
#pragma unroll
        for (int o = 0; o < kOutputsOfThread; ++o) {
            if (outputs[o].index < 0) continue;
            const float* own = reinterpret_cast<const float*>(item_sums) + outputs[o].index;
            float sum = load_from_block(own, 0);
            for (int other = 1; other < segments.count; ++other) {
                sum += load_from_block(own, other);
            }
            store_output<kType>(done.io, done.weight, outputs[o].token, first_row + outputs[o].row,
                                sum, terms[o]);
        }
    }
    cluster_barrier();  // nobody ends whose sums are still read
}

}  // namespace nowag::cuda
