#include <algorithm>

#include "cuda/base/dispatch.h"
#include "cuda/base/launch.h"
#include "cuda/vq/vq_gemv.cuh"
#include "cuda/vq/vq_gemv_batch.cuh"
#include "cuda/vq/vq_gemv_lut.cuh"
#include "cuda/vq/vq_gemv_mma.cuh"
#include "nowag/vq_gemv.h"

namespace nowag::cuda {
namespace {

constexpr int kMaxSets = 4;      // of sums in a thread's registers
constexpr int kMaxSegment = 64;  // positions: sums stay short, as the error bound asks for
// Dynamic shared memory that a block can have from compute capability 8.0 on.
constexpr size_t kSharedEverywhere = 99 << 10;

// Products of d = 4 are not looked up: vq_gemv_mma.cuh takes 44 weights a cycle and multiprocessor
// for 1 token and 37 for 8, without conflicts of banks; gathers from a table of products, 4 bytes a
// code, would take 27 for 1 token: 3.5 cycles for 32 codes, and 1.1 for the codes.
enum class Path { decode, look_up, multiply, batch };

Path choose_path(int64_t tokens, int d, int code_bits) {
    if (!vq_gemv_on_tensor_cores(d, code_bits)) return Path::decode;
    if (tokens > kVqGemvMaxTokens) return Path::batch;
    return d == kLutD && tokens == 1 ? Path::look_up : Path::multiply;
}

// The cuts depend on the shape and the device; the number of tokens must not enter here.

// Of positions: segments and the chunks of rows fill the device once.
Segments cut_for_look_up(int64_t rows, int64_t positions) {
    const int64_t chunks = ceil_div(row_tiles(rows), kMaxSets * kSetTiles);
    const int64_t wanted = std::max<int64_t>(1, device_limits().multiprocessors / chunks);
    const int64_t length = std::min<int64_t>(kMaxSegment, ceil_div(positions, wanted));
    return {static_cast<int>(ceil_div(positions, length)), static_cast<int>(length)};
}

// Of steps: the first block, which has most to do, has as little as can be. The unit is a turn: a
// step of each of its slices, at most max_turns in a segment.
Segments cut_steps(int64_t rows, int64_t positions, int64_t slices, int64_t max_turns,
                   double item_end) {
    const int64_t steps = ceil_div(positions, kStep), blocks = device_limits().multiprocessors;
    const int64_t bands = ceil_div(rows, kBlockRows);
    Segments best{};
    double least = 0.0;
    for (int64_t turns = 1; turns <= max_turns; ++turns) {
        const int64_t length = turns * slices, count = ceil_div(steps, length);
        const int64_t last_turns = ceil_div(steps - (count - 1) * length, slices);
        const int64_t items = ceil_div(bands * count, blocks);
        const int64_t long_items = ceil_div(bands * (count - 1), blocks);
        const double work = static_cast<double>(long_items * turns) +
                            static_cast<double>((items - long_items) * last_turns) +
                            item_end * static_cast<double>(items);
        if (best.count > 0 && work > least) continue;
        least = work;
        best = {static_cast<int>(count), static_cast<int>(length)};
    }
    return best;
}

Segments cut_for_multiply(int64_t rows, int64_t positions, int d) {
    return cut_steps(rows, positions, kSlices, kMaxWarpSteps,
                     d == 4 ? kItemEndTurns<4> : kItemEndTurns<6>);
}

Segments cut_for_batch(int64_t rows, int64_t positions) {
    return cut_steps(rows, positions, kBatchSlices, kBatchWarpSteps, kBatchItemEndTurns);
}

int64_t partial_bytes(int64_t tokens, int64_t rows, Segments segments) {
    return static_cast<int64_t>(sizeof(float)) * segments.count * tokens * row_tiles(rows) *
           kTileRows;
}

// What vq_gemv_prepare writes for vq_gemv_mma, at the start of the scratch memory.
struct Prepared {
    int64_t octets;
    int64_t steps;
    int64_t operands;  // their bytes
    int64_t scales;

    Prepared(int64_t tokens, int64_t positions, int d)
        : octets(ceil_div(tokens, kOctet)),
          steps(ceil_div(positions, kStep)),
          operands(static_cast<int64_t>(sizeof(uint4)) * octets * steps * (d / 2) * kWarpSize),
          scales(static_cast<int64_t>(sizeof(float)) * octets * steps * kOctet) {}
};

// What vq_gemv_prepare_batch writes for vq_gemv_batch, likewise.
struct PreparedBatch {
    int64_t tiles;
    int64_t steps;
    int64_t operands;  // their bytes
    int64_t scales;

    PreparedBatch(int64_t tokens, int64_t positions, int d)
        : tiles(std::max<int64_t>(2, ceil_div(tokens, kTokenTile))),
          steps(ceil_div(positions, kStep)),
          operands(static_cast<int64_t>(sizeof(uint4)) * tiles * steps * (d / 2) * kWarpSize),
          scales(static_cast<int64_t>(sizeof(float)) * tiles * kTokenTile) {}
};

template <DType kType, int kResidues>
Status finish(const VqWeight& weight, const VqActivations& io, Segments segments,
              const float* partial, Stream stream) {
    const int64_t tiles = row_tiles(weight.rows);
    const dim3 grid(blocks_for(tiles, kFinishWarps / kResidues), static_cast<unsigned>(io.tokens));
    return launch_after(vq_gemv_finish<kType, kResidues>, grid, kFinishThreads,
                        sizeof(float) * kFinishThreads, stream, weight, io, segments.count,
                        tiles * kTileRows, partial);
}

template <int kD, DType kType>
Status decode(const VqWeight& weight, const VqActivations& io, Stream stream) {
    const auto kernel = io.tokens == 1   ? vq_gemv_decode<kD, 1, kType>
                        : io.tokens <= 4 ? vq_gemv_decode<kD, 4, kType>
                                         : vq_gemv_decode<kD, 16, kType>;
    return launch(kernel, static_cast<unsigned>(row_tiles(weight.rows)), kDecodeThreads,
                  sizeof(float) * kDecodeThreads, stream, weight, io);
}

template <DType kType, int kSets, int kStages>
Status look_up(const VqWeight& weight, const VqActivations& io, float* partial, Stream stream) {
    using Memory = LutMemory<kSets, kStages>;
    const Segments segments = cut_for_look_up(weight.rows, weight.positions);
    const int64_t tiles = row_tiles(weight.rows);
    const dim3 grid(static_cast<unsigned>(segments.count), blocks_for(tiles, kSets * kSetTiles));
    return in_order(
        [&] {
            return launch(vq_gemv_lut<kType, kSets, kStages>, grid, kLutThreads,
                          Memory::bytes(segments.length), stream, weight, io, segments,
                          tiles * kTileRows, partial);
        },
        [&] { return finish<kType, kLutResidues>(weight, io, segments, partial, stream); });
}

template <DType kType, int kSets>
Status look_up(const VqWeight& weight, const VqActivations& io, float* partial, Stream stream) {
    static_assert(LutMemory<kSets, 2>::bytes(kMaxSegment) <= kSharedEverywhere, "runs anywhere");
    constexpr size_t kDeep = LutMemory<kSets, kDeepStages>::bytes(kMaxSegment);
    return static_cast<size_t>(device_limits().shared_bytes) < kDeep
               ? look_up<kType, kSets, 2>(weight, io, partial, stream)
               : look_up<kType, kSets, kDeepStages>(weight, io, partial, stream);
}

template <DType kType>
Status look_up(const VqWeight& weight, const VqActivations& io, float* partial, Stream stream) {
    if (row_tiles(weight.rows) <= kSetTiles) return look_up<kType, 1>(weight, io, partial, stream);
    return look_up<kType, kMaxSets>(weight, io, partial, stream);
}

template <int kD, int kBits, DType kType>
Status multiply(const VqWeight& weight, const VqActivations& io, unsigned char* scratch,
                Stream stream) {
    const Prepared prepared(io.tokens, weight.positions, kD);
    const Segments segments = cut_for_multiply(weight.rows, weight.positions, kD);
    const MmaInputs inputs{reinterpret_cast<uint4*>(scratch),
                           reinterpret_cast<float*>(scratch + prepared.operands),
                           static_cast<int>(prepared.steps)};
    float* partial = reinterpret_cast<float*>(scratch + prepared.operands + prepared.scales);
    const int64_t items = ceil_div(weight.rows, kBlockRows) * segments.count;
    const auto blocks = std::min<int64_t>(items, device_limits().multiprocessors);
    auto kernel = vq_gemv_mma<kD, kBits, 1>;
    if constexpr (kMmaOctets<kD, kBits> == 2) {
        if (prepared.octets == 2) kernel = vq_gemv_mma<kD, kBits, 2>;
    }
    return in_order(
        [&] {
            const dim3 grid(blocks_for(prepared.steps, kPrepareWarps),
                            static_cast<unsigned>(prepared.octets));
            return launch(vq_gemv_prepare<kD, kType>, grid, kPrepareThreads, 0, stream, weight, io,
                          inputs);
        },
        [&] {
            return launch_after(kernel, static_cast<unsigned>(blocks), kMmaThreads,
                                kMmaShared<kD, kBits>, stream, weight, io.tokens, inputs, segments,
                                row_tiles(weight.rows) * kTileRows, partial);
        },
        [&] { return finish<kType, kMmaResidues>(weight, io, segments, partial, stream); });
}

// Tokens [begin, end) of some.
template <DType kType>
VqActivations tokens_of(const VqActivations& io, const VqWeight& weight, int begin, int end) {
    using Stored = typename Element<kType>::Stored;
    return {static_cast<const Stored*>(io.x) + begin * weight.cols, io.bias,
            static_cast<Stored*>(io.y) + begin * weight.rows, end - begin};
}

template <int kD, int kBits, DType kType, int kTiles>
Status batch(const VqWeight& weight, const VqActivations& io, const PreparedBatch& prepared,
             unsigned char* scratch, Stream stream) {
    static_assert(kBatchShared<kD, kBits, kTiles> <= kSharedEverywhere, "runs on any device");
    const Segments segments = cut_for_batch(weight.rows, weight.positions);
    const MmaInputs inputs{reinterpret_cast<uint4*>(scratch),
                           reinterpret_cast<float*>(scratch + prepared.operands),
                           static_cast<int>(prepared.steps)};
    float* partial = reinterpret_cast<float*>(scratch + prepared.operands + prepared.scales);
    const int64_t padded_rows = row_tiles(weight.rows) * kTileRows;
    const int64_t items = ceil_div(weight.rows, kBlockRows) * segments.count;
    const auto blocks = std::min<int64_t>(items, device_limits().multiprocessors);
    return in_order(
        [&] {
            return launch(vq_gemv_prepare_batch<kD, kType>, kTiles * kTokenTile,
                          kPrepareBatchThreads, sizeof(float) * kPrepareBatchThreads / kWarpSize,
                          stream, weight, io, kTiles, inputs);
        },
        [&] {
            return launch_after(vq_gemv_batch<kD, kBits, kTiles>, static_cast<unsigned>(blocks),
                                kBatchThreads, kBatchShared<kD, kBits, kTiles>, stream, weight,
                                io.tokens, inputs, segments, padded_rows, partial);
        },
        [&] {
            const dim3 grid(blocks_for(weight.rows, kAddThreads * kAddRows),
                            static_cast<unsigned>(io.tokens));
            return launch_after(vq_gemv_add<kType>, grid, kAddThreads, 0, stream, weight, io,
                                segments.count, padded_rows, inputs.scales, partial);
        });
}

// By tensor cores, however many tokens.
template <int kD, int kBits, DType kType>
Status on_tensor_cores(const VqWeight& weight, const VqActivations& io, unsigned char* scratch,
                       Stream stream) {
    constexpr int kAtOnce = kMmaOctets<kD, kBits> * kOctet;
    if (io.tokens <= kAtOnce) return multiply<kD, kBits, kType>(weight, io, scratch, stream);
    if (io.tokens <= kVqGemvMaxTokens) {
        const auto part = [&](int begin, int end) {
            return multiply<kD, kBits, kType>(weight, tokens_of<kType>(io, weight, begin, end),
                                              scratch, stream);
        };
        return in_order([&] { return part(0, kAtOnce); }, [&] { return part(kAtOnce, io.tokens); });
    }
    if constexpr (kType == DType::float32) {
        return Status::invalid_argument;
    } else {
        const PreparedBatch prepared(io.tokens, weight.positions, kD);
        switch (prepared.tiles) {
            case 2:
                return batch<kD, kBits, kType, 2>(weight, io, prepared, scratch, stream);
            case 3:
                return batch<kD, kBits, kType, 3>(weight, io, prepared, scratch, stream);
            default:
                return batch<kD, kBits, kType, kBatchTiles>(weight, io, prepared, scratch, stream);
        }
    }
}

}  // namespace

int64_t vq_gemv_workspace(const void*, DType, int64_t tokens, const uint8_t*, const uint16_t*,
                          const uint16_t*, const uint16_t*, const void*, int64_t rows, int64_t cols,
                          int d, int code_bits, void*) {
    const int64_t positions = code_positions(cols, d);
    switch (choose_path(tokens, d, code_bits)) {
        case Path::look_up:
            return partial_bytes(tokens, rows, cut_for_look_up(rows, positions));
        case Path::multiply: {
            const Prepared prepared(tokens, positions, d);
            return prepared.operands + prepared.scales +
                   partial_bytes(tokens, rows, cut_for_multiply(rows, positions, d));
        }
        case Path::batch: {
            const PreparedBatch prepared(tokens, positions, d);
            return prepared.operands + prepared.scales +
                   partial_bytes(tokens, rows, cut_for_batch(rows, positions));
        }
        default:
            return 0;
    }
}

Status vq_gemv(const void* x, DType dtype, int64_t tokens, const uint8_t* packed,
               const uint16_t* codebook, const uint16_t* row_norms, const uint16_t* col_norms,
               const void* bias, int64_t rows, int64_t cols, int d, int code_bits, void* y,
               void* workspace, Stream stream) {
    if (!valid_vq(d, code_bits) || rows < 1 || cols < 1 || tokens < 1 ||
        tokens > vq_gemv_device_tokens(dtype, d, code_bits)) {
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
    return with_dtype(dtype, [&](auto type) {
        switch (choose_path(tokens, d, code_bits)) {
            case Path::look_up:
                return look_up<type.value>(weight, io, static_cast<float*>(workspace), stream);
            case Path::multiply:
            case Path::batch: {
                auto* scratch = static_cast<unsigned char*>(workspace);
                if (d == 6) return on_tensor_cores<6, 12, type.value>(weight, io, scratch, stream);
                if (code_bits == 8)
                    return on_tensor_cores<4, 8, type.value>(weight, io, scratch, stream);
                return on_tensor_cores<4, 12, type.value>(weight, io, scratch, stream);
            }
            default:
                return with_subvector(d, [&](auto subvector) {
                    return decode<subvector.value, type.value>(weight, io, stream);
                });
        }
    });
}

}  // namespace nowag::cuda
