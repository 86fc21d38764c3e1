#include "nowag/vq_gemv.h"

#include <algorithm>
#include <memory>
#include <vector>

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
    int64_t cols;
    const uint8_t* packed;
    const uint16_t* codebook;
    const uint16_t* row_norms;
    const uint16_t* col_norms;
    const void* bias;
    int64_t rows;
    int d;
    int code_bits;
    void* y;

    int64_t positions() const { return code_positions(cols, d); }
    int64_t codes() const { return rows * positions(); }
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
void finish_rows(const Problem& problem, int64_t token, int64_t first, int64_t rows,
                 const float* sums) {
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
        finish_rows(problem, t, first, height, sums + t * kTileRows);
    }
}

// One product: parts of what is made of its inputs, then parts of the product, each in any order
// and on any thread; then what is left.
class Product {
  public:
    explicit Product(const Problem& problem) : problem_(problem) {}
    Product(const Product&) = delete;
    Product& operator=(const Product&) = delete;
    virtual ~Product() = default;

    virtual int64_t preparations() const { return 1; }
    virtual void prepare(int64_t index) = 0;
    virtual int64_t parts() const = 0;
    virtual void multiply(int64_t part) = 0;
    virtual void finish() {}

  protected:
    const Problem problem_;
};

// --- decode: see vq_gemv.h ---

// A tile of 32 rows is a part.
class Decode : public Product {
  public:
    explicit Decode(const Problem& problem)
        : Product(problem),
          lanes_(problem.d <= 4 ? 4 : 8),
          // With company, tokens fill whole vectors of 16 floats.
          together_(problem.tokens == 1 ? 1 : 16 / lanes_),
          stride_(ceil_div(problem.tokens, together_) * together_),
          inputs_(buffer<float>(problem.positions() * stride_ * lanes_)),
          codebook_(buffer<float>(problem.entries() * lanes_)) {}

    // The inputs as VqDecodeTile wants them: [positions, stride, lanes], zeros in all padding.
    void prepare(int64_t) override {
        const int64_t positions = problem_.positions(), d = problem_.d;
        std::fill_n(inputs_.get(), positions * stride_ * lanes_, 0.0f);
        const Buffer<float> scaled = buffer<float>(positions * d);
        for (int64_t t = 0; t < problem_.tokens; ++t) {
            scaled_inputs(problem_, t, scaled.get());
            for (int64_t p = 0; p < positions; ++p) {
                std::copy_n(&scaled[p * d], d, &inputs_[(p * stride_ + t) * lanes_]);
            }
        }
        decode_table()->arrange_codebook(problem_.codebook, problem_.entries(), problem_.d, lanes_,
                                         codebook_.get());
    }

    int64_t parts() const override { return problem_.tiles(); }

    void multiply(int64_t tile) override {
        float sums[kVqGemvMaxTokens * kTileRows];
        decode_table()->multiply_tile({problem_.packed + tile * problem_.stride(), codebook_.get(),
                                       inputs_.get(), problem_.positions(), problem_.code_bits,
                                       lanes_, static_cast<int>(problem_.tokens), stride_,
                                       problem_.codes_end(), sums});
        finish_tile(problem_, tile, sums);
    }

  private:
    const int lanes_;
    const int64_t together_, stride_;
    const Buffer<float> inputs_;
    const Buffer<float> codebook_;
};

class DecodeIntegers : public Product {
  public:
    DecodeIntegers(const Problem& problem, const VqIntegerTable& kernel)
        : Product(problem),
          kernel_(kernel),
          stride_(ceil_div(problem.positions(), kVqIntegerRun)),
          codebook_(buffer<int16_t>(problem.entries() * kVqIntegerLanes)),
          runs_(buffer<VqIntegerRun>(ceil_div(problem.tokens, 2) * stride_)) {}

    void prepare(int64_t) override {
        const int64_t positions = problem_.positions(), tokens = problem_.tokens;
        const float unit = kernel_.arrange_codebook(problem_.codebook, problem_.entries(),
                                                    problem_.d, codebook_.get());
        // The last token alone has nobody beside it.
        if (tokens % 2 == 1) std::fill_n(&runs_[tokens / 2 * stride_], stride_, VqIntegerRun{});
        const Buffer<float> scaled = buffer<float>(positions * problem_.d);
        for (int64_t t = 0; t < tokens; ++t) {
            scaled_inputs(problem_, t, scaled.get());
            kernel_.arrange_inputs(scaled.get(), problem_.d, positions, unit,
                                   static_cast<int>(t % 2), &runs_[t / 2 * stride_]);
        }
    }

    int64_t parts() const override { return problem_.tiles(); }

    void multiply(int64_t tile) override {
        float sums[kVqGemvMaxTokens * kTileRows];
        kernel_.multiply_tile({problem_.packed + tile * problem_.stride(), codebook_.get(),
                               runs_.get(), problem_.positions(), problem_.code_bits,
                               static_cast<int>(problem_.tokens), problem_.codes_end(), sums});
        finish_tile(problem_, tile, sums);
    }

  private:
    const VqIntegerTable& kernel_;
    const int64_t stride_;  // runs of a token
    const Buffer<int16_t> codebook_;
    const Buffer<VqIntegerRun> runs_;
};

// --- lookup: see vq_gemv.h ---

// Positions are cut into groups of about equal size, a row's sum being the groups' sums in order.
// How many depends on the shape only; an even number serves two threads.
int64_t group_count(int64_t positions) {
    return positions < kVqLookupGroup / 4 ? 1 : 2 * ceil_div(positions, 2 * kVqLookupGroup);
}

// A group of positions is a part; or of some rows where there are more threads than groups, for
// every part builds the tables.
class LookUp : public Product {
  public:
    LookUp(const Problem& problem, const VqLookupTable& kernel, int threads)
        : Product(problem),
          kernel_(kernel),
          together_(problem.tokens == 1 ? 1 : kernel.together),
          chunks_(ceil_div(problem.tokens, together_)),
          groups_(group_count(problem.positions())),
          shares_(std::min(problem.tiles(), ceil_div(threads, groups_))),
          chunk_sums_(problem.tiles() * kTileRows * together_),
          codebook_(buffer<float>(problem.d * kVqLookupEntries)),
          inputs_(buffer<float>(chunks_ * size() * together_)),
          sums_(buffer<float>(groups_ * chunks_ * chunk_sums_)) {}

    // The inputs of `together` tokens a chunk, [chunks, positions, d, together], zeros in all
    // padding.
    void prepare(int64_t) override {
        kernel_.arrange_codebook(problem_.codebook, problem_.d, codebook_.get(), largest_);
        if (together_ == 1) {
            for (int64_t t = 0; t < problem_.tokens; ++t) {
                scaled_inputs(problem_, t, &inputs_[t * size()]);
            }
            return;
        }
        std::fill_n(inputs_.get(), chunks_ * size() * together_, 0.0f);
        const Buffer<float> scaled = buffer<float>(size());
        for (int64_t t = 0; t < problem_.tokens; ++t) {
            scaled_inputs(problem_, t, scaled.get());
            float* out = &inputs_[t / together_ * size() * together_ + t % together_];
            for (int64_t i = 0; i < size(); ++i) out[i * together_] = scaled[i];
        }
    }

    int64_t parts() const override { return groups_ * shares_; }

    void multiply(int64_t index) override {
        const int64_t positions = problem_.positions(), tiles = problem_.tiles();
        const int64_t group = index / shares_, share = index % shares_;
        const int64_t begin = positions * group / groups_, end = positions * (group + 1) / groups_;
        const int64_t tile = tiles * share / shares_, tile_end = tiles * (share + 1) / shares_;
        for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
            kernel_.add_group(
                {codebook_.get(), largest_,
                 &inputs_[(chunk * positions + begin) * problem_.d * together_], problem_.d,
                 static_cast<int>(together_), end - begin,
                 problem_.packed + (tile * positions + begin) * kTileRows, positions * kTileRows,
                 tile_end - tile,
                 &sums_[(group * chunks_ + chunk) * chunk_sums_ + tile * kTileRows * together_]});
        }
    }

    void finish() override {
        const int64_t rows = problem_.rows;
        for (int64_t group = 1; group < groups_; ++group) {
            const float* more = &sums_[group * chunks_ * chunk_sums_];
            for (int64_t i = 0; i < chunks_ * chunk_sums_; ++i) sums_[i] += more[i];
        }
        if (together_ == 1) {
            for (int64_t t = 0; t < problem_.tokens; ++t) {
                finish_rows(problem_, t, 0, rows, &sums_[t * chunk_sums_]);
            }
            return;
        }
        const Buffer<float> own = buffer<float>(rows);
        for (int64_t t = 0; t < problem_.tokens; ++t) {
            const float* chunk = &sums_[t / together_ * chunk_sums_ + t % together_];
            for (int64_t i = 0; i < rows; ++i) own[i] = chunk[i * together_];
            finish_rows(problem_, t, 0, rows, own.get());
        }
    }

  private:
    int64_t size() const { return problem_.positions() * problem_.d; }

    const VqLookupTable& kernel_;
    const int64_t together_, chunks_, groups_, shares_, chunk_sums_;
    float largest_[kMaxSubvector];
    const Buffer<float> codebook_;
    const Buffer<float> inputs_;
    const Buffer<float> sums_;  // [groups, chunks, rows of all tiles, together]
};

// Tables of fewer positions are built sooner than a second thread starts.
constexpr int64_t kPositionsForThreads = 512;

// Codes of 4 bits. A pair of tiles is a part: they share the loads of the tables.
class LookUpNibbles : public Product {
  public:
    LookUpNibbles(const Problem& problem, const VqNibbleTable& kernel)
        : Product(problem),
          kernel_(kernel),
          runs_(ceil_div(problem.positions(), kVqNibbleRun)),
          shares_(ceil_div(problem.positions(), kPositionsForThreads)),
          scaled_(buffer<float>(problem.tokens * size())),
          tables_(buffer<VqNibbleRun>(problem.tokens * runs_)) {
        for (int k = 0; k < kVqNibbleEntries; ++k) {
            for (int j = 0; j < problem.d; ++j) {
                codebook_[j * kVqNibbleEntries + k] =
                    float16_to_float(problem.codebook[k * problem.d + j]);
            }
        }
        for (int64_t t = 0; t < problem.tokens; ++t) {
            scaled_inputs(problem, t, &scaled_[t * size()]);
        }
    }

    int64_t preparations() const override { return problem_.tokens * shares_; }

    void prepare(int64_t index) override {
        const int64_t token = index / shares_, share = index % shares_;
        const int64_t first = runs_ * share / shares_, end = runs_ * (share + 1) / shares_;
        const int64_t begin = first * kVqNibbleRun;
        const int64_t count = std::min(end * kVqNibbleRun, problem_.positions()) - begin;
        kernel_.build_tables(codebook_, &scaled_[token * size() + begin * problem_.d], problem_.d,
                             count, &tables_[token * runs_ + first]);
    }

    int64_t parts() const override { return ceil_div(problem_.tiles(), kTiles); }

    void multiply(int64_t part) override {
        const int64_t first = part * kTiles, tiles = std::min(kTiles, problem_.tiles() - first);
        const int64_t rows = std::min(tiles * kTileRows, problem_.rows - first * kTileRows);
        float sums[kTiles * kTileRows];
        for (int64_t t = 0; t < problem_.tokens; ++t) {
            kernel_.multiply(problem_.packed + first * problem_.stride(), problem_.stride(),
                             problem_.positions(), tiles, &tables_[t * runs_], sums);
            finish_rows(problem_, t, first * kTileRows, rows, sums);
        }
    }

  private:
    static constexpr int64_t kTiles = 2;
    int64_t size() const { return problem_.positions() * problem_.d; }

    const VqNibbleTable& kernel_;
    const int64_t runs_, shares_;
    float codebook_[kMaxSubvector * kVqNibbleEntries];
    const Buffer<float> scaled_;
    const Buffer<VqNibbleRun> tables_;
};

using Products = std::vector<std::unique_ptr<Product>>;

bool is_valid(const Problem& problem) {
    return problem.tokens >= 1 && problem.tokens <= kVqGemvMaxTokens && problem.rows >= 1 &&
           problem.cols >= 1 && valid_vq(problem.d, problem.code_bits);
}

std::unique_ptr<Product> product_of(const Problem& problem, int threads) {
    if (lookup_table() != nullptr && problem.code_bits == 8 && problem.rows >= kLookupRows) {
        return std::make_unique<LookUp>(problem, *lookup_table(), threads);
    }
    if (nibble_table() != nullptr && problem.code_bits == 4) {
        return std::make_unique<LookUpNibbles>(problem, *nibble_table());
    }
    if (problem.d > 4 && decode_table()->integers != nullptr) {
        return std::make_unique<DecodeIntegers>(problem, *decode_table()->integers);
    }
    return std::make_unique<Decode>(problem);
}

// One region of threads for all products: body(product, index) for every index below its count.
template <class Count, class Body>
void for_each(const Products& products, int threads, const Count& count, const Body& body) {
    int64_t total = 0;
    for (const auto& product : products) total += count(*product);
    parallel_for(total, threads, [&](int64_t index) {
        for (const auto& product : products) {
            const int64_t own = count(*product);
            if (index < own) return body(*product, index);
            index -= own;
        }
    });
}

void multiply(const std::vector<Problem>& problems, int threads) {
    int64_t codes = 0, inputs = 0;  // a code's position, for each token
    for (const Problem& problem : problems) {
        codes += problem.codes();
        inputs += problem.tokens * problem.positions();
    }
    if (codes < kCodesForThreads) threads = 1;
    Products products;
    for (const Problem& problem : problems) products.push_back(product_of(problem, threads));
    for_each(
        products, inputs <= kPositionsForThreads ? 1 : threads,
        [](const Product& product) { return product.preparations(); },
        [](Product& product, int64_t index) { product.prepare(index); });
    for_each(
        products, threads, [](const Product& product) { return product.parts(); },
        [](Product& product, int64_t part) { product.multiply(part); });
    for (const auto& product : products) product->finish();
}

}  // namespace

Status vq_gemv(const void* x, DType dtype, int64_t tokens, const uint8_t* packed,
               const uint16_t* codebook, const uint16_t* row_norms, const uint16_t* col_norms,
               const void* bias, int64_t rows, int64_t cols, int d, int code_bits, void* y,
               int threads) try {
    const Problem problem{x,         dtype, tokens, cols, packed,    codebook, row_norms,
                          col_norms, bias,  rows,   d,    code_bits, y};
    if (!is_valid(problem) || threads < 1) return Status::invalid_argument;
    multiply({problem}, threads);
    return Status::ok;
} catch (...) {
    return failure();
}

Status vq_gemv_group(const void* x, DType dtype, int64_t tokens, int64_t cols,
                     const int64_t* members, int64_t count, int threads) try {
    if (count < 1 || count > kVqMaxMembers || threads < 1) return Status::invalid_argument;
    std::vector<Problem> problems;
    for (int64_t m = 0; m < count; ++m) {
        const VqMember member = vq_member(members, m);
        problems.push_back({x, dtype, tokens, cols, member.packed, member.codebook,
                            member.row_norms, member.col_norms, member.bias, member.rows, member.d,
                            member.code_bits, member.y});
        if (!is_valid(problems.back())) return Status::invalid_argument;
    }
    multiply(problems, threads);
    return Status::ok;
} catch (...) {
    return failure();
}

}  // namespace nowag::cpu
