// What the fast paths of vq_gemv.h on a GPU share: the codes of a lane, the cut of the positions
// into segments, and the kernel that adds the segments up.
#pragma once

#include "cuda/vq/vq_gemv.cuh"

namespace nowag::cuda {

constexpr int kLaneRows = 8;  // rows of one tile whose codes one lane reads: whole words
constexpr int kLanesPerTile = kTileRows / kLaneRows;
constexpr int kFinishThreads = 512;
constexpr int kFinishWarps = kFinishThreads / kWarpSize;

// The positions of a layer (or steps of them), cut into `count` runs of `length`, the last shorter.
// The cut depends on the shape and the device alone (of which multiprocessors and how many clusters
// run at once), so that the order of sums does.
struct Segments {
    int count;
    int length;
};

// Products of one x that a launch computes together, or one alone. What blocks take is counted
// through all members.
//
// A chain of kernels costs 6 us of launches, first bytes and last sums, however little it computes.
// Predicted for an H100 and one token of a Llama-2-7B block (benchmarks/predict.py), whose queries,
// keys and values are one and whose gate and up are another: d = 6 in 69 us where seven chains take
// 96, d = 4 in 57 instead of 70.
struct VqGroup {
    struct Member {
        VqWeight weight;
        VqActivations io;
        int64_t padded_rows;  // to whole tiles
        int64_t first_row;    // those of the members before it
        int first_piece;      // likewise, of what a block takes
    };
    Member members[kVqMaxMembers];
    int count;
    int pieces;
    int64_t padded_rows;

    __host__ __device__ int64_t positions() const { return members[0].weight.positions; }
    __host__ __device__ int tokens() const { return members[0].io.tokens; }

    __device__ __forceinline__ int of_row(int64_t row) const {
        int member = 0;
        while (member + 1 < count && row >= members[member + 1].first_row) ++member;
        return member;
    }
    __device__ __forceinline__ int of_piece(int piece) const {
        int member = 0;
        while (member + 1 < count && piece >= members[member + 1].first_piece) ++member;
        return member;
    }
};

// What takes the largest of some numbers, in magnitude, to [2^14, 2^15): as float16 none overflows,
// and as little as can be is lost below 2^-24. Both it and its inverse are normal numbers.
struct PowerOfTwo {
    float value;
    float inverse;

    __device__ __forceinline__ explicit PowerOfTwo(float largest) {
        const unsigned exponent = __float_as_uint(largest) >> 23;
        const unsigned bounded = exponent < 15u ? 15u : exponent;
        value = __uint_as_float((268u - bounded) << 23);
        inverse = __uint_as_float((bounded - 14u) << 23);
    }
};

template <int kBits>
struct LaneCodes {
    static constexpr int kWords = kLaneRows * kBits / 32;
    uint32_t words[kWords];

    // 2^kScale times code r of the lane's 8: the place of its entry in a table whose entries are
    // that large. r is known to the compiler, and so is the word: a shift and a mask.
    template <int kScale>
    __device__ __forceinline__ unsigned code(int r) const {
        constexpr uint32_t kMask = ((1u << kBits) - 1u) << kScale;
        const int bit = r * kBits - kScale;
        if (bit < 0) return (words[0] << -bit) & kMask;
        const int word = bit / 32, shift = bit % 32;
        const bool straddles = shift + kScale + kBits > 32;
        return __funnelshift_r(words[word], straddles ? words[word + 1] : 0u, shift) & kMask;
    }
};

__device__ __forceinline__ float4 sum_of(const float4& a, const float4& b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Where a lane's words of a tile begin at a position; those of the next are kBits words on.
template <int kBits>
__device__ __forceinline__ const uint32_t* lane_words(const VqWeight& weight, int64_t tile,
                                                      int position, int part) {
    return weight.packed + tile * weight.positions * kBits +
           (position * kBits + part * LaneCodes<kBits>::kWords);
}

template <int kBits>
__device__ __forceinline__ LaneCodes<kBits> load_codes(const uint32_t* words) {
    LaneCodes<kBits> codes;
    if constexpr (LaneCodes<kBits>::kWords == 2) {
        const uint2 pair = *reinterpret_cast<const uint2*>(words);
        codes.words[0] = pair.x, codes.words[1] = pair.y;
    } else {
#pragma unroll
        for (int w = 0; w < LaneCodes<kBits>::kWords; ++w) codes.words[w] = words[w];
    }
    return codes;
}

// Adds the segments up and finishes the outputs.
//   kType      of bias and y
//   kResidues  warps that share 32 rows: warp r of them adds up segments r mod kResidues,
//              ascending, and one of them the residues r, ascending
//   partial    [segment, token, row of all members], of vq_gemv_lut or vq_gemv_mma
// Block (x, y): kFinishWarps / kResidues tiles of token y. Bound by latency: a chain of loads, a
// barrier, one store. Measured on an H100 at 11008 x 4096: 7 us on its own for 1 token.
template <DType kType, int kResidues>
__global__ void __launch_bounds__(kFinishThreads)
    vq_gemv_finish(const __grid_constant__ VqGroup group, int segments, const float* partial) {
    float* sums = reinterpret_cast<float*>(shared_memory());
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int residue = warp % kResidues, token = blockIdx.y;
    const int64_t tile =
        static_cast<int64_t>(blockIdx.x) * (kFinishWarps / kResidues) + warp / kResidues;
    const int64_t row_of_all = tile * kTileRows + lane;
    const VqGroup::Member& member = group.members[group.of_row(row_of_all)];
    const int64_t row = row_of_all - member.first_row;
    wait_for_previous_kernel();
    float sum = 0.0f;
    if (row_of_all < group.padded_rows) {
#pragma unroll 9
        for (int s = residue; s < segments; s += kResidues) {
            sum += partial[(static_cast<int64_t>(s) * gridDim.y + token) * group.padded_rows +
                           row_of_all];
        }
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (residue != 0 || row >= member.weight.rows) return;
    float total = 0.0f;
    for (int r = 0; r < kResidues; ++r) total += sums[threadIdx.x + r * kWarpSize];
    store_output<kType>(member.io, member.weight, token, row, total);
}

}  // namespace nowag::cuda
