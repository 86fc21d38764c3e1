#include "nowag/vq_pack.h"

#include <algorithm>
#include <atomic>

#include "cpu/base/buffer.h"
#include "cpu/base/convert_row.h"
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

// Rows are gathered in chunks of at most so many values, which lie on the stack between steps, and
// so many chunks at a time: fewer are not worth waking a thread for.
constexpr int kGatherValues = 1024;
constexpr int64_t kGatherChunks = 16;

// The code of row `r` of a tile from its position's stream, of which 4 bytes that hold it are read.
uint32_t code_at(const uint8_t* stream, int r, int code_bits) {
    const int bit = r * code_bits;
    const int byte = std::min(bit / 8, 4 * code_bits - 4);
    const uint32_t window = stream[byte] | static_cast<uint32_t>(stream[byte + 1]) << 8 |
                            static_cast<uint32_t>(stream[byte + 2]) << 16 |
                            static_cast<uint32_t>(stream[byte + 3]) << 24;
    return window >> (bit - 8 * byte) & ((1u << code_bits) - 1u);
}

struct VqRow {
    const uint8_t* codes;  // of the row's tile: [positions, 4 * code_bits]
    const uint16_t* codebook;
    float norm;
    const uint16_t* col_norms;
    int row;  // in the tile
    int d;
    int code_bits;
};

// Values [begin, end) of a row, begin a multiple of d, to the same places of `out`.
void gather_values(const VqRow& row, int64_t begin, int64_t end, void* out, DType dtype) {
    uint16_t entries[kGatherValues];
    float values[kGatherValues], columns[kGatherValues];
    const int count = static_cast<int>(end - begin);
    const uint8_t* stream = row.codes + begin / row.d * tile_bytes(row.code_bits);
    for (int v = 0; v < count; v += row.d, stream += tile_bytes(row.code_bits)) {
        const uint16_t* entry =
            row.codebook + int64_t{row.d} * code_at(stream, row.row, row.code_bits);
        for (int j = 0; j < row.d && v + j < count; ++j) entries[v + j] = entry[j];
    }
    table()->widen(entries, count, values);
    table()->widen(row.col_norms + begin, count, columns);
    for (int v = 0; v < count; ++v) values[v] = (row.norm * values[v]) * columns[v];
    convert_row(values, DType::float32, count, static_cast<char*>(out) + begin * dtype_size(dtype),
                dtype);
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

Status vq_gather(const uint8_t* packed, const uint16_t* codebook, const uint16_t* row_norms,
                 const uint16_t* col_norms, int64_t rows, int64_t cols, int d, int code_bits,
                 const int64_t* indices, int64_t count, void* out, DType dtype, int threads) try {
    if (rows < 1 || cols < 1 || !valid_vq(d, code_bits) || count < 0 || threads < 1 ||
        !std::all_of(indices, indices + count, [&](int64_t i) { return 0 <= i && i < rows; })) {
        return Status::invalid_argument;
    }
    const int64_t width = kGatherValues / d * d, chunks = ceil_div(cols, width);
    const int64_t tile_size = code_positions(cols, d) * tile_bytes(code_bits);
    parallel_for(ceil_div(count * chunks, kGatherChunks), threads, [&](int64_t item) {
        const int64_t first = item * kGatherChunks;
        const int64_t last = std::min(first + kGatherChunks, count * chunks);
        for (int64_t chunk = first; chunk < last; ++chunk) {
            const int64_t n = chunk / chunks, i = indices[n], begin = chunk % chunks * width;
            gather_values(
                {packed + i / kTileRows * tile_size, codebook, float16_to_float(row_norms[i]),
                 col_norms, static_cast<int>(i % kTileRows), d, code_bits},
                begin, std::min(begin + width, cols),
                static_cast<char*>(out) + n * cols * dtype_size(dtype), dtype);
        }
    });
    return Status::ok;
} catch (...) {
    return failure();
}

}  // namespace nowag::cpu
