#include <algorithm>

#include "cuda/base/dispatch.h"
#include "cuda/base/launch.h"
#include "cuda/vq/vq_gemv.cuh"
#include "cuda/vq/vq_gemv_batch.cuh"
#include "cuda/vq/vq_gemv_cluster.cuh"
#include "cuda/vq/vq_gemv_lut.cuh"
#include "cuda/vq/vq_gemv_mma.cuh"
#include "nowag/vq_gemv.h"

namespace nowag::cuda {
namespace {

constexpr int kMaxSegment = 64;  // positions: sums stay short, as the error bound asks for
// Dynamic shared memory that a block can have from compute capability 8.0 on.
constexpr size_t kSharedEverywhere = 99 << 10;

// Products of d = 4 are not looked up: vq_gemv_mma.cuh takes 44 weights a cycle and multiprocessor
// for 1 token and 37 for 8, without conflicts of banks; gathers from a table of products, 4 bytes a
// code, would take 27 for 1 token: 3.5 cycles for 32 codes, and 1.1 for the codes.
enum class Path { decode, look_up, multiply, batch };

struct Product {
    VqWeight weight;
    VqActivations io;
    int d;
    DType dtype;
};

struct Products {
    Product each[kVqMaxMembers];
    int64_t count;
};

Path choose_path(const Product& product) {
    if (!vq_gemv_on_tensor_cores(product.d, product.weight.code_bits)) return Path::decode;
    if (product.io.tokens > kVqGemvMaxTokens) return Path::batch;
    return product.d == kLutD && product.io.tokens <= lut_tokens(product.dtype) ? Path::look_up
                                                                                : Path::multiply;
}

template <int kD, int kBits>
struct Form {
    static constexpr int d = kD;
    static constexpr int code_bits = kBits;
};

// Calls run with the form that these name, of those that vq_gemv_on_tensor_cores.
template <typename Run>
auto with_form(int d, int code_bits, Run&& run) {
    if (d == 6) return run(Form<6, 12>{});
    return code_bits == 8 ? run(Form<4, 8>{}) : run(Form<4, 12>{});
}

// The cuts depend on the shape and the device; the number of tokens must not enter here, but where
// vq_gemv.h says that one has other bits than two.

// Sets of sums, where the largest has that many rows.
int64_t look_up_sets(const Product* products, int64_t count) {
    const bool small = std::all_of(products, products + count, [](const Product& product) {
        return row_tiles(product.weight.rows) <= kSetTiles;
    });
    if (small) return 1;
    return products[0].io.tokens == 1 ? kMaxSets<1> : kMaxSets<2>;
}

// Of positions: segments and the chunks of rows fill the device once.
Segments cut_for_look_up(int64_t chunks, int64_t positions) {
    const int64_t wanted = std::max<int64_t>(1, device_limits().multiprocessors / chunks);
    const int64_t length = std::min<int64_t>(kMaxSegment, ceil_div(positions, wanted));
    return {static_cast<int>(ceil_div(positions, length)), static_cast<int>(length)};
}

// Of steps: the first block, which has most to do, has as little as can be. The unit is a turn: a
// step of each of its slices, at most max_turns in a segment.
Segments cut_steps(int64_t pieces, int64_t positions, int64_t slices, int64_t max_turns,
                   double item_end) {
    const int64_t steps = ceil_div(positions, kStep), blocks = device_limits().multiprocessors;
    Segments best{};
    double least = 0.0;
    for (int64_t turns = 1; turns <= max_turns; ++turns) {
        const int64_t length = turns * slices, count = ceil_div(steps, length);
        const int64_t last_turns = ceil_div(steps - (count - 1) * length, slices);
        const int64_t items = ceil_div(pieces * count, blocks);
        const int64_t long_items = ceil_div(pieces * (count - 1), blocks);
        const double work = static_cast<double>(long_items * turns) +
                            static_cast<double>((items - long_items) * last_turns) +
                            item_end * static_cast<double>(items);
        if (best.count > 0 && work > least) continue;
        least = work;
        best = {static_cast<int>(count), static_cast<int>(length)};
    }
    return best;
}

Segments cut_for_multiply(const VqGroup& group, int d) {
    return cut_steps(group.pieces, group.positions(), kSlices, kMaxWarpSteps,
                     d == 4 ? kItemEndTurns<4> : kItemEndTurns<6>);
}

// A segment for each block of a cluster: the one with most to do has as little as can be. None
// (count 0) where the device has no clusters, or no room for the inputs of a segment.
Segments cut_for_clusters(const VqGroup& group, int most_steps, double item_end) {
    const DeviceLimits limits = device_limits();
    const int64_t steps = ceil_div(group.positions(), kStep);
    Segments best{};
    double least = 0.0;
    for (int size = 1; size <= kMaxCluster; ++size) {
        const int64_t length = ceil_div(steps, size);
        if (limits.clusters[size] == 0 || length > most_steps) continue;
        const double items = static_cast<double>(ceil_div(group.pieces, limits.clusters[size]));
        const double work = items * (static_cast<double>(ceil_div(length, kSlices)) + item_end);
        if (best.count > 0 && work >= least) continue;
        least = work;
        best = {size, static_cast<int>(length)};
    }
    return best;
}

template <int kD, int kBits>
Segments cut_for_clusters(const VqGroup& group) {
    if (group.tokens() > kOctet) return {};
    const auto shared = static_cast<size_t>(device_limits().shared_bytes);
    return cut_for_clusters(group, ClusterMemory<kD, kBits>::most_steps(shared),
                            kClusterItemEndTurns<kD>);
}

Segments cut_for_batch(int64_t rows, int64_t positions) {
    return cut_steps(ceil_div(rows, kBlockRows), positions, kBatchSlices, kBatchWarpSteps,
                     kBatchItemEndTurns);
}

int64_t partial_bytes(int64_t tokens, int64_t padded_rows, Segments segments) {
    return static_cast<int64_t>(sizeof(float)) * segments.count * tokens * padded_rows;
}

// The group of some products, each in pieces of so many tiles.
VqGroup group_of(const Product* products, int64_t count, int64_t piece_tiles) {
    VqGroup group{};
    for (int64_t m = 0; m < count; ++m) {
        const int64_t tiles = row_tiles(products[m].weight.rows);
        group.members[m] = {products[m].weight, products[m].io, tiles * kTileRows,
                            group.padded_rows, group.pieces};
        group.padded_rows += tiles * kTileRows;
        group.pieces += static_cast<int>(ceil_div(tiles, piece_tiles));
    }
    group.count = static_cast<int>(count);
    return group;
}

// What vq_gemv_prepare writes for vq_gemv_mma, at the start of the scratch memory.
struct Prepared {
    int64_t octets;  // of each member
    int64_t steps;
    int64_t operands;  // their bytes, of all members
    int64_t scales;

    Prepared(const VqGroup& group, int d)
        : octets(ceil_div(group.tokens(), kOctet)),
          steps(ceil_div(group.positions(), kStep)),
          operands(static_cast<int64_t>(sizeof(uint4)) * group.count * octets * steps * (d / 2) *
                   kWarpSize),
          scales(static_cast<int64_t>(sizeof(float)) * group.count * octets * steps * kOctet) {}
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
Status finish(const VqGroup& group, Segments segments, const float* partial, Stream stream) {
    const dim3 grid(blocks_for(group.padded_rows / kTileRows, kFinishWarps / kResidues),
                    static_cast<unsigned>(group.tokens()));
    return launch_after(vq_gemv_finish<kType, kResidues>, grid, kFinishThreads,
                        sizeof(float) * kFinishThreads, stream, group, segments.count, partial);
}

template <int kD, DType kType>
Status decode(const VqWeight& weight, const VqActivations& io, Stream stream) {
    const auto kernel = io.tokens == 1   ? vq_gemv_decode<kD, 1, kType>
                        : io.tokens <= 4 ? vq_gemv_decode<kD, 4, kType>
                                         : vq_gemv_decode<kD, 16, kType>;
    return launch(kernel, static_cast<unsigned>(row_tiles(weight.rows)), kDecodeThreads,
                  sizeof(float) * kDecodeThreads, stream, weight, io);
}

template <DType kType, int kTokens, int kSets, int kStages>
Status look_up(const VqGroup& group, float* partial, Stream stream) {
    using Memory = LutMemory<kTokens, kSets, kStages>;
    const Segments segments = cut_for_look_up(group.pieces, group.positions());
    const dim3 grid(static_cast<unsigned>(segments.count), static_cast<unsigned>(group.pieces));
    return in_order(
        [&] {
            return launch(vq_gemv_lut<kType, kTokens, kSets, kStages>, grid, kLutThreads,
                          Memory::bytes(segments.length), stream, group, segments, partial);
        },
        [&] { return finish<kType, kLutResidues>(group, segments, partial, stream); });
}

template <DType kType, int kTokens, int kSets>
Status look_up(const VqGroup& group, float* partial, Stream stream) {
    static_assert(LutMemory<kTokens, kSets, 2>::bytes(kMaxSegment) <= kSharedEverywhere,
                  "runs anywhere");
    constexpr size_t kDeep = LutMemory<kTokens, kSets, kDeepStages>::bytes(kMaxSegment);
    return static_cast<size_t>(device_limits().shared_bytes) < kDeep
               ? look_up<kType, kTokens, kSets, 2>(group, partial, stream)
               : look_up<kType, kTokens, kSets, kDeepStages>(group, partial, stream);
}

template <DType kType, int kTokens>
Status look_up(const Product* products, int64_t count, float* partial, Stream stream) {
    const int64_t sets = look_up_sets(products, count);
    const VqGroup group = group_of(products, count, sets * kSetTiles);
    return sets == 1 ? look_up<kType, kTokens, 1>(group, partial, stream)
                     : look_up<kType, kTokens, kMaxSets<kTokens>>(group, partial, stream);
}

template <int kD, int kBits, DType kType>
Status multiply_in_clusters(const VqGroup& group, Segments segments, Stream stream) {
    const int clusters = std::min(group.pieces, device_limits().clusters[segments.count]);
    return launch_in_clusters(segments.count, vq_gemv_cluster<kD, kBits, kType>,
                              static_cast<unsigned>(clusters * segments.count), kMmaThreads,
                              ClusterMemory<kD, kBits>::bytes(group.tokens(), segments.length),
                              stream, group, segments);
}

template <int kD, int kBits, DType kType>
Status multiply(const VqGroup& group, unsigned char* scratch, Stream stream) {
    const Segments of_clusters = cut_for_clusters<kD, kBits>(group);
    if (of_clusters.count > 0) {
        return multiply_in_clusters<kD, kBits, kType>(group, of_clusters, stream);
    }
    const Prepared prepared(group, kD);
    const Segments segments = cut_for_multiply(group, kD);
    const MmaInputs inputs{reinterpret_cast<uint4*>(scratch),
                           reinterpret_cast<float*>(scratch + prepared.operands),
                           static_cast<int>(prepared.steps)};
    float* partial = reinterpret_cast<float*>(scratch + prepared.operands + prepared.scales);
    const int64_t items = static_cast<int64_t>(group.pieces) * segments.count;
    const auto blocks = std::min<int64_t>(items, device_limits().multiprocessors);
    auto kernel = vq_gemv_mma<kD, kBits, 1>;
    if constexpr (kMmaOctets<kD, kBits> == 2) {
        if (prepared.octets == 2) kernel = vq_gemv_mma<kD, kBits, 2>;
    }
    return in_order(
        [&] {
            const dim3 grid(blocks_for(prepared.steps, kPrepareWarps),
                            static_cast<unsigned>(prepared.octets),
                            static_cast<unsigned>(group.count));
            return launch(vq_gemv_prepare<kD, kType>, grid, kPrepareThreads, 0, stream, group,
                          inputs);
        },
        [&] {
            return launch_after(kernel, static_cast<unsigned>(blocks), kMmaThreads,
                                kMmaShared<kD, kBits>, stream, group, inputs, segments, partial);
        },
        [&] { return finish<kType, kMmaResidues>(group, segments, partial, stream); });
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
Status on_tensor_cores(const Product* products, int64_t count, unsigned char* scratch,
                       Stream stream) {
    constexpr int kAtOnce = kMmaOctets<kD, kBits> * kOctet;
    const VqGroup group = group_of(products, count, kBlockRows / kTileRows);
    const int tokens = group.tokens();
    if (tokens <= kAtOnce) return multiply<kD, kBits, kType>(group, scratch, stream);
    if (tokens <= kVqGemvMaxTokens) {
        const auto part = [&](int begin, int end) {
            VqGroup some = group;
            for (VqGroup::Member& member : some.members) {
                member.io = tokens_of<kType>(member.io, member.weight, begin, end);
            }
            return multiply<kD, kBits, kType>(some, scratch, stream);
        };
        return in_order([&] { return part(0, kAtOnce); }, [&] { return part(kAtOnce, tokens); });
    }
    if constexpr (kType == DType::float32) {
        return Status::invalid_argument;
    } else {
        const VqWeight& weight = products[0].weight;
        const VqActivations& io = products[0].io;
        const PreparedBatch prepared(tokens, weight.positions, kD);
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

// Products that one chain of launches computes, or one alone.
template <DType kType>
Status multiply(const Product* products, int64_t count, void* workspace, Stream stream) {
    auto* scratch = static_cast<unsigned char*>(workspace);
    const int d = products[0].d, code_bits = products[0].weight.code_bits;
    switch (choose_path(products[0])) {
        case Path::look_up: {
            auto* partial = static_cast<float*>(workspace);
            if constexpr (lut_tokens(kType) == 2) {
                if (products[0].io.tokens == 2) {
                    return look_up<kType, 2>(products, count, partial, stream);
                }
            }
            return look_up<kType, 1>(products, count, partial, stream);
        }
        case Path::multiply:
        case Path::batch:
            return with_form(d, code_bits, [&](auto form) {
                return on_tensor_cores<form.d, form.code_bits, kType>(products, count, scratch,
                                                                      stream);
            });
        default:
            return with_subvector(d, [&](auto subvector) {
                return decode<subvector.value, kType>(products[0].weight, products[0].io, stream);
            });
    }
}

int64_t workspace_for(const Product* products, int64_t count) {
    const VqWeight& weight = products[0].weight;
    const int64_t tokens = products[0].io.tokens;
    const int d = products[0].d;
    switch (choose_path(products[0])) {
        case Path::look_up: {
            const int64_t sets = look_up_sets(products, count);
            const VqGroup group = group_of(products, count, sets * kSetTiles);
            return partial_bytes(tokens, group.padded_rows,
                                 cut_for_look_up(group.pieces, weight.positions));
        }
        case Path::multiply: {
            const VqGroup group = group_of(products, count, kBlockRows / kTileRows);
            const Segments of_clusters = with_form(d, weight.code_bits, [&](auto form) {
                return cut_for_clusters<form.d, form.code_bits>(group);
            });
            if (of_clusters.count > 0) return 0;
            const Prepared prepared(group, d);
            return prepared.operands + prepared.scales +
                   partial_bytes(tokens, group.padded_rows, cut_for_multiply(group, d));
        }
        case Path::batch: {
            const PreparedBatch prepared(tokens, weight.positions, d);
            return prepared.operands + prepared.scales +
                   partial_bytes(tokens, row_tiles(weight.rows) * kTileRows,
                                 cut_for_batch(weight.rows, weight.positions));
        }
        default:
            return 0;
    }
}

// Whether one chain of launches computes them all: they take one path, and where that keeps a
// codebook in shared memory from one item to the next, and an octet's sums in registers, have one
// codebook and no more tokens.
bool are_one_chain(const Products& products) {
    const Product& first = products.each[0];
    const Path path = choose_path(first);
    if (products.count == 1) return true;
    if (path == Path::multiply && first.io.tokens > kOctet) return false;
    if (path != Path::look_up && path != Path::multiply) return false;
    return std::all_of(products.each, products.each + products.count, [&](const Product& other) {
        return other.d == first.d && other.weight.code_bits == first.weight.code_bits &&
               (path == Path::look_up || other.weight.codebook == first.weight.codebook);
    });
}

Product product_of(const void* x, DType dtype, int64_t tokens, int64_t cols,
                   const VqMember& member) {
    return {{reinterpret_cast<const uint32_t*>(member.packed), member.codebook, member.row_norms,
             member.col_norms, member.rows, cols, code_positions(cols, member.d), member.code_bits},
            {x, member.bias, member.y, static_cast<int>(tokens)},
            member.d,
            dtype};
}

bool is_valid(int64_t tokens, int64_t most, int64_t cols, const VqMember& member) {
    return valid_vq(member.d, member.code_bits) && member.rows >= 1 && cols >= 1 && tokens >= 1 &&
           tokens <= most;
}

// None if they are outside the contract.
Products products_of(const void* x, DType dtype, int64_t tokens, int64_t cols,
                     const int64_t* members, int64_t count) {
    Products products{};
    if (count > kVqMaxMembers) return products;
    for (int64_t m = 0; m < count; ++m) {
        const VqMember member = vq_member(members, m);
        if (!is_valid(tokens, kVqGemvMaxTokens, cols, member)) return {};
        products.each[products.count++] = product_of(x, dtype, tokens, cols, member);
    }
    return products;
}

}  // namespace

int64_t vq_gemv_workspace(const void* x, DType dtype, int64_t tokens, const uint8_t* packed,
                          const uint16_t* codebook, const uint16_t* row_norms,
                          const uint16_t* col_norms, const void* bias, int64_t rows, int64_t cols,
                          int d, int code_bits, void* y) {
    const VqMember member{packed, codebook, row_norms, col_norms, bias, rows, d, code_bits, y};
    if (!is_valid(tokens, kVqGemvBatchTokens, cols, member)) return 0;
    const Product product = product_of(x, dtype, tokens, cols, member);
    return workspace_for(&product, 1);
}

Status vq_gemv(const void* x, DType dtype, int64_t tokens, const uint8_t* packed,
               const uint16_t* codebook, const uint16_t* row_norms, const uint16_t* col_norms,
               const void* bias, int64_t rows, int64_t cols, int d, int code_bits, void* y,
               void* workspace, Stream stream) {
    const VqMember member{packed, codebook, row_norms, col_norms, bias, rows, d, code_bits, y};
    if (!is_valid(tokens, vq_gemv_device_tokens(dtype, d, code_bits), cols, member)) {
        return Status::invalid_argument;
    }
    const Product product = product_of(x, dtype, tokens, cols, member);
    return with_dtype(
        dtype, [&](auto type) { return multiply<type.value>(&product, 1, workspace, stream); });
}

int64_t vq_gemv_group_workspace(const void* x, DType dtype, int64_t tokens, int64_t cols,
                                const int64_t* members, int64_t count) {
    const Products products = products_of(x, dtype, tokens, cols, members, count);
    if (products.count == 0) return 0;
    if (are_one_chain(products)) return workspace_for(products.each, products.count);
    int64_t most = 0;
    for (int64_t m = 0; m < products.count; ++m) {
        most = std::max(most, workspace_for(products.each + m, 1));
    }
    return most;
}

Status vq_gemv_group(const void* x, DType dtype, int64_t tokens, int64_t cols,
                     const int64_t* members, int64_t count, void* workspace, Stream stream) {
    const Products products = products_of(x, dtype, tokens, cols, members, count);
    if (products.count == 0) return Status::invalid_argument;
    return with_dtype(dtype, [&](auto type) {
        if (are_one_chain(products)) {
            return multiply<type.value>(products.each, products.count, workspace, stream);
        }
        Status status = Status::ok;
        for (int64_t m = 0; m < products.count && status == Status::ok; ++m) {
            status = multiply<type.value>(products.each + m, 1, workspace, stream);
        }
        return status;
    });
}

}  // namespace nowag::cuda
