// The loops of sparse_gemv that every vector instruction set shares, over one that it provides:
//
//   template <class Expand, int Rows, int Tokens>
//   void dot_tile(const Tile<Rows, Tokens>&, float (&sums)[Rows][Tokens])
//
// Rows are taken a few at a time so that their chains of additions overlap, tokens a few at a time
// so that a row is expanded once for all of them. Which tile a token falls into does not change the
// order of its sums. `static`: each instruction set compiles its own copy.
#pragma once

#include <cstdint>

#include "cpu/sparse/sparse_gemv_table.h"

namespace nowag::cpu {

template <int Rows, int Tokens>
struct Tile {
    const float* x[Tokens];
    const uint8_t* bits[Rows];
    const void* values[Rows];
    int64_t cols;  // a multiple of 64
};

// Rows and tokens past the last repeat it: a tile is always whole, and what is not wanted dropped.
template <int Rows, int Tokens, class DotTile>
static void dot_tokens(const SparseGemvBlock& block, int64_t first_token, float* sums,
                       DotTile dot_tile) {
    Tile<Rows, Tokens> tile;
    tile.cols = block.x_stride;
    for (int t = 0; t < Tokens; ++t) {
        const int64_t token = first_token + t < block.tokens ? first_token + t : block.tokens - 1;
        tile.x[t] = block.x + token * block.x_stride;
    }
    for (int64_t first = 0; first < block.rows; first += Rows) {
        for (int r = 0; r < Rows; ++r) {
            const int64_t row = first + r < block.rows ? first + r : block.rows - 1;
            tile.bits[r] = block.bitmap + row * block.row_bytes;
            tile.values[r] = block.values[row];
        }
        float tile_sums[Rows][Tokens];
        dot_tile(tile, tile_sums);
        for (int t = 0; t < Tokens && first_token + t < block.tokens; ++t) {
            for (int r = 0; r < Rows && first + r < block.rows; ++r) {
                sums[(first_token + t) * block.rows + first + r] = tile_sums[r][t];
            }
        }
    }
}

}  // namespace nowag::cpu
