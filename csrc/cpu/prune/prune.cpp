// Finding the n_prune smallest of a whole layer takes two passes over the weights as a rule: a
// sample brackets the threshold, one pass counts the keys below and inside the bracket and so finds
// it exactly, one pass writes the bitmap. Where the sample misled, the bracket is the whole range
// and two more passes narrow it down: the result never depends on the sample.
#include "nowag/prune.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/base/failure.h"
#include "cpu/base/parallel.h"
#include "cpu/base/simd.h"
#include "cpu/prune/prune_table.h"
#include "nowag/dtype.h"
#include "nowag/format.h"

namespace nowag::cpu {
namespace {

constexpr int kMostBinBits = 19;  // 2 MiB of counters a thread: they stay in its L2 cache
constexpr int kLeastBinBits = 10;
constexpr int64_t kWeightsPerBin = 16;      // small layers: clearing counters must not cost a pass
constexpr uint32_t kAllKeys = 0x7f800001u;  // up to and including infinity's
constexpr int64_t kMostSamples = 1 << 17;
constexpr int64_t kWeightsPerSample = 32;
constexpr int64_t kSampleRun = 16;  // sampled weights side by side: one cache line
constexpr int64_t kWeightsBetweenPolls = 1 << 16;
constexpr double kSampleDeviations = 2.5;  // half the bracket's width, in standard deviations

const PruneTable* table() {
#ifdef NOWAG_X86
    return simd_pick(&kPruneScalar, &kPruneAvx2, &kPruneAvx512,
                     static_cast<const PruneTable*>(nullptr));
#else
    return &kPruneScalar;
#endif
}

struct Layer {
    const float* w;
    const float* h;
    int64_t rows;
    int64_t cols;
    int threads;

    int64_t numel() const { return rows * cols; }
    const float* row(int64_t i) const { return w + i * cols; }
    uint32_t key(int64_t i, int64_t j) const {
        const float weight = w[i * cols + j];
        return float_bits(h[j] * (weight * weight));
    }
};

// Keys spread evenly over the layer.
std::vector<uint32_t> sample_keys(const Layer& layer) {
    const int64_t numel = layer.numel();
    const int64_t runs = std::min(kMostSamples, numel / kWeightsPerSample) / kSampleRun;
    std::vector<uint32_t> keys;
    keys.reserve(static_cast<size_t>(runs * kSampleRun));
    // Steps of the golden ratio do not fall in with the length of a row.
    constexpr double kGolden = 0.6180339887498949;
    for (int64_t run = 0; run < runs; ++run) {
        const double place = static_cast<double>(run) * kGolden;
        const auto first = static_cast<int64_t>((place - std::floor(place)) *
                                                static_cast<double>(numel - kSampleRun + 1));
        int64_t i = first / layer.cols, j = first % layer.cols;
        for (int64_t k = 0; k < kSampleRun; ++k) {
            keys.push_back(layer.key(i, j));
            if (++j == layer.cols) ++i, j = 0;
        }
    }
    return keys;
}

// The keys lo <= key < end in as many bins as suit the layer.
KeyRange range_between(const Layer& layer, uint32_t lo, uint32_t end) {
    int bits = kMostBinBits;
    while (bits > kLeastBinBits && (int64_t{1} << bits) > layer.numel() / kWeightsPerBin) --bits;
    const uint32_t span = end - lo;
    int shift = 0;
    while (((span - 1) >> shift) >= (1u << bits)) ++shift;
    return {lo, span, shift};
}

// Where the key of rank `rank` (from 0) lies in all likelihood.
KeyRange likely_range(const Layer& layer, int64_t rank) {
    std::vector<uint32_t> keys = sample_keys(layer);
    if (keys.empty()) return range_between(layer, 0, kAllKeys);
    const auto count = static_cast<double>(keys.size());
    const double share = static_cast<double>(rank) / static_cast<double>(layer.numel());
    const double spread = 1 + kSampleDeviations * std::sqrt(count * share * (1 - share));
    const auto at = [&](double place) {
        const auto index = static_cast<int64_t>(std::clamp(place, 0.0, count - 1));
        std::nth_element(keys.begin(), keys.begin() + index, keys.end());
        return keys[static_cast<size_t>(index)];
    };
    const uint32_t lo = at(share * count - spread);
    return range_between(layer, lo, at(share * count + spread) + 1);
}

struct Threshold {
    uint32_t key;
    int64_t below;  // number of keys smaller than it
};

// One pass: the bin of `range` that holds the key of rank `rank`, as a new range, and the number of
// keys below it. span 0 if the range does not hold it.
KeyRange narrow(const Layer& layer, int64_t rank, KeyRange range, int64_t* below) {
    const PruneTable& kernel = *table();
    // One part of the rows a thread, because each needs counters of its own.
    const int64_t parts = std::min<int64_t>(layer.threads, layer.rows);
    const size_t bins = ((range.span - 1) >> range.shift) + 1;
    std::vector<std::vector<uint32_t>> counts(static_cast<size_t>(parts));
    std::vector<int64_t> part_below(static_cast<size_t>(parts));
    for (auto& part : counts) part.resize(bins);
    parallel_for(parts, layer.threads, [&](int64_t part) {
        const int64_t rows_between_polls = std::max<int64_t>(1, kWeightsBetweenPolls / layer.cols);
        uint32_t* part_counts = counts[static_cast<size_t>(part)].data();
        int64_t sum = 0;
        for (int64_t i = layer.rows * part / parts; i < layer.rows * (part + 1) / parts; ++i) {
            if (i % rows_between_polls == 0) poll();
            sum += kernel.count_keys(layer.row(i), layer.h, layer.cols, range, part_counts);
        }
        part_below[static_cast<size_t>(part)] = sum;
    });

    *below = 0;
    for (const int64_t count : part_below) *below += count;
    if (*below > rank) return {0, 0, 0};
    for (size_t bin = 0; bin < bins; ++bin) {
        int64_t count = 0;
        for (const auto& part : counts) count += part[bin];
        if (*below + count > rank) {
            const uint32_t lo = range.lo + static_cast<uint32_t>(bin << range.shift);
            return range_between(layer, lo, lo + (1u << range.shift));
        }
        *below += count;
    }
    return {0, 0, 0};
}

// False if no number has that rank, because there are NaNs or negative saliencies.
bool find_threshold(const Layer& layer, int64_t rank, Threshold* threshold) {
    KeyRange range = likely_range(layer, rank);
    bool all = false;
    for (;;) {
        const KeyRange searched = range;
        all = all || searched.span == kAllKeys;
        range = narrow(layer, rank, searched, &threshold->below);
        threshold->key = range.lo;
        if (range.span == 0) {
            if (all) return false;
            range = range_between(layer, 0, kAllKeys);
        } else if (searched.shift == 0) {
            return true;
        }
    }
}

// Clears the bits of the first `count` weights of row i whose key is the threshold's.
void drop_ties(const Layer& layer, int64_t i, uint32_t threshold, int64_t count, uint8_t* bits) {
    for (int64_t j = 0; count > 0 && j < layer.cols; ++j) {
        if (layer.key(i, j) != threshold) continue;
        bits[j / 8] = static_cast<uint8_t>(bits[j / 8] & ~(1u << (j % 8)));
        --count;
    }
}

void write_bitmap(const Layer& layer, Threshold threshold, int64_t n_prune, uint8_t* bitmap) {
    const PruneTable& kernel = *table();
    const int64_t row_bytes = bitmap_row_bytes(layer.cols);
    std::vector<int64_t> ties(static_cast<size_t>(layer.rows));
    parallel_for(layer.rows, layer.threads, [&](int64_t i) {
        ties[static_cast<size_t>(i)] = kernel.keep_from(layer.row(i), layer.h, layer.cols,
                                                        threshold.key, bitmap + i * row_bytes);
    });
    int64_t excess = n_prune - threshold.below;
    for (int64_t& row_ties : ties) {
        row_ties = std::min(row_ties, excess);
        excess -= row_ties;
    }
    parallel_for(layer.rows, layer.threads, [&](int64_t i) {
        drop_ties(layer, i, threshold.key, ties[static_cast<size_t>(i)], bitmap + i * row_bytes);
    });
}

}  // namespace

Status prune_select(const float* w, const float* h, int64_t rows, int64_t cols, int64_t n_prune,
                    uint8_t* bitmap, int threads) try {
    if (rows < 1 || cols < 1 || n_prune < 0 || n_prune > rows * cols || threads < 1) {
        return Status::invalid_argument;
    }
    const Layer layer{w, h, rows, cols, threads};
    Threshold threshold{0, 0};
    if (n_prune > 0 && !find_threshold(layer, n_prune - 1, &threshold)) {
        return Status::invalid_argument;
    }
    write_bitmap(layer, threshold, n_prune, bitmap);
    return Status::ok;
} catch (...) {
    return failure();
}

Status prune_select_nm(const float* w, const float* h, int64_t rows, int64_t cols, int n, int m,
                       uint8_t* bitmap, int threads) try {
    if (rows < 1 || cols < 1 || n < 1 || n > m || m > kMaxGroup || cols % m != 0 || threads < 1) {
        return Status::invalid_argument;
    }
    const PruneTable& kernel = *table();
    const int64_t row_bytes = bitmap_row_bytes(cols);
    parallel_for(rows, threads, [&](int64_t i) {
        kernel.keep_nm(w + i * cols, h, cols, n, m, bitmap + i * row_bytes);
    });
    return Status::ok;
} catch (...) {
    return failure();
}

Status prune_objective(const float* w, const float* h, const uint8_t* bitmap, int64_t rows,
                       int64_t cols, double* sums, int threads) try {
    if (rows < 1 || cols < 1 || threads < 1) return Status::invalid_argument;
    const PruneTable& kernel = *table();
    const int64_t row_bytes = bitmap_row_bytes(cols);
    std::vector<double> row_sums(static_cast<size_t>(2 * rows));
    parallel_for(rows, threads, [&](int64_t i) {
        kernel.sum_saliencies(w + i * cols, h, cols, bitmap + i * row_bytes,
                              &row_sums[static_cast<size_t>(2 * i)]);
    });
    sums[0] = sums[1] = 0.0;
    for (size_t i = 0; i < row_sums.size(); ++i) sums[i % 2] += row_sums[i];
    return Status::ok;
} catch (...) {
    return failure();
}

}  // namespace nowag::cpu
