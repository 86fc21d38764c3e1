// Lookup of codes of 4 bits: see vq_gemv.h.
#include <algorithm>

#include "cpu/base/buffer.h"
#include "cpu/base/simd.h"
#include "cpu/vq/vq_gemv_product.h"
#include "cpu/vq/vq_gemv_table.h"

namespace nowag::cpu {
namespace {

const VqNibbleTable* nibble_table() {
    const VqNibbleTable* none = nullptr;
#ifdef NOWAG_X86
    return simd_pick(none, &kVqNibbleAvx2, &kVqNibbleAvx512, none);
#else
    return none;
#endif
}

// Codes of 4 bits. A part is a pair of tiles, which share the loads of the tables; two pairs where
// threads have several of them, since what is fetched ahead of the first one's end is the second's.
class LookUpNibbles : public VqProduct {
  public:
    LookUpNibbles(const VqProblem& problem, const VqNibbleTable& kernel, int threads)
        : VqProduct(problem),
          kernel_(kernel),
          part_tiles_(problem.tiles() < 2 * kMostTiles * threads ? kMostTiles / 2 : kMostTiles),
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

    int64_t parts() const override { return ceil_div(problem_.tiles(), part_tiles_); }

    void multiply(int64_t part) override {
        const int64_t first = part * part_tiles_;
        const int64_t tiles = std::min(part_tiles_, problem_.tiles() - first);
        const int64_t rows = std::min(tiles * kTileRows, problem_.rows - first * kTileRows);
        float sums[kMostTiles * kTileRows];
        for (int64_t t = 0; t < problem_.tokens; ++t) {
            kernel_.multiply(problem_.packed + first * problem_.stride(), problem_.stride(),
                             problem_.positions(), tiles, &tables_[t * runs_], sums);
            finish_rows(problem_, t, first * kTileRows, rows, sums);
        }
    }

  private:
    static constexpr int64_t kMostTiles = 4;
    int64_t size() const { return problem_.positions() * problem_.d; }

    const VqNibbleTable& kernel_;
    const int64_t part_tiles_, runs_, shares_;
    float codebook_[kMaxSubvector * kVqNibbleEntries];
    const Buffer<float> scaled_;
    const Buffer<VqNibbleRun> tables_;
};

}  // namespace

std::unique_ptr<VqProduct> vq_look_up_nibbles(const VqProblem& problem, int threads) {
    const VqNibbleTable* kernel = nibble_table();
    if (kernel == nullptr || problem.code_bits != 4) return nullptr;
    return std::make_unique<LookUpNibbles>(problem, *kernel, threads);
}

}  // namespace nowag::cpu
