// Lookup of codes of 8 bits: see vq_gemv.h.
#include <algorithm>

#include "cpu/base/buffer.h"
#include "cpu/base/simd.h"
#include "cpu/vq/vq_gemv_product.h"
#include "cpu/vq/vq_gemv_table.h"

namespace nowag::cpu {
namespace {

const VqLookupTable* lookup_table() {
    const VqLookupTable* none = nullptr;
#ifdef NOWAG_X86
    return simd_pick(none, &kVqLookupAvx2, none, &kVqLookupAvx512Vbmi);
#else
    return none;
#endif
}

// Rows that make a table worth building: building one costs as much as looking this many up. (Four
// tables on AVX2 cost twice that; but one rule for all numbers of tokens gives them the same bits.)
constexpr int64_t kLookupRows = 512;

// Positions are cut into groups of about equal size, a row's sum being the groups' sums in order.
// How many depends on the shape only; an even number serves two threads.
int64_t group_count(int64_t positions) {
    return positions < kVqLookupGroup / 4 ? 1 : 2 * ceil_div(positions, 2 * kVqLookupGroup);
}

// A group of positions is a part; or of some rows where there are more threads than groups, for
// every part builds the tables.
class LookUp : public VqProduct {
  public:
    LookUp(const VqProblem& problem, const VqLookupTable& kernel, int threads)
        : VqProduct(problem),
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

}  // namespace

std::unique_ptr<VqProduct> vq_look_up(const VqProblem& problem, int threads) {
    const VqLookupTable* kernel = lookup_table();
    if (kernel == nullptr || problem.code_bits != 8 || problem.rows < kLookupRows) return nullptr;
    return std::make_unique<LookUp>(problem, *kernel, threads);
}

}  // namespace nowag::cpu
