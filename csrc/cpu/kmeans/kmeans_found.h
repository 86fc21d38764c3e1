// What a search of k-means knows about points, and how far rounding can mislead it. For
// kmeans_kernel.h: over Lanes, in an anonymous namespace.
//
//   u = 2^-24, X = sum h x^2, D2 = the exact squared distance of a point from an entry.
// The pinned score plus X is off from D2 by at most (2 d + 6) u (2 X + 2 sum h c^2), and
// sum h c^2 is at most 2 X + 2 D2: by less than noise(D2) = kappa (X + D2), kappa = 6 (2 d + 6) u.
// The squared distance from a box, in coordinates scaled by sqrt(h), is off by far less than that.
// An entry can thus only win, or tie, if its D2 <= best + X + 3 noise.
//
// The gap of a point is a lower bound of (distance from any other entry) - (distance from its own),
// less what scores need to be told apart: they differ in the order of the distances l > r if
// (l - r)(l + r) > noise(l^2) + noise(r^2), and while the gap, less all drifts since, is positive,
// l + r stays between the first r and twice the first l: so kappa (2 X / r + 2 l) is enough.
#pragma once

#include <cstdint>

#include "cpu/kmeans/kmeans_table.h"

namespace nowag::cpu {
namespace {

using Float = Lanes::Float;
using Int = Lanes::Int;

constexpr float kRound = 0x1p-24f;
constexpr float kTinyEnergy = 1e-30f;  // keeps noise above what underflow can do
constexpr float kFar = 1e30f;          // farther than anything
constexpr float kUp = 1.0f + 0x1p-20f, kDown = 1.0f - 0x1p-20f;

constexpr float kappa(int d) { return 6.0f * static_cast<float>(2 * d + 6) * kRound; }

// One vector of points.
template <int D>
struct Found {
    Float energy;        // X
    Float best, second;  // scores
    Float passed;        // smallest squared distance of a box passed over

    Float near() const { return Lanes::max(Lanes::add(best, energy), Lanes::all(0.0f)); }

    // The squared distance beyond which no entry can win or tie.
    Float limit() const {
        return Lanes::fma(near(), Lanes::all(1.0f + 3.0f * kappa(D)),
                          Lanes::mul(energy, Lanes::all(3.0f * kappa(D))));
    }

    Float noise(Float square) const {
        return Lanes::mul(Lanes::add(square, energy), Lanes::all(kappa(D)));
    }

    Float gap() const {
        const Float square = near();
        const Float own =
            Lanes::mul(Lanes::sqrt(Lanes::add(square, noise(square))), Lanes::all(kUp));
        Float others = Lanes::min(Lanes::add(second, energy), passed);
        others = Lanes::min(others, Lanes::all(kFar));
        others = Lanes::max(Lanes::sub(others, noise(others)), Lanes::all(0.0f));
        others = Lanes::mul(Lanes::sqrt(others), Lanes::all(kDown));
        const Float told = Lanes::mul(Lanes::add(Lanes::div(energy, own), others),
                                      Lanes::all(2.0f * kUp * kappa(D)));
        return Lanes::sub(Lanes::sub(others, own), told);
    }
};

// The slot of the lowest entry among those whose score is `best`, for point i alone.
template <int D>
uint16_t lowest_of_equal(const KmeansSlice& points, const KmeansLeaves& leaves, const float* bias,
                         int64_t i, float best) {
    Float scaled[D];
    for (int j = 0; j < D; ++j) {
        scaled[j] = Lanes::all((-2.0f * points.h[j]) * points.x[j * points.stride + i]);
    }
    int64_t lowest = -1;
    for (int64_t slot = 0; slot < leaves.count * kLeafEntries; slot += Lanes::kWidth) {
        const float* c = leaves.c + slot / kLeafEntries * D * kLeafEntries + slot % kLeafEntries;
        Float score = Lanes::load(bias + slot);
        for (int j = 0; j < D; ++j) {
            score = Lanes::fma(scaled[j], Lanes::load(c + j * kLeafEntries), score);
        }
        uint32_t equal = Lanes::bits(Lanes::equal(score, Lanes::all(best)));
        for (; equal != 0; equal &= equal - 1) {
            const int64_t tied = slot + __builtin_ctz(equal);
            if (lowest < 0 || leaves.entry[tied] < leaves.entry[lowest]) lowest = tied;
        }
    }
    return static_cast<uint16_t>(lowest < 0 ? 0 : lowest);
}

// Writes the gaps of points [i, i + kWidth), and settles their ties.
template <int D>
void finish(const Found<D>& found, const KmeansSlice& points, const KmeansLeaves& leaves,
            const float* bias, int64_t i, uint16_t* best, float* gaps) {
    Lanes::store(gaps + i, found.gap());
    uint32_t tied = Lanes::bits(Lanes::equal(found.best, found.second));
    if (tied == 0) return;
    float scores[Lanes::kWidth];
    Lanes::store(scores, found.best);
    for (; tied != 0; tied &= tied - 1) {
        const int lane = __builtin_ctz(tied);
        best[i + lane] = lowest_of_equal<D>(points, leaves, bias, i + lane, scores[lane]);
    }
}

}  // namespace
}  // namespace nowag::cpu
