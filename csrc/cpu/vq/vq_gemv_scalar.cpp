#include "cpu/vq/vq_expand_scalar.h"
#include "cpu/vq/vq_gemv_table.h"
#include "nowag/format.h"

namespace nowag::cpu {
namespace {

void arrange_codebook(const uint16_t* codebook, int64_t entries, int d, int lanes, void* out) {
    expand_codebook(codebook, entries, d, lanes, static_cast<float*>(out));
}

void scale_inputs(const void* x, DType dtype, const uint16_t* col_norms, int64_t cols, float* out) {
    for (int64_t j = 0; j < cols; ++j) {
        out[j] = load_float(x, j, dtype) * float16_to_float(col_norms[j]);
    }
}

void multiply_tile(const VqDecodeTile& tile) {
    for (int t = 0; t < tile.tokens; ++t) {
        for (int r = 0; r < kTileRows; ++r) {
            float sums[8] = {};
            for (int64_t p = 0; p < tile.positions; ++p) {
                const uint32_t code = read_code(tile.codes + p * tile_bytes(tile.code_bits),
                                                r * tile.code_bits, tile.code_bits);
                const float* entry = static_cast<const float*>(tile.entries) +
                                     static_cast<int64_t>(code) * tile.lanes;
                const float* input = tile.inputs + (p * tile.token_stride + t) * tile.lanes;
                for (int j = 0; j < tile.lanes; ++j) sums[j] += entry[j] * input[j];
            }
            for (int j = 1; j < tile.lanes; ++j) sums[0] += sums[j];
            tile.sums[t * kTileRows + r] = sums[0];
        }
    }
}

void finish(const float* sums, const uint16_t* row_norms, const void* bias, DType dtype,
            int64_t rows, void* y) {
    for (int64_t i = 0; i < rows; ++i) {
        float value = sums[i] * float16_to_float(row_norms[i]);
        if (bias != nullptr) value += load_float(bias, i, dtype);
        store_float(y, i, dtype, value);
    }
}

}  // namespace

const VqDecodeTable kVqDecodeScalar = {scale_inputs, arrange_codebook, multiply_tile, finish,
                                       nullptr};

}  // namespace nowag::cpu
