#include "nowag/vq_gemv.h"

#include <algorithm>

#include "cpu/base/buffer.h"
#include "cpu/base/failure.h"
#include "cpu/base/parallel.h"
#include "cpu/base/simd.h"
#include "cpu/vq/vq_gemv_table.h"
#include "nowag/format.h"

namespace nowag::cpu {
namespace {

const VqDecodeTable* decode_table() {
#ifdef NOWAG_X86
    return simd_pick(&kVqDecodeScalar, &kVqDecodeAvx2, &kVqDecodeAvx512,
                     static_cast<const VqDecodeTable*>(nullptr));
#else
    return &kVqDecodeScalar;
#endif
}

const VqLookupTable* lookup_table() {
    const VqLookupTable* none = nullptr;
#ifdef NOWAG_X86
    return simd_pick(none, &kVqLookupAvx2, none, &kVqLookupAvx512Vbmi);
#else
    return none;
#endif
}

const VqNibbleTable* nibble_table() {
    const VqNibbleTable* none = nullptr;
#ifdef NOWAG_X86
    return simd_pick(none, &kVqNibbleAvx2, none, none);
#else
    return none;
#endif
}

// Fewer codes than this are done sooner than a second thread starts.
constexpr int64_t kCodesForThreads = 32768;
// Rows that make a table worth building: building one costs as much as looking this many up. (Four
// tables on AVX2 cost twice that; but one rule for all numbers of tokens gives them the same bits.)
constexpr int64_t kLookupRows = 512;

struct Problem {
    const void* x;
    DType dtype;
    int64_t tokens;
    const uint8_t* packed;
    const uint16_t* codebook;
    const uint16_t* row_norms;
    const uint16_t* col_norms;
    const void* bias;
    int64_t rows;
    int64_t cols;
    int d;
    int code_bits;
    void* y;
    int threads;

    int64_t positions() const { return code_positions(cols, d); }
    int64_t tiles() const { return row_tiles(rows); }
    int64_t entries() const { return int64_t{1} << code_bits; }
    // Bytes of a tile's codes, and where all codes end.
    int64_t stride() const { return positions() * tile_bytes(code_bits); }
    const uint8_t* codes_end() const { return packed + tiles() * stride(); }
};

// x * col_norms of one token, [positions * d], zeros in the padding.
void scaled_inputs(const Problem& problem, int64_t token, float* out) {
    const int64_t offset = token * problem.cols * dtype_size(problem.dtype);
    decode_table()->scale_inputs(static_cast<const char*>(problem.x) + offset, problem.dtype,
                                 problem.col_norms, problem.cols, out);
    std::fill(out + problem.cols, out + problem.positions() * problem.d, 0.0f);
}

// Rows [first, first + rows) of a token's y from their sums.
void finish(const Problem& problem, int64_t token, int64_t first, int64_t rows, const float* sums) {
    const int64_t size = dtype_size(problem.dtype);
    const char* bias = static_cast<const char*>(problem.bias);
    decode_table()->finish(sums, problem.row_norms + first,
                           bias == nullptr ? nullptr : bias + first * size, problem.dtype, rows,
                           static_cast<char*>(problem.y) + (token * problem.rows + first) * size);
}

// The rows of a tile from the sums of all tokens, [tokens, 32].
void finish_tile(const Problem& problem, int64_t tile, const float* sums) {
    const int64_t first = tile * kTileRows;
    const int64_t height = std::min<int64_t>(kTileRows, problem.rows - first);
    for (int64_t t = 0; t < problem.tokens; ++t) {
        finish(problem, t, first, height, sums + t * kTileRows);
    }
}

// --- decode: see vq_gemv.h ---

// Inputs as VqDecodeTile wants them: [positions, stride, lanes], zeros in all padding.
Buffer<float> decode_inputs(const Problem& problem, int lanes, int64_t stride) {
    const int64_t positions = problem.positions();
    Buffer<float> inputs = buffer<float>(positions * stride * lanes);
    std::fill(inputs.get(), inputs.get() + positions * stride * lanes, 0.0f);
    Buffer<float> scaled = buffer<float>(positions * problem.d);
    for (int64_t t = 0; t < problem.tokens; ++t) {
        scaled_inputs(problem, t, scaled.get());
        for (int64_t p = 0; p < positions; ++p) {
            std::copy_n(&scaled[static_cast<size_t>(p * problem.d)], problem.d,
                        &inputs[static_cast<size_t>((p * stride + t) * lanes)]);
        }
    }
    return inputs;
}

// All rows, a tile at a time: multiply(tile, sums) gives its sums for all tokens, [tokens, 32].
template <class Multiply>
void multiply_tiles(const Problem& problem, const Multiply& multiply) {
    const int threads = problem.rows * problem.positions() < kCodesForThreads ? 1 : problem.threads;
    parallel_for(problem.tiles(), threads, [&](int64_t tile) {
        float sums[kVqGemvMaxTokens * kTileRows];
        multiply(problem.packed + tile * problem.stride(), sums);
        finish_tile(problem, tile, sums);
    });
}

void decode(const Problem& problem) {
    const VqDecodeTable& kernel = *decode_table();
    const int lanes = problem.d <= 4 ? 4 : 8;
    // With company, tokens fill whole vectors of 16 floats.
    const int64_t together = problem.tokens == 1 ? 1 : 16 / lanes;
    const int64_t stride = ceil_div(problem.tokens, together) * together;
    const Buffer<float> inputs = decode_inputs(problem, lanes, stride);
    const Buffer<float> codebook = buffer<float>(problem.entries() * lanes);
    kernel.arrange_codebook(problem.codebook, problem.entries(), problem.d, lanes, codebook.get());
    multiply_tiles(problem, [&](const uint8_t* codes, float* sums) {
        kernel.multiply_tile({codes, codebook.get(), inputs.get(), problem.positions(),
                              problem.code_bits, lanes, static_cast<int>(problem.tokens), stride,
                              problem.codes_end(), sums});
    });
}

void decode_integers(const Problem& problem, const VqIntegerTable& kernel) {
    const int64_t positions = problem.positions();
    const Buffer<int16_t> codebook = buffer<int16_t>(problem.entries() * kVqIntegerLanes);
    const float unit =
        kernel.arrange_codebook(problem.codebook, problem.entries(), problem.d, codebook.get());
    const Buffer<float> scaled = buffer<float>(positions * problem.d);
    scaled_inputs(problem, 0, scaled.get());
    const Buffer<VqIntegerRun> runs = buffer<VqIntegerRun>(ceil_div(positions, kVqIntegerRun));
    kernel.arrange_inputs(scaled.get(), problem.d, positions, unit, runs.get());
    multiply_tiles(problem, [&](const uint8_t* codes, float* sums) {
        kernel.multiply_tile({codes, codebook.get(), runs.get(), positions, problem.code_bits,
                              problem.codes_end(), sums});
    });
}

// --- lookup: see vq_gemv.h ---

// Positions are cut into groups of about equal size, a row's sum being the groups' sums in order.
// How many depends on the shape only; an even number serves two threads.
int64_t group_count(int64_t positions) {
    return positions < kVqLookupGroup / 4 ? 1 : 2 * ceil_div(positions, 2 * kVqLookupGroup);
}

// The inputs of `together` tokens a chunk, [chunks, positions, d, together], zeros in all padding.
Buffer<float> lookup_inputs(const Problem& problem, int64_t chunks, int64_t together) {
    const int64_t size = problem.positions() * problem.d;
    Buffer<float> inputs = buffer<float>(chunks * size * together);
    if (together == 1) {
        for (int64_t t = 0; t < problem.tokens; ++t) scaled_inputs(problem, t, &inputs[t * size]);
        return inputs;
    }
    std::fill(inputs.get(), inputs.get() + chunks * size * together, 0.0f);
    const Buffer<float> scaled = buffer<float>(size);
    for (int64_t t = 0; t < problem.tokens; ++t) {
        scaled_inputs(problem, t, scaled.get());
        float* out = &inputs[t / together * size * together + t % together];
        for (int64_t i = 0; i < size; ++i) out[i * together] = scaled[i];
    }
    return inputs;
}

void look_up(const Problem& problem) {
    const VqLookupTable& kernel = *lookup_table();
    const int64_t positions = problem.positions(), tiles = problem.tiles();
    const Buffer<float> codebook = buffer<float>(problem.d * kVqLookupEntries);
    float largest[kMaxSubvector];
    kernel.arrange_codebook(problem.codebook, problem.d, codebook.get(), largest);
    const int64_t together = problem.tokens == 1 ? 1 : kernel.together;
    const int64_t chunks = ceil_div(problem.tokens, together);
    const Buffer<float> inputs = lookup_inputs(problem, chunks, together);

    // [groups, chunks, rows of all tiles, together]
    const int64_t groups = group_count(positions), chunk_sums = tiles * kTileRows * together;
    const Buffer<float> sums = buffer<float>(groups * chunks * chunk_sums);
    const int threads = problem.rows * positions < kCodesForThreads ? 1 : problem.threads;
    // Rows are divided only where there are more threads than groups: every part builds the tables.
    const int64_t parts = std::min(tiles, ceil_div(threads, groups));
    parallel_for(groups * parts, threads, [&](int64_t index) {
        const int64_t group = index / parts, part = index % parts;
        const int64_t begin = positions * group / groups, end = positions * (group + 1) / groups;
        const int64_t tile = tiles * part / parts, tile_end = tiles * (part + 1) / parts;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            kernel.add_group(
                {codebook.get(), largest,
                 &inputs[(chunk * positions + begin) * problem.d * together], problem.d,
                 static_cast<int>(together), end - begin,
                 problem.packed + (tile * positions + begin) * kTileRows, positions * kTileRows,
                 tile_end - tile,
                 &sums[(group * chunks + chunk) * chunk_sums + tile * kTileRows * together]});
        }
    });
    for (int64_t group = 1; group < groups; ++group) {
        const float* more = &sums[group * chunks * chunk_sums];
        for (int64_t i = 0; i < chunks * chunk_sums; ++i) sums[i] += more[i];
    }
    if (together == 1) {
        for (int64_t t = 0; t < problem.tokens; ++t) {
            finish(problem, t, 0, problem.rows, &sums[t * chunk_sums]);
        }
        return;
    }
    const Buffer<float> own = buffer<float>(problem.rows);
    for (int64_t t = 0; t < problem.tokens; ++t) {
        const float* chunk = &sums[t / together * chunk_sums + t % together];
        for (int64_t i = 0; i < problem.rows; ++i) own[i] = chunk[i * together];
        finish(problem, t, 0, problem.rows, own.get());
    }
}

// Tables of fewer positions are built sooner than a second thread starts.
constexpr int64_t kPositionsForThreads = 512;

// Codes of 4 bits. A pair of tiles is the unit of work: they share the loads of the tables.
void look_up_nibbles(const Problem& problem, const VqNibbleTable& kernel) {
    constexpr int64_t kTiles = 2;
    const int64_t positions = problem.positions(), runs = ceil_div(positions, kVqNibbleRun);
    float codebook[kMaxSubvector * kVqNibbleEntries];
    for (int k = 0; k < kVqNibbleEntries; ++k) {
        for (int j = 0; j < problem.d; ++j) {
            codebook[j * kVqNibbleEntries + k] =
                float16_to_float(problem.codebook[k * problem.d + j]);
        }
    }
    const int threads = problem.rows * positions < kCodesForThreads ? 1 : problem.threads;
    const int64_t size = positions * problem.d;
    const Buffer<float> scaled = buffer<float>(problem.tokens * size);
    for (int64_t t = 0; t < problem.tokens; ++t) scaled_inputs(problem, t, &scaled[t * size]);
    const Buffer<VqNibbleRun> tables = buffer<VqNibbleRun>(problem.tokens * runs);
    const int64_t parts = ceil_div(positions, kPositionsForThreads);
    const int builders = problem.tokens * positions <= kPositionsForThreads ? 1 : threads;
    parallel_for(problem.tokens * parts, builders, [&](int64_t index) {
        const int64_t token = index / parts, part = index % parts;
        const int64_t first = runs * part / parts, end = runs * (part + 1) / parts;
        const int64_t begin = first * kVqNibbleRun;
        const int64_t count = std::min(end * kVqNibbleRun, positions) - begin;
        kernel.build_tables(codebook, &scaled[token * size + begin * problem.d], problem.d, count,
                            &tables[token * runs + first]);
    });
    parallel_for(ceil_div(problem.tiles(), kTiles), threads, [&](int64_t index) {
        const int64_t first = index * kTiles, tiles = std::min(kTiles, problem.tiles() - first);
        const int64_t rows = std::min(tiles * kTileRows, problem.rows - first * kTileRows);
        float sums[kTiles * kTileRows];
        for (int64_t t = 0; t < problem.tokens; ++t) {
            kernel.multiply(problem.packed + first * problem.stride(), problem.stride(), positions,
                            tiles, &tables[t * runs], sums);
            finish(problem, t, first * kTileRows, rows, sums);
        }
    });
}

}  // namespace

Status vq_gemv(const void* x, DType dtype, int64_t tokens, const uint8_t* packed,
               const uint16_t* codebook, const uint16_t* row_norms, const uint16_t* col_norms,
               const void* bias, int64_t rows, int64_t cols, int d, int code_bits, void* y,
               int threads) try {
    if (tokens < 1 || tokens > kVqGemvMaxTokens || rows < 1 || cols < 1 ||
        !valid_vq(d, code_bits) || threads < 1) {
        return Status::invalid_argument;
    }
    const Problem problem{x,    dtype, tokens, packed, codebook,  row_norms, col_norms,
                          bias, rows,  cols,   d,      code_bits, y,         threads};
    if (lookup_table() != nullptr && code_bits == 8 && rows >= kLookupRows) {
        look_up(problem);
    } else if (nibble_table() != nullptr && code_bits == 4) {
        look_up_nibbles(problem, *nibble_table());
    } else if (tokens == 1 && d > 4 && decode_table()->integers != nullptr) {
        decode_integers(problem, *decode_table()->integers);
    } else {
        decode(problem);
    }
    return Status::ok;
} catch (...) {
    return failure();
}

}  // namespace nowag::cpu
