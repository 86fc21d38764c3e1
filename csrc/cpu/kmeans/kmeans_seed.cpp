// Starting codebooks: strata, and k-means++ on a sample (kmeans.h).
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "cpu/base/failure.h"
#include "cpu/base/parallel.h"
#include "cpu/kmeans/kmeans_sample.h"
#include "cpu/kmeans/kmeans_table.h"

namespace nowag::cpu {
namespace {

// One point of each of `wanted` equal strata of n points.
std::vector<int64_t> draw_strata(int64_t n, int64_t wanted, Random& random) {
    std::vector<int64_t> drawn(static_cast<size_t>(wanted));
    for (int64_t s = 0; s < wanted; ++s) {
        const int64_t low = s * n / wanted, high = (s + 1) * n / wanted;
        drawn[static_cast<size_t>(s)] =
            low + static_cast<int64_t>(random.below(static_cast<uint64_t>(high - low)));
    }
    return drawn;
}

// A sample of points, coordinate by coordinate, and how far each is from the entries chosen so far.
class Sample {
  public:
    Sample(const Points& points, const std::vector<Drawn>& drawn, int threads)
        : d_(points.d),
          size_(static_cast<int64_t>(drawn.size())),
          threads_(static_cast<int64_t>(drawn.size()) < kManyPoints ? 1 : threads),
          x_(static_cast<size_t>(d_ * size_)),
          h_(x_.size()),
          chosen_(size_),
          considered_(kKmeansCandidates, Coverage(size_)) {
        for (int64_t i = 0; i < size_; ++i) {
            float x[kMaxSubvector], h[kMaxSubvector];
            const Drawn& point = drawn[static_cast<size_t>(i)];
            points.read(point.index, x, h);
            for (int j = 0; j < d_; ++j) {
                x_[static_cast<size_t>(j * size_ + i)] = x[j];
                h_[static_cast<size_t>(j * size_ + i)] = h[j] * point.weight;
            }
        }
    }

    int64_t size() const { return size_; }

    void read(int64_t index, float* x) const {
        for (int j = 0; j < d_; ++j) x[j] = x_[static_cast<size_t>(j * size_ + index)];
    }

    // Considers `count` candidates, candidate c at entries + c * d: afterwards left(c) is what the
    // sum of q would be with it. All of them block by block, so that a block is read once from
    // beyond the second-level cache.
    void consider(const float* entries, int count) {
        const auto narrow = kmeans_table().narrow;
        parallel_for(static_cast<int64_t>(chosen_.sums.size()), threads_, [&](int64_t block) {
            const int64_t begin = block * kBlock, end = std::min(size_, begin + kBlock);
            for (int c = 0; c < count; ++c) {
                Coverage& with = considered_[static_cast<size_t>(c)];
                with.sums[static_cast<size_t>(block)] =
                    narrow(x_.data(), h_.data(), size_, begin, end, entries + c * d_, d_, scale_,
                           chosen_.nearest.data(), with.nearest.data());
            }
        });
    }

    uint64_t left(int candidate) const {
        return considered_[static_cast<size_t>(candidate)].total();
    }

    // Makes a candidate one of the chosen entries.
    void accept(int candidate) { std::swap(chosen_, considered_[static_cast<size_t>(candidate)]); }

    // Sets the scale of q from the largest distance to the first entry.
    void fix_scale() {
        const float largest = *std::max_element(chosen_.nearest.begin(), chosen_.nearest.end());
        int exponent = 0;
        std::frexp(largest, &exponent);
        scale_ = std::ldexp(1.0, 40 - exponent);
    }

    uint64_t total() const { return chosen_.total(); }

    // The point whose share of the running sum of q holds `target` < total(); the last one if there
    // is none, because distances are not finite.
    int64_t find(uint64_t target) const {
        size_t block = 0;
        while (block + 1 < chosen_.sums.size() && target >= chosen_.sums[block]) {
            target -= chosen_.sums[block++];
        }
        int64_t index = static_cast<int64_t>(block) * kBlock;
        for (; index + 1 < size_; ++index) {
            const uint64_t q = quantized(chosen_.nearest[static_cast<size_t>(index)]);
            if (target < q) break;
            target -= q;
        }
        return index;
    }

  private:
    // Points of a block: within the second-level cache, all coordinates and distances.
    static constexpr int64_t kBlock = 4096;
    // Fewer points are not worth waking another thread for.
    static constexpr int64_t kManyPoints = 32768;

    // Distance of every point to the nearest of some entries, and the sum of q of every block.
    struct Coverage {
        explicit Coverage(int64_t size)
            : nearest(static_cast<size_t>(size), INFINITY),
              sums(static_cast<size_t>(ceil_div(size, kBlock))) {}

        std::vector<float> nearest;
        std::vector<uint64_t> sums;

        uint64_t total() const { return std::accumulate(sums.begin(), sums.end(), uint64_t{0}); }
    };

    uint64_t quantized(float distance) const {
        return static_cast<uint64_t>(fixed_point(static_cast<double>(distance) * scale_));
    }

    int d_;
    int64_t size_;
    int threads_;
    double scale_ = 1.0;
    std::vector<float> x_, h_;
    Coverage chosen_;
    std::vector<Coverage> considered_;
};

void read_any(const Sample& sample, Random& random, float* entry) {
    sample.read(static_cast<int64_t>(random.below(static_cast<uint64_t>(sample.size()))), entry);
}

void first_entry(Sample& sample, Random& random, float* entry) {
    read_any(sample, random, entry);
    sample.consider(entry, 1);
    sample.accept(0);
    sample.fix_scale();
    sample.consider(entry, 1);
    sample.accept(0);
}

// The best of several candidates drawn from the sample.
void next_entry(Sample& sample, int d, Random& random, float* entry) {
    const uint64_t total = sample.total();
    if (total == 0) {
        read_any(sample, random, entry);
        return;
    }
    float candidates[kKmeansCandidates * kMaxSubvector];
    for (int c = 0; c < kKmeansCandidates; ++c) {
        sample.read(sample.find(random.below(total)), candidates + c * d);
    }
    sample.consider(candidates, kKmeansCandidates);
    int best = 0;
    for (int c = 1; c < kKmeansCandidates; ++c) {
        if (sample.left(c) < sample.left(best)) best = c;
    }
    sample.accept(best);
    std::copy_n(candidates + best * d, d, entry);
}

}  // namespace

Status kmeans_seed(const KmeansProblem* problems, int64_t count, int64_t entries, int d,
                   KmeansInit init, int64_t seed, float* codebook, int threads) try {
    if (count < 1 || !valid_entries(entries) || threads < 1) return Status::invalid_argument;
    for (int64_t b = 0; b < count; ++b) {
        if (!valid_points(problems[b], d)) return Status::invalid_argument;
    }
    const Points points{problems, count, d};
    const int64_t n = points.size();
    if (n < entries) return Status::invalid_argument;
    Random random(static_cast<uint64_t>(seed));
    if (init == KmeansInit::random) {
        const std::vector<int64_t> chosen = draw_strata(n, entries, random);
        for (int64_t k = 0; k < entries; ++k) {
            float h[kMaxSubvector];
            points.read(chosen[static_cast<size_t>(k)], codebook + k * d, h);
        }
        return Status::ok;
    }
    Sample sample(points, draw_sample(points, kmeans_sample_size(entries), random, threads),
                  threads);
    first_entry(sample, random, codebook);
    for (int64_t k = 1; k < entries; ++k) next_entry(sample, d, random, codebook + k * d);
    return Status::ok;
} catch (...) {
    return failure();
}

}  // namespace nowag::cpu
