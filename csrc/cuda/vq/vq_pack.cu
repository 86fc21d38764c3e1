#include <algorithm>

#include "cuda/base/dispatch.h"
#include "cuda/base/launch.h"
#include "cuda/vq/vq_pack.cuh"
#include "cuda/vq/vq_pack_dequantize.cuh"
#include "nowag/vq_pack.h"

namespace nowag::cuda {

__global__ void pack_code_tiles(const uint16_t* __restrict__ codes, int64_t rows, int64_t positions,
                                int code_bits, uint32_t* __restrict__ packed) {
    uint16_t* staged = reinterpret_cast<uint16_t*>(shared_memory());
    const int64_t tile = blockIdx.y;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kPackPositions;
    const int present = positions_of_block(positions);
    const unsigned mask = (1u << code_bits) - 1u;
    for (int e = threadIdx.x; e < kTileRows * kPackPositions; e += kPackThreads) {
        const int r = e / kPackPositions, p = e % kPackPositions;
        const int64_t i = tile * kTileRows + r;
        staged[r * kPackPitch + p] =
            i < rows && p < present ? static_cast<uint16_t>(codes[i * positions + first + p] & mask)
                                    : static_cast<uint16_t>(0);
    }
    __syncthreads();
    for (int w = threadIdx.x; w < present * code_bits; w += kPackThreads) {
        const int p = w / code_bits, word = w % code_bits;
        uint32_t bits = 0;
        for (int r = 32 * word / code_bits; r < kTileRows && r * code_bits < 32 * word + 32; ++r) {
            const uint32_t code = staged[r * kPackPitch + p];
            const int shift = r * code_bits - 32 * word;
            bits |= shift >= 0 ? code << shift : code >> -shift;
        }
        packed[(tile * positions + first) * code_bits + w] = bits;
    }
}

__global__ void unpack_code_tiles(const uint32_t* __restrict__ packed, int64_t rows,
                                  int64_t positions, int code_bits, uint16_t* __restrict__ codes) {
    uint32_t* words = reinterpret_cast<uint32_t*>(shared_memory());
    const int64_t tile = blockIdx.y;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kPackPositions;
    const int present = positions_of_block(positions);
    load_streams(packed, tile, positions, code_bits, words);
    for (int e = threadIdx.x; e < kTileRows * kPackPositions; e += kPackThreads) {
        const int r = e / kPackPositions, p = e % kPackPositions;
        const int64_t i = tile * kTileRows + r;
        if (i >= rows || p >= present) continue;
        codes[i * positions + first + p] =
            static_cast<uint16_t>(code_at(words + p * code_bits, r, code_bits));
    }
}

namespace {

bool valid_codes(int64_t rows, int64_t positions, int code_bits) {
    return rows >= 1 && positions >= 1 && valid_vq(1, code_bits) && row_tiles(rows) <= kMaxGridY;
}

dim3 tile_grid(int64_t tiles, int64_t positions) {
    return dim3(blocks_for(positions, kPackPositions), static_cast<unsigned>(tiles));
}

// Blocks of vq_dequantize_strips that a multiprocessor has registers for.
constexpr int64_t kDequantizeBlocks = 2;

template <int kD, DType kType>
Status dequantize(const VqWeight& weight, int64_t row_begin, int64_t row_end, void* out,
                  int64_t out_stride, Stream stream) {
    using Shape = DequantizeShape<kD, kType>;
    const DeviceLimits limits = device_limits();
    const auto available = static_cast<size_t>(limits.shared_bytes);
    const size_t needed = Shape::shared_bytes(weight.code_bits);
    const int64_t tiles = row_tiles(row_end - row_begin);
    const bool whole_pieces = weight.cols % Shape::kPiece == 0 && out_stride % Shape::kPiece == 0 &&
                              reinterpret_cast<uintptr_t>(out) % kPieceBytes == 0;
    if (!whole_pieces || needed > available) {
        return launch(vq_dequantize_tiles<kType>, tile_grid(tiles, weight.positions), kPackThreads,
                      kUnpackShared, stream, weight, kD, row_begin, row_end, out, out_stride);
    }
    // As many blocks as run at once, each with its share of the tiles.
    const auto resident = std::min(kDequantizeBlocks, static_cast<int64_t>(available / needed));
    const int64_t strips = ceil_div(weight.cols, Shape::kColumns);
    const int64_t groups = std::max<int64_t>(1, limits.multiprocessors * resident / strips);
    const dim3 grid(static_cast<unsigned>(strips), static_cast<unsigned>(std::min(groups, tiles)));
    return launch(vq_dequantize_strips<kD, kType>, grid, kDequantizeThreads, needed, stream, weight,
                  row_begin, row_end, out, out_stride);
}

}  // namespace

int64_t pack_codes_workspace(const uint16_t*, int64_t, int64_t, int, uint8_t*) { return 0; }

Status pack_codes(const uint16_t* codes, int64_t rows, int64_t positions, int code_bits,
                  uint8_t* packed, void*, Stream stream) {
    if (!valid_codes(rows, positions, code_bits)) return Status::invalid_argument;
    return launch(pack_code_tiles, tile_grid(row_tiles(rows), positions), kPackThreads, kPackShared,
                  stream, codes, rows, positions, code_bits, reinterpret_cast<uint32_t*>(packed));
}

int64_t unpack_codes_workspace(const uint8_t*, int64_t, int64_t, int, uint16_t*) { return 0; }

Status unpack_codes(const uint8_t* packed, int64_t rows, int64_t positions, int code_bits,
                    uint16_t* codes, void*, Stream stream) {
    if (!valid_codes(rows, positions, code_bits)) return Status::invalid_argument;
    return launch(unpack_code_tiles, tile_grid(row_tiles(rows), positions), kPackThreads,
                  kUnpackShared, stream, reinterpret_cast<const uint32_t*>(packed), rows, positions,
                  code_bits, codes);
}

int64_t vq_dequantize_workspace(const uint8_t*, const uint16_t*, const uint16_t*, const uint16_t*,
                                int64_t, int64_t, int, int, int64_t, int64_t, void*, DType,
                                int64_t) {
    return 0;
}

Status vq_dequantize(const uint8_t* packed, const uint16_t* codebook, const uint16_t* row_norms,
                     const uint16_t* col_norms, int64_t rows, int64_t cols, int d, int code_bits,
                     int64_t row_begin, int64_t row_end, void* out, DType dtype, int64_t out_stride,
                     void*, Stream stream) {
    if (!valid_vq(d, code_bits) || rows < 1 || cols < 1 || row_begin < 0 || row_end > rows ||
        row_begin > row_end || row_begin % kTileRows != 0 || out_stride < cols ||
        row_tiles(rows) > kMaxGridY) {
        return Status::invalid_argument;
    }
    if (row_begin == row_end) return Status::ok;
    const int64_t positions = code_positions(cols, d);
    const VqWeight weight{reinterpret_cast<const uint32_t*>(packed),
                          codebook,
                          row_norms,
                          col_norms,
                          rows,
                          cols,
                          positions,
                          code_bits};
    return with_dtype(dtype, [&](auto type) {
        return with_subvector(d, [&](auto subvector) {
            return dequantize<subvector.value, type.value>(weight, row_begin, row_end, out,
                                                           out_stride, stream);
        });
    });
}

int64_t vq_gather_workspace(const uint8_t*, const uint16_t*, const uint16_t*, const uint16_t*,
                            int64_t, int64_t, int, int, const int64_t*, int64_t, void*, DType) {
    return 0;
}

Status vq_gather(const uint8_t* packed, const uint16_t* codebook, const uint16_t* row_norms,
                 const uint16_t* col_norms, int64_t rows, int64_t cols, int d, int code_bits,
                 const int64_t* indices, int64_t count, void* out, DType dtype, void*,
                 Stream stream) {
    if (!valid_vq(d, code_bits) || rows < 1 || cols < 1 || count < 0 || count > INT32_MAX ||
        ceil_div(code_positions(cols, d), kGatherPositions) > kMaxGridY) {
        return Status::invalid_argument;
    }
    if (count == 0) return Status::ok;
    const int64_t positions = code_positions(cols, d);
    const VqWeight weight{reinterpret_cast<const uint32_t*>(packed),
                          codebook,
                          row_norms,
                          col_norms,
                          rows,
                          cols,
                          positions,
                          code_bits};
    const dim3 grid(static_cast<unsigned>(count), blocks_for(positions, kGatherPositions));
    return with_dtype(dtype, [&](auto type) {
        return launch(vq_gather_rows<type.value>, grid, kGatherPositions, 0, stream, weight, d,
                      indices, out);
    });
}

}  // namespace nowag::cuda
