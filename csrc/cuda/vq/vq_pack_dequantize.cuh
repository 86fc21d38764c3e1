// vq_dequantize of vq_pack.h on a GPU: dense rows, as fast as memory takes them.
//
//   one tile (32 rows)                A block: kWide warps side by side, kParts of them below each
//   +----------+----------+---        other, on one strip of columns; it takes every gridDim.y-th
//   | warp 0   | warp 1   |           tile, whose codes are on their way while those of the tile
//   | rows 0-7 |          |           before are expanded. The codebook stays in shared memory.
//   +----------+----------+---        A lane: one piece of 16 bytes of each of its rows, written at
//   | warp 4   |          |           once: whole lines go out. Its columns, so their norms and the
//   | rows 8-15|          |           coordinates of its entries, never change.
//
// A piece begins anywhere in a position and takes part of kCodes of them. Entries are read in units
// of kUnit coordinates, which never straddle two positions; whether a unit is of the position where
// it would be if the piece began with one, or of the next, depends on the lane alone.
//
// Predicted for an H100, 11008 x 4096, d = 6, to bfloat16 (125 us before, by one thread a value):
// 38 us. The bytes take 33, of which 30 are writes; a start 3. Beside them a warp's row of pieces,
// 256 weights, takes the L1 22 cycles (14 gathers at random, 4 of codes, 4 of stores): 17 us in
// all; and 55 instructions, 7 a weight of a lane: 11 us.
#pragma once

#include <numeric>

#include "cuda/vq/vq_pack.cuh"

namespace nowag::cuda {

constexpr int kDequantizeThreads = 512;
constexpr int kDequantizeWarps = kDequantizeThreads / kWarpSize;
constexpr int kPieceBytes = 16;

// How a block of vq_dequantize_strips is cut for one d and type.
template <int kD, DType kType>
struct DequantizeShape {
    static constexpr int kPiece = kPieceBytes / sizeof(typename Element<kType>::Stored);  // columns
    static constexpr int kUnit = std::gcd(kPiece, kD);
    static constexpr int kUnits = kPiece / kUnit;
    // Positions that a piece touches, when it begins as late in one as it may.
    static constexpr int kCodes = (kD - kUnit + kPiece - 1) / kD + 1;
    // Few coordinates a position: fewer columns, so that their codes are not too many.
    static constexpr int kWide = kD >= 4 ? 4 : kD >= 2 ? 2 : 1;  // warps side by side
    static constexpr int kColumns = kWide * kWarpSize * kPiece;
    static constexpr int kParts = kDequantizeWarps / kWide;
    static constexpr int kRows = kTileRows / kParts;  // of a lane in a tile
    // A strip may begin within a position and end within one.
    static constexpr int kPositions = (kColumns - 1) / kD + 2;
    static_assert(kRows % 2 == 0, "codes are read two rows at a time");

    // Words from one position's codes to the next's: odd, so that lanes do not meet in banks, and
    // there is a word to read past a position's last.
    static __host__ __device__ constexpr int pitch(int code_bits) { return code_bits | 1; }
    static __host__ __device__ constexpr int stage_words(int code_bits) {
        return kPositions * pitch(code_bits) + 1;
    }
    // The codebook, then two stages of codes.
    static constexpr size_t shared_bytes(int code_bits) {
        return (sizeof(uint16_t) * kD << code_bits) +
               2 * sizeof(uint32_t) * static_cast<size_t>(stage_words(code_bits));
    }
};

// kUnit coordinates of an entry, by one load.
template <int kUnit>
__device__ __forceinline__ void load_unit(const unsigned char* entry, float* values) {
    if constexpr (kUnit == 1) {
        values[0] = half_to_float(*reinterpret_cast<const uint16_t*>(entry));
    } else {
        uint32_t words[kUnit / 2];
        if constexpr (kUnit == 2) {
            words[0] = *reinterpret_cast<const uint32_t*>(entry);
        } else if constexpr (kUnit == 4) {
            const uint2 two = *reinterpret_cast<const uint2*>(entry);
            words[0] = two.x, words[1] = two.y;
        } else {
            const uint4 four = *reinterpret_cast<const uint4*>(entry);
            words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
        }
#pragma unroll
        for (int w = 0; w < kUnit / 2; ++w) {
            values[2 * w] = half_to_float(static_cast<uint16_t>(words[w]));
            values[2 * w + 1] = half_to_float(static_cast<uint16_t>(words[w] >> 16));
        }
    }
}

template <DType kType, int kPiece>
__device__ __forceinline__ void store_piece(uint4* to, const float (&values)[kPiece]) {
    if constexpr (kPiece == 4) {
        *to = make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]),
                         __float_as_uint(values[2]), __float_as_uint(values[3]));
    } else {
        *to = make_uint4(
            Element<kType>::pair(values[0], values[1]), Element<kType>::pair(values[2], values[3]),
            Element<kType>::pair(values[4], values[5]), Element<kType>::pair(values[6], values[7]));
    }
}

// Rows [row_begin, row_end) as dense values; row_begin is a tile's first.
//   kD     d
//   kType  of out
//   out    [row_end - row_begin, cols], rows out_stride elements apart; whole pieces: it, cols and
//          out_stride are multiples of kPieceBytes
// Block (x, y): strip x of DequantizeShape::kColumns columns; tiles y, y + gridDim.y, ...
template <int kD, DType kType>
__global__ void __launch_bounds__(kDequantizeThreads, 2)
    vq_dequantize_strips(VqWeight weight, int64_t row_begin, int64_t row_end, void* out,
                         int64_t out_stride) {
    using Shape = DequantizeShape<kD, kType>;
    constexpr int kPiece = Shape::kPiece, kUnit = Shape::kUnit, kRows = Shape::kRows;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int bits = weight.code_bits, pitch = Shape::pitch(bits);
    const unsigned mask = (1u << bits) - 1u;

    unsigned char* table = shared_memory();
    uint32_t* stage = reinterpret_cast<uint32_t*>(table + (sizeof(uint16_t) * kD << bits));
    uint32_t* other_stage = stage + Shape::stage_words(bits);

    const int64_t first_column = static_cast<int64_t>(blockIdx.x) * Shape::kColumns;
    const int64_t first_position = first_column / kD;
    const int64_t end_column = min(first_column + Shape::kColumns, weight.cols);
    const int positions = static_cast<int>((end_column - 1) / kD + 1 - first_position);

    // The strip's codes of one tile are consecutive words; a thread's first, and how far to its
    // next, as positions and words of them.
    const int first = static_cast<int>(threadIdx.x) / bits;
    const int first_word = static_cast<int>(threadIdx.x) % bits;
    const int step = kDequantizeThreads / bits, step_words = kDequantizeThreads % bits;
    const auto start_copying = [&](int64_t tile, uint32_t* to) {
        const uint32_t* source =
            weight.packed + (tile * weight.positions + first_position) * bits + threadIdx.x;
        for (int p = first, w = first_word; p < positions; source += kDequantizeThreads) {
            start_copy<sizeof(uint32_t)>(to + p * pitch + w, source);
            p += step;
            w += step_words;
            if (w >= bits) w -= bits, ++p;
        }
        commit_copies();
    };
    const int64_t tiles = (row_end + kTileRows - 1) / kTileRows;
    int64_t tile = row_begin / kTileRows + blockIdx.y;
    start_copying(tile, stage);

    const uint32_t* pairs = reinterpret_cast<const uint32_t*>(weight.codebook);
    for (int i = threadIdx.x; i < kD << bits >> 1; i += kDequantizeThreads) {
        reinterpret_cast<uint32_t*>(table)[i] = pairs[i];
    }

    // The lane's columns; of its units, where they begin in their entries, in bytes, and whether
    // that is a position later than where they would be if the piece began with a position.
    const int64_t column = first_column + (warp % Shape::kWide * kWarpSize + lane) * kPiece;
    const bool present = column < weight.cols;
    const int last = positions - 1;
    const int position = min(static_cast<int>(column / kD - first_position), last);
    float col_norms[kPiece];
#pragma unroll
    for (int k = 0; k < kPiece; ++k) {
        col_norms[k] = present ? half_to_float(weight.col_norms[column + k]) : 0.0f;
    }
    int begins[Shape::kUnits];
    bool later[Shape::kUnits];
#pragma unroll
    for (int u = 0; u < Shape::kUnits; ++u) {
        const int coordinate = static_cast<int>(column % kD) + u * kUnit % kD;
        later[u] = coordinate >= kD;
        begins[u] = static_cast<int>(sizeof(uint16_t)) * (later[u] ? coordinate - kD : coordinate);
    }
    const int part = warp / Shape::kWide * kRows;  // the first of the lane's rows
    // A pointer to pieces: the compiler splits stores whose alignment it does not see by the type.
    uint4* const pieces = static_cast<uint4*>(out) + column / kPiece;
    const int64_t row_pieces = out_stride / kPiece;

    for (; tile < tiles; tile += gridDim.y) {
        const int64_t row = tile * kTileRows + part;
        const int rows = present ? static_cast<int>(min(row_end - row, int64_t{kRows})) : 0;
        float norm = 0.0f;  // lane r: of the warp's row r
        if (lane < kRows && row + lane < row_end)
            norm = half_to_float(weight.row_norms[row + lane]);
        wait_for_copies<0>();
        __syncthreads();  // the codes have come, and nobody reads the other stage any more
        if (tile + gridDim.y < tiles) start_copying(tile + gridDim.y, other_stage);
        uint4* to = pieces + (row - row_begin) * row_pieces;
#pragma unroll
        for (int r = 0; r < kRows; r += 2) {
            // Two rows' codes of each position: at most 32 bits, in two words.
            const int bit = (part + r) * bits;
            unsigned two[Shape::kCodes];
#pragma unroll
            for (int c = 0; c < Shape::kCodes; ++c) {
                const uint32_t* words = stage + min(position + c, last) * pitch + bit / 32;
                two[c] = __funnelshift_r(words[0], words[1], bit % 32);
            }
#pragma unroll
            for (int h = 0; h < 2; ++h, to += row_pieces) {
                const float row_norm = __shfl_sync(kFullWarp, norm, r + h);
                float values[kPiece];
#pragma unroll
                for (int u = 0; u < Shape::kUnits; ++u) {
                    const int c = u * kUnit / kD, next = min(c + 1, Shape::kCodes - 1);
                    const unsigned codes = later[u] ? two[next] : two[c];
                    const unsigned code = (h == 0 ? codes : codes >> bits) & mask;
                    load_unit<kUnit>(table + code * (2 * kD) + begins[u], values + u * kUnit);
                }
#pragma unroll
                for (int k = 0; k < kPiece; ++k) values[k] = row_norm * values[k] * col_norms[k];
                if (r + h < rows) store_piece<kType, kPiece>(to, values);
            }
        }
        uint32_t* const read = stage;
        stage = other_stage;
        other_stage = read;
    }
}

}  // namespace nowag::cuda
