// The points that k-means++ chooses from, and the random numbers of seeding (kmeans.h).
#pragma once

#include <cstring>
#include <vector>

#include "cpu/kmeans/kmeans_points.h"

namespace nowag::cpu {

// splitmix64, started from the seed's hash.
class Random {
  public:
    explicit Random(uint64_t seed) : start_(mix(seed)) {}

    // The next number, uniform in [0, n), up to 2^-64 * n.
    uint64_t below(uint64_t n) {
        const uint64_t number = ahead(0, n);
        skip(1);
        return number;
    }

    // As below, of the number that comes after `skipped` others; draws none.
    uint64_t ahead(int64_t skipped, uint64_t n) const {
        const uint64_t number = static_cast<uint64_t>(drawn_ + skipped + 1);
        return static_cast<uint64_t>(
            (static_cast<unsigned __int128>(mix(start_ + number * kIncrement)) * n) >> 64);
    }

    void skip(int64_t count) { drawn_ += count; }

  private:
    static uint64_t mix(uint64_t bits) {
        bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
        bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
        return bits ^ (bits >> 31);
    }

    static constexpr uint64_t kIncrement = 0x9e3779b97f4a7c15u;
    uint64_t start_;
    int64_t drawn_ = 0;
};

struct Points {
    const KmeansProblem* problems;
    int64_t count;
    int d;

    int64_t size() const {
        int64_t total = 0;
        for (int64_t b = 0; b < count; ++b) total += points_of(problems[b], d);
        return total;
    }

    // Point number `index` of all problems: its coordinates and its metric.
    void read(int64_t index, float* x, float* h) const {
        const KmeansProblem* problem = problems;
        while (index >= points_of(*problem, d)) index -= points_of(*problem++, d);
        const int64_t positions = positions_of(*problem, d);
        read_point(*problem, index / positions, index % positions, d, x);
        std::memcpy(h, problem->h + index % positions * d, sizeof(float) * static_cast<size_t>(d));
    }
};

// A point of the sample and how many points it stands for.
struct Drawn {
    int64_t index;
    float weight;
};

// The sample of `wanted` points, or all of them.
std::vector<Drawn> draw_sample(const Points& points, int64_t wanted, Random& random, int threads);

}  // namespace nowag::cpu
