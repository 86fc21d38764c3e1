// Entries, boxes and points of k-means on a grid, in pairs of 16-bit coordinates: a machine
// compares twice as many of them at a time as floats, and their distances are exact. For
// kmeans_kernel.h.
//
// A step of the grid is 1/s in the position's metric; coordinates of entries are 0 to kGridTop. A
// coordinate moves by at most half a step when it is rounded, so that the distance of a point from
// an entry is off by at most sqrt(d) steps. Boxes are those of the rounded entries: no rounding
// comes between a box and what is in it.
#pragma once

#include "cpu/kmeans/kmeans_found.h"

namespace nowag::cpu {
namespace {

// Squares of 8 coordinates, and of kGridFill in place of what is missing, add up to less than 2^31.
constexpr int32_t kGridTop = (1 << 13) - 1;
constexpr int32_t kGridFill = (1 << 14) - 1;  // farther from every point than any entry is

// Ranges of entries that a grid is made for, in the position's metric: squares neither vanish nor
// overflow.
constexpr float kLeastRange = 1e-15f, kMostRange = 1e15f;

constexpr int pairs_of(int d) { return (d + 1) / 2; }

template <int D>
struct Scale {
    float origin[D], factor[D];  // grid coordinate = (coordinate - origin) * factor
    float steps;                 // in a unit of the metric; 0 if there is no grid

    Scale(const KmeansLeaves& leaves, const float* root) : steps(0.0f) {
        float range = 0.0f;
        for (int j = 0; j < D; ++j) {
            origin[j] = leaves.least[j];
            const float extent = (leaves.most[j] - leaves.least[j]) * root[j];
            if (!(extent <= kMostRange)) return;
            range = extent > range ? extent : range;
        }
        if (!(range >= kLeastRange)) return;
        steps = static_cast<float>(kGridTop) / range;
        for (int j = 0; j < D; ++j) factor[j] = root[j] * steps;
    }

    Float place(int j, Float value) const {
        return Lanes::mul(Lanes::sub(value, Lanes::all(origin[j])), Lanes::all(factor[j]));
    }
};

// Pairs of grid coordinates of what lies at from + j * stride.
template <int D>
void to_grid(const Scale<D>& scale, const float* from, int64_t stride, Int (&out)[pairs_of(D)]) {
    for (int j = 0; j < D; j += 2) {
        const Int low = Lanes::nearest_int(scale.place(j, Lanes::load(from + j * stride)));
        const Int high =
            j + 1 < D ? Lanes::nearest_int(scale.place(j + 1, Lanes::load(from + (j + 1) * stride)))
                      : Lanes::all_int(0);
        out[j / 2] = Lanes::pair(low, high);
    }
}

// Where the lower bounds of box `box` are, the upper ones kPairs * kBranchLeaves behind them.
template <int D>
int32_t* grid_box(const KmeansFrame& in, int64_t box) {
    return in.grid_boxes + box / kBranchLeaves * (2 * pairs_of(D) * kBranchLeaves) +
           box % kBranchLeaves;
}

template <int D>
void frame_grid(const KmeansLeaves& leaves, int64_t entries, const Scale<D>& scale,
                const KmeansFrame& in) {
    constexpr int kPairs = pairs_of(D);
    constexpr int32_t kFill = kGridFill << 16 | kGridFill;
    Int grid[kPairs];
    for (int64_t leaf = 0; leaf < leaves.count; ++leaf) {
        int32_t* to = in.grid_entries + leaf * kPairs * kLeafEntries;
        for (int e = 0; e < kLeafEntries; e += Lanes::kWidth) {
            to_grid<D>(scale, leaves.c + leaf * D * kLeafEntries + e, kLeafEntries, grid);
            for (int q = 0; q < kPairs; ++q) Lanes::store_int(to + q * kLeafEntries + e, grid[q]);
        }
    }
    for (int64_t slot = entries; slot < leaves.count * kLeafEntries; ++slot) {
        int32_t* to = in.grid_entries + slot / kLeafEntries * kPairs * kLeafEntries;
        for (int q = 0; q < kPairs; ++q) to[q * kLeafEntries + slot % kLeafEntries] = kFill;
    }
    const auto missing = [&](int64_t box) {
        return box < leaves.first_branch ? box >= leaves.count
                                         : box >= leaves.first_branch + leaves.branches;
    };
    for (int64_t box = 0; box < leaves.stride; box += Lanes::kWidth) {
        int32_t* to = grid_box<D>(in, box);
        const float* const bounds[] = {leaves.lower, leaves.upper};
        for (const float* bound : bounds) {
            to_grid<D>(scale, bound + box, leaves.stride, grid);
            for (int q = 0; q < kPairs; ++q, to += kBranchLeaves) Lanes::store_int(to, grid[q]);
        }
    }
    for (int64_t box = 0; box < leaves.stride; ++box) {
        for (int q = 0; missing(box) && q < 2 * kPairs; ++q) {
            grid_box<D>(in, box)[q * kBranchLeaves] = kFill;
        }
    }
}

}  // namespace
}  // namespace nowag::cpu
