#include <algorithm>
#include <cmath>
#include <cstddef>

#include "cuda/base/launch.h"
#include "cuda/prune/prune_select_finish.cuh"
#include "cuda/prune/prune_select_sample.cuh"
#include "cuda/prune/prune_select_split.cuh"
#include "nowag/prune.h"

namespace nowag::cuda {

__global__ void prune_keep_all(int64_t rows, int64_t cols, uint8_t* bitmap) {
    const int64_t row_bytes = padded_columns(cols) / 8;
    const int64_t byte = static_cast<int64_t>(blockIdx.x) * kPruneThreads + threadIdx.x;
    if (byte >= rows * row_bytes) return;
    const int64_t left = cols - byte % row_bytes * 8;
    bitmap[byte] = static_cast<uint8_t>(left >= 8 ? 0xff : left <= 0 ? 0 : (1 << left) - 1);
}

namespace {

unsigned finish_blocks() {
    return static_cast<unsigned>(kFinishBlocks * device_limits().multiprocessors);
}

int64_t most_candidates(int64_t numel) {
    return std::min(numel, numel / kWeightsPerCandidate + kLeastCandidates);
}

int64_t bitmap_words(int64_t cols) {
    return bitmap_row_bytes(cols) / static_cast<int64_t>(sizeof(unsigned));
}

PruneSample make_sample(int64_t numel, int64_t n_prune) {
    int bits = 0;
    while (bits < kMostSampleBits && int64_t{2} << bits <= numel) ++bits;
    const double size = static_cast<double>(int64_t{1} << bits);
    const double share = static_cast<double>(n_prune) / static_cast<double>(numel);
    const double spread = 1 + kSampleDeviations * std::sqrt(size * share * (1 - share));
    return {bits, static_cast<int64_t>(std::floor(size * share - spread)),
            static_cast<int64_t>(std::ceil(size * share + spread))};
}

}  // namespace

int64_t prune_select_workspace(const float*, const float*, int64_t rows, int64_t cols, int64_t,
                               uint8_t*) {
    return static_cast<int64_t>(sizeof(PruneScratch)) +
           most_candidates(rows * cols) * static_cast<int64_t>(sizeof(PruneCandidate)) +
           static_cast<int64_t>(sizeof(unsigned)) *
               (finish_blocks() + rows + rows * bitmap_words(cols));
}

Status prune_select(const float* w, const float* h, int64_t rows, int64_t cols, int64_t n_prune,
                    uint8_t* bitmap, void* workspace, Stream stream) {
    if (!valid_layer(rows, cols) || n_prune < 0 || n_prune > rows * cols) {
        return Status::invalid_argument;
    }
    if (n_prune == 0) {
        return launch(prune_keep_all, blocks_for(rows * bitmap_row_bytes(cols), kPruneThreads),
                      kPruneThreads, 0, stream, rows, cols, bitmap);
    }
    const int64_t numel = rows * cols;
    const PruneLayer layer{w, h, rows, cols};
    const unsigned count = static_cast<unsigned>(n_prune);
    const PruneSample sample = make_sample(numel, n_prune);
    PruneScratch* scratch = static_cast<PruneScratch*>(workspace);
    const PruneCandidates candidates{reinterpret_cast<PruneCandidate*>(scratch + 1),
                                     static_cast<unsigned>(most_candidates(numel))};
    unsigned* ties = reinterpret_cast<unsigned*>(candidates.list + candidates.capacity);
    unsigned* const of_rows = ties + finish_blocks();
    const PruneCrowd crowd{of_rows + rows, of_rows};
    unsigned* words = reinterpret_cast<unsigned*>(bitmap);
    const auto split = read_in_fours(layer) ? prune_split<true> : prune_split<false>;
    return in_order(
        [&] { return clear(scratch, offsetof(PruneScratch, bracket), stream); },
        [&] {
            return launch(
                prune_sample, blocks_for(int64_t{1} << sample.bits, kPruneThreads * kSampleEach),
                kPruneThreads, sizeof(SampleShared), stream, layer, sample, scratch, crowd);
        },
        [&] {
            return launch(split, blocks_for(units_of(layer), kUnitsPerWarp * kPruneWarps),
                          kPruneThreads, sizeof(SplitShared), stream, layer, count, scratch,
                          candidates, words, crowd);
        },
        [&] {
            return launch_together(prune_finish, finish_blocks(), kPruneThreads,
                                   sizeof(FinishShared), stream, layer, count, scratch, candidates,
                                   ties, words, crowd);
        });
}

}  // namespace nowag::cuda
