// The sample of k-means++ (kmeans.h): half uniform, half proportional to energy, so that the few
// points that carry most of the energy are not missed.
#include "cpu/kmeans/kmeans_sample.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/base/parallel.h"

namespace nowag::cpu {
namespace {

constexpr float kMostEnergy = std::numeric_limits<float>::max();

// sum_j h_j x_j^2 of every point, j ascending. Never NaN, negative or infinite: where the sample is
// looked for follows from sums of these.
std::vector<float> energies(const Points& points, int threads) {
    std::vector<float> energy(static_cast<size_t>(points.size()));
    float* out = energy.data();
    for (int64_t b = 0; b < points.count; ++b) {
        const KmeansProblem& problem = points.problems[b];
        const int64_t positions = positions_of(problem, points.d);
        parallel_for(problem.rows, threads, [&](int64_t row) {
            for (int64_t p = 0; p < positions; ++p) {
                const int64_t first = p * points.d, end = std::min(first + points.d, problem.cols);
                float sum = 0.0f;
                for (int64_t j = first; j < end; ++j) {
                    const float x = problem.w[row * problem.cols + j];
                    sum += problem.h[j] * x * x;
                }
                out[row * positions + p] = sum > 0 ? std::min(sum, kMostEnergy) : 0.0f;
            }
        });
        out += problem.rows * positions;
    }
    return energy;
}

// The total mass cut into as many strata as points are wanted.
class Strata {
  public:
    Strata(uint64_t total, int64_t wanted)
        : step_(total / static_cast<uint64_t>(wanted)),
          longer_(total % static_cast<uint64_t>(wanted)) {}

    uint64_t border(int64_t s) const {
        const uint64_t stratum = static_cast<uint64_t>(s);
        return stratum * step_ + std::min(stratum, longer_);
    }

    uint64_t target(int64_t s, const Random& random) const {
        return border(s) + random.ahead(s, border(s + 1) - border(s));
    }

    // The stratum in which `mass` lies, less than the total.
    int64_t holding(uint64_t mass) const {
        const uint64_t in_longer = longer_ * (step_ + 1);
        return static_cast<int64_t>(mass < in_longer ? mass / (step_ + 1)
                                                     : (mass - longer_) / step_);
    }

  private:
    uint64_t step_, longer_;
};

int bit_length(int64_t n) {
    int bits = 0;
    for (; n > 0; n >>= 1) ++bits;
    return bits;
}

// What each point weighs when the sample is drawn.
class Masses {
  public:
    Masses(const Points& points, int threads) : energy_(energies(points, threads)) {
        const int64_t n = size();
        int exponent = 0;
        std::frexp(largest(threads), &exponent);
        scale_ = std::ldexp(1.0, kEnergyBits - exponent - bit_length(n));
        before_.resize(static_cast<size_t>(chunks()) + 1);
        parallel_for(chunks(), threads, [&](int64_t chunk) {
            uint64_t sum = 0;
            for (int64_t i = begin(chunk); i < begin(chunk + 1); ++i) sum += energy(i);
            before_[static_cast<size_t>(chunk) + 1] = sum;
        });
        for (size_t chunk = 1; chunk < before_.size(); ++chunk) {
            before_[chunk] += before_[chunk - 1];
        }
        even_ = std::max<uint64_t>(1, before_.back() / static_cast<uint64_t>(n));
        for (int64_t chunk = 0; chunk <= chunks(); ++chunk) {
            before_[static_cast<size_t>(chunk)] += static_cast<uint64_t>(begin(chunk)) * even_;
        }
    }

    int64_t size() const { return static_cast<int64_t>(energy_.size()); }

    // One point a stratum: which one does not depend on how points are cut into chunks.
    std::vector<Drawn> draw(int64_t wanted, const Random& random, int threads) const {
        const uint64_t total = before_.back();
        const Strata strata(total, wanted);
        std::vector<Drawn> drawn(static_cast<size_t>(wanted));
        parallel_for(chunks(), threads, [&](int64_t chunk) {
            uint64_t passed = before_[static_cast<size_t>(chunk)];
            const uint64_t end = before_[static_cast<size_t>(chunk) + 1];
            int64_t index = begin(chunk);
            for (int64_t s = strata.holding(passed); s < wanted; ++s) {
                const uint64_t target = strata.target(s, random);
                if (target >= end) break;
                if (target < passed) continue;  // the first stratum, drawn in the chunk before
                while (target - passed >= mass(index)) passed += mass(index++);
                const double share = static_cast<double>(mass(index)) * static_cast<double>(wanted);
                drawn[static_cast<size_t>(s)] = {
                    index, static_cast<float>(static_cast<double>(total) / share)};
            }
        });
        return drawn;
    }

  private:
    static constexpr int kEnergyBits = 60;   // the sum of all energies is below 2^60
    static constexpr int64_t kChunk = 4096;  // points that a thread takes at a time

    int64_t chunks() const { return ceil_div(size(), kChunk); }
    int64_t begin(int64_t chunk) const { return std::min(chunk * kChunk, size()); }

    float largest(int threads) const {
        std::vector<float> most(static_cast<size_t>(chunks()));
        parallel_for(chunks(), threads, [&](int64_t chunk) {
            most[static_cast<size_t>(chunk)] = *std::max_element(
                energy_.begin() + begin(chunk), energy_.begin() + begin(chunk + 1));
        });
        return *std::max_element(most.begin(), most.end());
    }

    uint64_t energy(int64_t i) const {
        return static_cast<uint64_t>(
            fixed_point(static_cast<double>(energy_[static_cast<size_t>(i)]) * scale_));
    }

    uint64_t mass(int64_t i) const { return energy(i) + even_; }

    std::vector<float> energy_;
    std::vector<uint64_t> before_;  // mass of the chunks before each one; the last is the total
    double scale_ = 1.0;
    uint64_t even_ = 1;
};

}  // namespace

std::vector<Drawn> draw_sample(const Points& points, int64_t wanted, Random& random, int threads) {
    const int64_t n = points.size();
    if (n <= wanted) {
        std::vector<Drawn> all;
        for (int64_t i = 0; i < n; ++i) all.push_back({i, 1.0f});
        return all;
    }
    std::vector<Drawn> drawn = Masses(points, threads).draw(wanted, random, threads);
    random.skip(wanted);
    return drawn;
}

}  // namespace nowag::cpu
