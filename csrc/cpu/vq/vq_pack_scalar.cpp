#include "cpu/vq/vq_expand_scalar.h"
#include "cpu/vq/vq_pack_table.h"
#include "nowag/format.h"

namespace nowag::cpu {
namespace {

void dequantize_tile(const VqDenseTile& tile) {
    for (int r = 0; r < tile.height; ++r) {
        for (int64_t p = 0; p < tile.positions; ++p) {
            const uint32_t code = read_code(tile.codes + p * tile_bytes(tile.code_bits),
                                            r * tile.code_bits, tile.code_bits);
            const float* entry = tile.entries + static_cast<int64_t>(code) * tile.lanes;
            for (int j = 0; j < tile.d && p * tile.d + j < tile.cols; ++j) {
                const int64_t column = p * tile.d + j;
                store_float(tile.out, r * tile.out_stride + column, tile.dtype,
                            (tile.row_norms[r] * entry[j]) * tile.col_norms[column]);
            }
        }
    }
}

}  // namespace

const VqPackTable kVqPackScalar = {widen, expand_codebook, dequantize_tile};

}  // namespace nowag::cpu
