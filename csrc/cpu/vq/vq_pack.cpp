#include "nowag/vq_pack.h"

#include <algorithm>
#include <atomic>

#include "cpu/base/buffer.h"
#include "cpu/base/failure.h"
#include "cpu/base/parallel.h"
#include "cpu/base/simd.h"
#include "cpu/vq/vq_pack_table.h"
#include "nowag/format.h"

namespace nowag::cpu {
namespace {

const VqPackTable* table() {
#ifdef NOWAG_X86
    return simd_pick(&kVqPackScalar, &kVqPackAvx2, &kVqPackAvx512,
                     static_cast<const VqPackTable*>(nullptr));
#else
    return &kVqPackScalar;
#endif
}

// Writes the 32 codes of a tile at one position; false if one does not fit in code_bits.
bool pack_position(const uint16_t* codes, int64_t row_stride, int rows, int code_bits,
                   uint8_t* packed) {
    uint64_t window = 0;
    uint32_t largest = 0;
    int filled = 0;
    for (int r = 0; r < kTileRows; ++r) {
        const uint32_t code = r < rows ? codes[r * row_stride] : 0u;
        largest = code > largest ? code : largest;
        window |= static_cast<uint64_t>(code) << filled;
        for (filled += code_bits; filled >= 8; filled -= 8, window >>= 8) {
            *packed++ = static_cast<uint8_t>(window);
        }
    }
    return (largest >> code_bits) == 0;
}

int tile_height(int64_t rows, int64_t tile) {
    const int64_t left = rows - tile * kTileRows;
    return static_cast<int>(left < kTileRows ? left : kTileRows);
}

// `count` norms as floats, then `padding` zeros.
Buffer<float> float_norms(const uint16_t* norms, int64_t count, int64_t padding) {
    Buffer<float> floats = buffer<float>(count + padding);
    table()->widen(norms, count, floats.get());
    std::fill_n(floats.get() + count, padding, 0.0f);
    return floats;
}

}  // namespace

Status pack_codes(const uint16_t* codes, int64_t rows, int64_t positions, int code_bits,
                  uint8_t* packed, int threads) try {
    if (rows < 1 || positions < 1 || !valid_vq(1, code_bits) || threads < 1) {
        return Status::invalid_argument;
    }
    const int64_t bytes = tile_bytes(code_bits);
    std::atomic<bool> legal{true};
    parallel_for(row_tiles(rows), threads, [&](int64_t tile) {
        const int height = tile_height(rows, tile);
        for (int64_t p = 0; p < positions; ++p) {
            if (!pack_position(codes + tile * kTileRows * positions + p, positions, height,
                               code_bits, packed + (tile * positions + p) * bytes)) {
                legal = false;
            }
        }
    });
    return legal ? Status::ok : Status::invalid_argument;
} catch (...) {
    return failure();
}

Status unpack_codes(const uint8_t* packed, int64_t rows, int64_t positions, int code_bits,
                    uint16_t* codes, int threads) try {
    if (rows < 1 || positions < 1 || !valid_vq(1, code_bits) || threads < 1) {
        return Status::invalid_argument;
    }
    const int64_t bytes = tile_bytes(code_bits);
    parallel_for(row_tiles(rows), threads, [&](int64_t tile) {
        const int height = tile_height(rows, tile);
        for (int64_t p = 0; p < positions; ++p) {
            const uint8_t* stream = packed + (tile * positions + p) * bytes;
            for (int r = 0; r < height; ++r) {
                codes[(tile * kTileRows + r) * positions + p] =
                    static_cast<uint16_t>(read_code(stream, r * code_bits, code_bits));
            }
        }
    });
    return Status::ok;
} catch (...) {
    return failure();
}

Status vq_dequantize(const uint8_t* packed, const uint16_t* codebook, const uint16_t* row_norms,
                     const uint16_t* col_norms, int64_t rows, int64_t cols, int d, int code_bits,
                     int64_t row_begin, int64_t row_end, void* out, DType dtype, int64_t out_stride,
                     int threads) try {
    if (cols < 1 || !valid_vq(d, code_bits) || row_begin < 0 || row_begin % kTileRows != 0 ||
        row_end <= row_begin || row_end > rows || out_stride < cols || threads < 1) {
        return Status::invalid_argument;
    }
    const VqPackTable& kernel = *table();
    const int64_t positions = code_positions(cols, d);
    const int lanes = d <= 4 ? 4 : 8;
    const int64_t entry_count = int64_t{1} << code_bits;
    const Buffer<float> entries = buffer<float>(entry_count * lanes);
    kernel.expand_codebook(codebook, entry_count, d, lanes, entries.get());
    const Buffer<float> columns = float_norms(col_norms, cols, positions * d - cols + 8);
    const Buffer<float> norms = float_norms(row_norms + row_begin, row_end - row_begin, 0);
    const int64_t first_tile = row_begin / kTileRows;
    const uint8_t* codes_end = packed + row_tiles(rows) * positions * tile_bytes(code_bits);
    parallel_for(row_tiles(row_end) - first_tile, threads, [&](int64_t index) {
        const int64_t tile = first_tile + index, first_row = index * kTileRows;
        kernel.dequantize_tile(
            {packed + tile * positions * tile_bytes(code_bits), entries.get(),
             norms.get() + first_row, columns.get(), positions, cols, code_bits, d, lanes,
             tile_height(row_end, tile), codes_end,
             static_cast<char*>(out) + first_row * out_stride * dtype_size(dtype), out_stride,
             dtype});
    });
    return Status::ok;
} catch (...) {
    return failure();
}

}  // namespace nowag::cpu
