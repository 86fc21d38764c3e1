// vq_pack.h on a GPU. A block takes one tile of 32 rows at kPackPositions positions, and passes the
// codes through shared memory so that both sides, rows of codes and bit streams of positions, are
// read and written in whole lines.
#pragma once

#include "cuda/base/device.cuh"
#include "nowag/format.h"
#include "nowag/vq_pack.h"

namespace nowag::cuda {

constexpr int kPackThreads = 256;
constexpr int kPackPositions = 64;
constexpr int kGatherPositions = 128;           // a thread each
constexpr int kPackPitch = kPackPositions + 2;  // keeps rows of uint16 in different banks
constexpr size_t kPackShared = sizeof(uint16_t) * kTileRows * kPackPitch;
// A position's stream is code_bits words; one more may be read past the last.
constexpr size_t kUnpackShared = sizeof(uint32_t) * (kPackPositions * kMaxCodeBits + 1);

// The code of row `r` of a tile from its position's stream of words.
__device__ __forceinline__ unsigned code_at(const uint32_t* words, int r, int code_bits) {
    const int bit = r * code_bits, word = bit / 32;
    // The next word is looked at only by a code that ends in it.
    const uint32_t next = bit % 32 + code_bits > 32 ? words[word + 1] : 0u;
    return __funnelshift_r(words[word], next, bit % 32) & ((1u << code_bits) - 1u);
}

__device__ __forceinline__ int positions_of_block(int64_t positions) {
    const int64_t left = positions - static_cast<int64_t>(blockIdx.x) * kPackPositions;
    return static_cast<int>(left < kPackPositions ? left : kPackPositions);
}

// codes [rows, positions] <-> packed [tile, position, code_bits] words, the bit streams of
// format.h; rows past the last get code 0.
// Block (x, y): kPackPositions positions of tile y. A thread packs one word after another, and
// unpacks one code after another.
__global__ void pack_code_tiles(const uint16_t* __restrict__ codes, int64_t rows, int64_t positions,
                                int code_bits, uint32_t* __restrict__ packed);
__global__ void unpack_code_tiles(const uint32_t* __restrict__ packed, int64_t rows,
                                  int64_t positions, int code_bits, uint16_t* __restrict__ codes);

// The packed form (format.h); codebook and norms as the bits of float16.
struct VqWeight {
    const uint32_t* packed;     // [tile, positions, code_bits] words
    const uint16_t* codebook;   // [2^code_bits, d], aligned to 4 bytes
    const uint16_t* row_norms;  // [rows]
    const uint16_t* col_norms;  // [cols]
    int64_t rows;
    int64_t cols;
    int64_t positions;
    int code_bits;
};

// The words of the block's tile and positions, to shared memory.
__device__ __forceinline__ void load_streams(const uint32_t* packed, int64_t tile,
                                             int64_t positions, int code_bits, uint32_t* words) {
    const int count = positions_of_block(positions) * code_bits;
    const uint32_t* source =
        packed + (tile * positions + static_cast<int64_t>(blockIdx.x) * kPackPositions) * code_bits;
    for (int i = threadIdx.x; i < count; i += kPackThreads) words[i] = source[i];
    __syncthreads();
}

// Rows [row_begin, row_end) as dense values, where vq_pack_dequantize.cuh does not serve: the
// codebook is too large for shared memory, or rows are no whole pieces of 16 bytes.
//   kType  of out
//   out    [row_end - row_begin, cols], rows out_stride elements apart
// Block (x, y): kPackPositions positions of tile y, counted from row_begin; a thread: one value
// after another, neighbours in a row.
template <DType kType>
__global__ void vq_dequantize_tiles(VqWeight weight, int d, int64_t row_begin, int64_t row_end,
                                    void* __restrict__ out, int64_t out_stride) {
    uint32_t* words = reinterpret_cast<uint32_t*>(shared_memory());
    const int64_t tile = row_begin / kTileRows + blockIdx.y;
    load_streams(weight.packed, tile, weight.positions, weight.code_bits, words);
    const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kPackPositions * d;
    const int width = kPackPositions * d;
    for (int e = threadIdx.x; e < kTileRows * width; e += kPackThreads) {
        const int r = e / width, column = e % width;
        const int64_t i = tile * kTileRows + r, j = first_column + column;
        if (i >= row_end || j >= weight.cols) continue;
        const unsigned code = code_at(words + column / d * weight.code_bits, r, weight.code_bits);
        const float value = half_to_float(weight.codebook[code * d + column % d]);
        const float scaled = half_to_float(weight.row_norms[i]) * value;
        Element<kType>::store(out, (i - row_begin) * out_stride + j,
                              scaled * half_to_float(weight.col_norms[j]));
    }
}

// Rows indices[0, count) as dense values, out [count, cols]; an index that no row has is taken for
// the nearest that one has.
//   kType  of out
// Block (x, y): kGatherPositions positions of row indices[x]; a thread: the d values of one.
template <DType kType>
__global__ void vq_gather_rows(VqWeight weight, int d, const int64_t* __restrict__ indices,
                               void* __restrict__ out) {
    const int64_t p = static_cast<int64_t>(blockIdx.y) * kGatherPositions + threadIdx.x;
    if (p >= weight.positions) return;
    const int64_t wanted = indices[blockIdx.x];
    const int64_t i = wanted < 0 ? 0 : wanted < weight.rows ? wanted : weight.rows - 1;
    const uint32_t* stream =
        weight.packed + (i / kTileRows * weight.positions + p) * weight.code_bits;
    const unsigned code = code_at(stream, static_cast<int>(i % kTileRows), weight.code_bits);
    const float row_norm = half_to_float(weight.row_norms[i]);
    for (int k = 0; k < d && p * d + k < weight.cols; ++k) {
        const int64_t j = p * d + k;
        const float scaled = row_norm * half_to_float(weight.codebook[code * d + k]);
        Element<kType>::store(out, blockIdx.x * weight.cols + j,
                              scaled * half_to_float(weight.col_norms[j]));
    }
}

}  // namespace nowag::cuda
