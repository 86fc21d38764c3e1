#include <algorithm>

#include "dispatch.h"
#include "launch.h"
#include "launchers.h"
#include "vq_gemv.cuh"
#include "vq_gemv_gather.cuh"
#include "vq_gemv_lut.cuh"

namespace nowag::cuda {
namespace {

constexpr int kMaxSets = 4;      // of sums in a thread's registers, for one token
constexpr int kLutTokens = 2;    // more tokens: gather
constexpr int kMaxSegment = 64;  // positions: sums stay short, as the error bound asks for

bool is_fast(int d, int code_bits) {
    return (d == 6 && code_bits == 12) || (d == 4 && code_bits == 8);
}

// Segments so that they and the chunks of rows fill the device once. The number of tokens must not
// enter here.
Segments cut_segments(int64_t rows, int64_t positions) {
    const int64_t chunks = ceil_div(row_tiles(rows), kMaxSets * kSetTiles);
    const int64_t wanted = std::max<int64_t>(1, device_limits().multiprocessors / chunks);
    const int64_t length = std::min<int64_t>(kMaxSegment, ceil_div(positions, wanted));
    return {static_cast<int>(ceil_div(positions, length)), static_cast<int>(length)};
}

template <int kD, DType kType>
Status decode(const VqWeight& weight, const VqActivations& io, Stream stream) {
    const auto kernel = io.tokens == 1   ? vq_gemv_decode<kD, 1, kType>
                        : io.tokens <= 4 ? vq_gemv_decode<kD, 4, kType>
                                         : vq_gemv_decode<kD, 16, kType>;
    return launch(kernel, static_cast<unsigned>(row_tiles(weight.rows)), kDecodeThreads,
                  sizeof(float) * kDecodeThreads, stream, weight, io);
}

template <int kD, int kBits, DType kType, int kTokens, int kSets>
Status look_up(const VqWeight& weight, const VqActivations& io, float* partial, Stream stream) {
    const Segments segments = cut_segments(weight.rows, weight.positions);
    const int64_t tiles = row_tiles(weight.rows), padded_rows = tiles * kTileRows;
    const dim3 grid(static_cast<unsigned>(segments.count), blocks_for(tiles, kSets * kSetTiles));
    return in_order(
        [&] {
            return launch(vq_gemv_lut<kD, kBits, kType, kTokens, kSets>, grid, kLutThreads,
                          lut_shared<kD, kTokens>(segments.length), stream, weight, io, segments,
                          padded_rows, partial);
        },
        [&] {
            return launch(vq_gemv_finish<kType>, dim3(static_cast<unsigned>(tiles), kTokens),
                          kResidues * kWarpSize, sizeof(float) * kResidues * kWarpSize, stream,
                          weight, io, segments.count, padded_rows, partial);
        });
}

template <int kD, int kBits, DType kType, int kTokens, int kTiles>
Status gather(const VqWeight& weight, const VqActivations& io, Stream stream) {
    const Segments segments = cut_segments(weight.rows, weight.positions);
    Status status = Status::ok;
    for (int first = 0; first < io.tokens && status == Status::ok; first += kTokens) {
        status = launch(vq_gemv_gather<kD, kBits, kType, kTokens, kTiles>,
                        blocks_for(row_tiles(weight.rows), kTiles), kGatherThreads,
                        kGatherShared<kD, kBits, kTokens>, stream, weight, io, segments, first);
    }
    return status;
}

template <int kD, int kBits, DType kType>
Status fast(const VqWeight& weight, const VqActivations& io, float* partial, Stream stream) {
    const int64_t tiles = row_tiles(weight.rows);
    if (io.tokens == 2) return look_up<kD, kBits, kType, 2, 1>(weight, io, partial, stream);
    if (io.tokens == 1) {
        if (tiles <= kSetTiles) return look_up<kD, kBits, kType, 1, 1>(weight, io, partial, stream);
        return look_up<kD, kBits, kType, 1, kMaxSets>(weight, io, partial, stream);
    }
    const bool wide = tiles >= 2 * device_limits().multiprocessors;
    if (io.tokens <= 4) return gather<kD, kBits, kType, 4, 1>(weight, io, stream);
    if (wide) return gather<kD, kBits, kType, 8, 2>(weight, io, stream);
    return gather<kD, kBits, kType, 8, 1>(weight, io, stream);
}

}  // namespace

int64_t vq_gemv_workspace(const void*, DType, int64_t tokens, const uint8_t*, const uint16_t*,
                          const uint16_t*, const uint16_t*, const void*, int64_t rows, int64_t cols,
                          int d, int code_bits, void*) {
    if (!is_fast(d, code_bits) || tokens > kLutTokens) return 0;
    return static_cast<int64_t>(sizeof(float)) * tokens * row_tiles(rows) * kTileRows *
           cut_segments(rows, code_positions(cols, d)).count;
}

Status vq_gemv(const void* x, DType dtype, int64_t tokens, const uint8_t* packed,
               const uint16_t* codebook, const uint16_t* row_norms, const uint16_t* col_norms,
               const void* bias, int64_t rows, int64_t cols, int d, int code_bits, void* y,
               void* workspace, Stream stream) {
    if (!valid_vq(d, code_bits) || rows < 1 || cols < 1 || tokens < 1 ||
        tokens > kVqGemvMaxTokens) {
        return Status::invalid_argument;
    }
    const VqWeight weight{reinterpret_cast<const uint32_t*>(packed),
                          codebook,
                          row_norms,
                          col_norms,
                          rows,
                          cols,
                          code_positions(cols, d),
                          code_bits};
    const VqActivations io{x, bias, y, static_cast<int>(tokens)};
    float* partial = static_cast<float*>(workspace);
    return with_dtype(dtype, [&](auto type) {
        if (is_fast(d, code_bits)) {
            return d == 6 ? fast<6, 12, type.value>(weight, io, partial, stream)
                          : fast<4, 8, type.value>(weight, io, partial, stream);
        }
        return with_subvector(d, [&](auto subvector) {
            return decode<subvector.value, type.value>(weight, io, stream);
        });
    });
}

}  // namespace nowag::cuda
