// How kernels that read W once, and write a bitmap, cut it: into units of kSplitRows rows and 4
// columns a lane, a warp each. A lane's bits of a unit are one word, bit 4 r + c for row r and
// column c, and become whole words of the bitmap by shuffles.
#pragma once

#include "cuda/base/block.cuh"
#include "cuda/prune/prune.cuh"

namespace nowag::cuda {

constexpr int kSplitRows = 8;
constexpr int kSplitColumns = 4 * kWarpSize;
constexpr int kUnitsPerWarp = 2;

__device__ __forceinline__ int at_most(int64_t value, int limit) {
    return static_cast<int>(value < limit ? value : limit);
}

// The first `count` of four numbers, none if it is not positive, then 0. kVector: they are aligned
// to 16 bytes and count is a multiple of 4.
template <bool kVector>
__device__ __forceinline__ float4 load_four(const float* data, int count) {
    if (kVector) {
        return count > 0 ? *reinterpret_cast<const float4*>(data)
                         : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    const auto at = [&](int i) { return i < count ? data[i] : 0.0f; };
    return make_float4(at(0), at(1), at(2), at(3));
}

// The 8 x 8 transpose of 4-bit numbers over the 8 lanes that share lane / 8: number c of lane r is
// what number r of lane c was.
__device__ __forceinline__ unsigned transpose_nibbles(unsigned mine) {
    const int lane = threadIdx.x;
    unsigned other = __shfl_xor_sync(kFullWarp, mine, 4);
    mine = __byte_perm(mine, other, lane & 4 ? 0x3276 : 0x5410);
    other = __shfl_xor_sync(kFullWarp, mine, 2);
    mine = __byte_perm(mine, other, lane & 2 ? 0x3715 : 0x6240);
    other = __shfl_xor_sync(kFullWarp, mine, 1);
    constexpr unsigned kLow = 0x0f0f0f0f;
    return lane & 1 ? (mine & ~kLow) | (other >> 4 & kLow) : (mine & kLow) | (other << 4 & ~kLow);
}

// What a lane takes of a unit: 4 columns of its rows.
struct SplitPart {
    int64_t first;        // row of the layer
    int64_t strip;        // of kSplitColumns columns
    int64_t j;            // the lane's first column
    int rows;             // that the layer has here
    int columns;          // of the lane's 4, not positive past the row's end
    const float* corner;  // weight (first, j)

    // across: units side by side in a row of the layer.
    __device__ __forceinline__ SplitPart(const PruneLayer& layer, unsigned unit, unsigned across)
        : first(static_cast<int64_t>(unit / across) * kSplitRows),
          strip(unit % across),
          j(strip * kSplitColumns + 4 * lane_of_thread()),
          rows(at_most(layer.rows - first, kSplitRows)),
          columns(at_most(layer.cols - j, 4)),
          corner(layer.w + (first * layer.cols + j)) {}
};

// Writes a unit's bits to the bitmap, whose rows have `words` words. Returns how many are set in
// the word that the lane writes.
__device__ __forceinline__ unsigned write_part(const SplitPart& part, unsigned bits, int64_t words,
                                               unsigned* bitmap) {
    const int lane = lane_of_thread();
    const unsigned word = transpose_nibbles(bits);
    const int64_t place = part.strip * (kSplitColumns / 32) + lane / kSplitRows;
    if (lane % kSplitRows < part.rows && place < words) {
        bitmap[(part.first + lane % kSplitRows) * words + place] = word;
    }
    return static_cast<unsigned>(__popc(word));
}

// The number of a warp's unit u, below kUnitsPerWarp; the last may be past the last.
__device__ __forceinline__ unsigned unit_of_warp(int u) {
    return (blockIdx.x * kUnitsPerWarp + u) * kPruneWarps + warp_of_thread();
}

// The bits of a lane's weights that there are.
__device__ __forceinline__ unsigned present_bits(const SplitPart& part) {
    if (part.columns <= 0) return 0;
    return 0x11111111u * (0xfu >> (4 - part.columns)) & ~0u >> 4 * (kSplitRows - part.rows);
}

// A lane's weights, all rows read before any is looked at, and the importances of its columns.
template <bool kVector>
struct SplitWeights {
    float4 w[kSplitRows];
    float4 h;

    __device__ __forceinline__ SplitWeights(const PruneLayer& layer, const SplitPart& part) {
        const float* row = part.corner;
#pragma unroll
        for (int r = 0; r < kSplitRows; ++r, row += layer.cols) {
            w[r] = load_four<kVector>(row, r < part.rows ? part.columns : 0);
        }
        h = load_four<kVector>(layer.h + part.j, part.columns);
    }

    __device__ __forceinline__ void keys(int r, unsigned (&keys)[4]) const {
        keys[0] = saliency_bits(w[r].x, h.x), keys[1] = saliency_bits(w[r].y, h.y);
        keys[2] = saliency_bits(w[r].z, h.z), keys[3] = saliency_bits(w[r].w, h.w);
    }
};

inline int64_t units_of(const PruneLayer& layer) {
    return (layer.rows + kSplitRows - 1) / kSplitRows *
           ((layer.cols + kSplitColumns - 1) / kSplitColumns);
}

inline bool read_in_fours(const PruneLayer& layer) {
    const auto aligned = [](const void* pointer) {
        return reinterpret_cast<uintptr_t>(pointer) % alignof(float4) == 0;
    };
    return layer.cols % 4 == 0 && aligned(layer.w) && aligned(layer.h);
}

}  // namespace nowag::cuda
