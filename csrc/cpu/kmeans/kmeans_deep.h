// The search of k-means with entries in lanes, one point at a time: the score of its previous entry
// (or of a guess) bounds how far to look, boxes of branches and then of leaves on a grid
// (kmeans_grid.h) say where, and few of the entries there are near enough on the grid to have their
// score taken. The best there is for many leaves. For kmeans_kernel.h.
//
// How much is near differs from point to point, and a loop of a length that was only just computed
// stalls the processor. So boxes are compared in one loop for a batch of points: over keys, each
// the number of a point in the batch and that of a branch.
#pragma once

#include "cpu/kmeans/kmeans_grid.h"

namespace nowag::cpu {
namespace {

constexpr int kBatch = kMaxLanes;
constexpr int kBranchBits = 16;  // of a key
constexpr int kFew = 32;         // entries: all of them are looked at

template <int D>
struct Batch {
    float scaled[D][kBatch];  // -2 h x
    float energy[kBatch];
    float score[kBatch];  // of the entry that a point starts with
    int32_t grid[pairs_of(D)][kBatch];
    float beyond[kBatch];        // squared distance on the grid from the point to its edge
    int32_t limit[kBatch];       // squared distance on the grid within which entries can win
    int64_t leaves_end[kBatch];  // where each point's part of the list of near leaves ends

    int64_t begin(int lane) const { return lane == 0 ? 0 : leaves_end[lane - 1]; }
};

// The squared distance on the grid within which an entry can win, or tie, against `score`. A point
// beyond the grid is moved to its edge, which brings it nearer to every entry by that much at
// least.
template <int D>
Int grid_limit(const Scale<D>& scale, Float energy, Float score, Float beyond) {
    // Between what entries and what fill values can be apart, whichever way it is rounded.
    constexpr float kMost = static_cast<float>(D) * (kGridTop + 0.5f) * (kGridTop + 0.5f);
    // Of the rounding to the grid, and of the coordinates before it.
    const Float slack = Lanes::all(__builtin_sqrtf(static_cast<float>(D)) * 1.01f);
    const Float reach = Found<D>{energy, score, score, score}.limit();
    Float square = Lanes::mul(reach, Lanes::all(scale.steps * scale.steps * kUp));
    square = Lanes::max(Lanes::fma(beyond, Lanes::all(-kDown), square), Lanes::all(0.0f));
    const Float radius = Lanes::fma(Lanes::sqrt(square), Lanes::all(kUp), slack);
    square = Lanes::mul(radius, Lanes::mul(radius, Lanes::all(kUp)));
    return Lanes::nearest_int(Lanes::min(square, Lanes::all(kMost)));
}

// Takes points [i, i + kBatch).
template <int D>
void place(const KmeansSlice& points, const Scale<D>& scale, int64_t i, Batch<D>& batch) {
    constexpr float kTop = static_cast<float>(kGridTop);
    for (int lane = 0; lane < kBatch; lane += Lanes::kWidth) {
        Float energy = Lanes::all(kTinyEnergy), beyond = Lanes::all(0.0f);
        Int grid[D + 1];
        grid[D] = Lanes::all_int(0);
        for (int j = 0; j < D; ++j) {
            const Float x = Lanes::load(points.x + j * points.stride + i + lane);
            const Float scaled = Lanes::mul(Lanes::all(-2.0f * points.h[j]), x);
            Lanes::store(batch.scaled[j] + lane, scaled);
            energy = Lanes::fma(Lanes::mul(Lanes::all(-0.5f), scaled), x, energy);
            const Float at = scale.place(j, x);
            const Float inside = Lanes::min(Lanes::max(at, Lanes::all(0.0f)), Lanes::all(kTop));
            const Float outside = Lanes::sub(at, inside);
            beyond = Lanes::fma(outside, outside, beyond);
            grid[j] = Lanes::nearest_int(inside);
        }
        for (int q = 0; q < pairs_of(D); ++q) {
            Lanes::store_int(batch.grid[q] + lane, Lanes::pair(grid[2 * q], grid[2 * q + 1]));
        }
        Lanes::store(batch.energy + lane, energy);
        // Finite, to be taken from what may not be; 0 is always right.
        const auto finite = Lanes::not_greater(beyond, Lanes::all(kFar));
        Lanes::store(batch.beyond + lane, Lanes::select(finite, beyond, Lanes::all(0.0f)));
    }
}

// How far to look, given an entry's slot for each point.
template <int D>
void bound(const KmeansLeaves& leaves, const KmeansFrame& in, const Scale<D>& scale,
           const uint16_t* slots, Batch<D>& batch) {
    int32_t slot[kBatch], place[kBatch];
    for (int lane = 0; lane < kBatch; ++lane) {
        slot[lane] = slots[lane];
        place[lane] = slot[lane] / kLeafEntries * (D * kLeafEntries) + slot[lane] % kLeafEntries;
        batch.leaves_end[lane] = 0;
    }
    for (int lane = 0; lane < kBatch; lane += Lanes::kWidth) {
        Float score = Lanes::gather(in.bias, Lanes::load_int(slot + lane));
        for (int j = 0; j < D; ++j) {
            const Float c =
                Lanes::gather(leaves.c + j * kLeafEntries, Lanes::load_int(place + lane));
            score = Lanes::fma(Lanes::load(batch.scaled[j] + lane), c, score);
        }
        Lanes::store(batch.score + lane, score);
        Lanes::store_int(batch.limit + lane,
                         grid_limit<D>(scale, Lanes::load(batch.energy + lane), score,
                                       Lanes::load(batch.beyond + lane)));
    }
}

// A point of the batch in all lanes.
template <int D>
struct GridPoint {
    Int at[pairs_of(D)];
    Int limit;

    GridPoint(const Batch<D>& batch, int lane) : limit(Lanes::all_int(batch.limit[lane])) {
        for (int q = 0; q < pairs_of(D); ++q) at[q] = Lanes::all_int(batch.grid[q][lane]);
    }

    // Squared distances of the boxes from column `box` on.
    Int boxes(const KmeansFrame& in, int64_t box) const {
        constexpr int kPairs = pairs_of(D);
        const int32_t* lower = grid_box<D>(in, box);
        const int32_t* upper = lower + kPairs * kBranchLeaves;
        Int sum = Lanes::all_int(0);
        for (int q = 0; q < kPairs; ++q) {
            const Int outside =
                Lanes::pair_outside(at[q], Lanes::load_int(lower + q * kBranchLeaves),
                                    Lanes::load_int(upper + q * kBranchLeaves));
            sum = Lanes::add(sum, Lanes::pair_squares(outside));
        }
        return sum;
    }

    // Squared distances of the entries from slot `slot` on.
    Int entries(const KmeansFrame& in, int64_t slot) const {
        const int32_t* entry = in.grid_entries +
                               slot / kLeafEntries * (pairs_of(D) * kLeafEntries) +
                               slot % kLeafEntries;
        Int sum = Lanes::all_int(0);
        for (int q = 0; q < pairs_of(D); ++q) {
            const Int apart = Lanes::pair_sub(at[q], Lanes::load_int(entry + q * kLeafEntries));
            sum = Lanes::add(sum, Lanes::pair_squares(apart));
        }
        return sum;
    }

    // Which entries of a leaf are near, one a bit.
    uint32_t near_entries(const KmeansFrame& in, int64_t leaf) const {
        uint32_t near = 0;
        for (int part = 0; part < kLeafEntries; part += Lanes::kWidth) {
            const Int squares = entries(in, leaf * kLeafEntries + part);
            near |= Lanes::bits(Lanes::at_most(squares, limit)) << part;
        }
        return near;
    }
};

// Which of `count` squared distances is the smallest; squares(i) are those from i on.
template <typename Squares>
int64_t nearest_of(int64_t count, const Squares& squares) {
    Int least = Lanes::all_int(INT32_MAX), from = Lanes::all_int(0);
    for (int64_t i = 0; i < count; i += Lanes::kWidth) {
        const Int square = squares(i);
        const auto nearer = Lanes::at_most(square, least);
        least = Lanes::select(nearer, square, least);
        from = Lanes::select(nearer, Lanes::all_int(static_cast<int32_t>(i)), from);
    }
    int32_t lanes[2][Lanes::kWidth];
    Lanes::store_int(lanes[0], least);
    Lanes::store_int(lanes[1], from);
    int best = 0;
    for (int lane = 1; lane < Lanes::kWidth; ++lane) {
        if (lanes[0][lane] < lanes[0][best]) best = lane;
    }
    return lanes[1][best] + best;
}

// An entry to start with, where there is no previous one: the nearest of the nearest leaf of the
// nearest branch. Boxes of entries that are not finite can be farther than what fills up a vector.
template <int D>
uint16_t guess(const KmeansLeaves& leaves, const KmeansFrame& in, const Batch<D>& batch, int lane) {
    const GridPoint<D> point(batch, lane);
    const auto at_most = [](int64_t index, int64_t last) { return index < last ? index : last; };
    const int64_t branch = nearest_of(
        leaves.branches, [&](int64_t b) { return point.boxes(in, leaves.first_branch + b); });
    const int64_t first = at_most(branch, leaves.branches - 1) * kBranchLeaves;
    const int64_t leaf =
        first + nearest_of(kBranchLeaves, [&](int64_t b) { return point.boxes(in, first + b); });
    const int64_t slot = at_most(leaf, leaves.count - 1) * kLeafEntries;
    return static_cast<uint16_t>(
        slot + nearest_of(kLeafEntries, [&](int64_t e) { return point.entries(in, slot + e); }));
}

template <int D>
int64_t choose_branches(const KmeansLeaves& leaves, const KmeansFrame& in, const Batch<D>& batch) {
    int64_t count = 0;
    for (int lane = 0; lane < kBatch; ++lane) {
        const GridPoint<D> point(batch, lane);
        for (int64_t b = 0; b < leaves.branches; b += Lanes::kWidth) {
            const Int squares = point.boxes(in, leaves.first_branch + b);
            count = Lanes::append(in.near_branches, count, Lanes::at_most(squares, point.limit),
                                  static_cast<int32_t>(lane << kBranchBits | b));
        }
    }
    return count;
}

template <int D>
void choose_leaves(const KmeansFrame& in, Batch<D>& batch, int64_t branches) {
    int64_t count = 0;
    for (int64_t index = 0; index < branches; ++index) {
        const int32_t key = in.near_branches[index];
        const int lane = key >> kBranchBits;
        const int32_t first = (key & ((1 << kBranchBits) - 1)) * kBranchLeaves;
        const GridPoint<D> point(batch, lane);
        for (int part = 0; part < kBranchLeaves; part += Lanes::kWidth) {
            const Int squares = point.boxes(in, first + part);
            count = Lanes::append(in.near_leaves, count, Lanes::at_most(squares, point.limit),
                                  first + part);
        }
        batch.leaves_end[lane] = count;
    }
}

// Counts the entries near to each point, and stores which they are, one a bit, by near leaf.
template <int D>
void count_entries(const KmeansFrame& in, const Batch<D>& batch, int (&near)[kBatch]) {
    int64_t index = 0;
    for (int lane = 0; lane < kBatch; ++lane) {
        const GridPoint<D> point(batch, lane);
        near[lane] = 0;
        for (; index < batch.leaves_end[lane]; ++index) {
            const uint32_t entries = point.near_entries(in, in.near_leaves[index]);
            in.near_entries[index] = static_cast<uint16_t>(entries);
            near[lane] += __builtin_popcount(entries);
        }
    }
}

// The slot of the lowest score so far of a point; of equals, that of the lowest entry.
template <int D>
struct Lowest {
    float scaled[D];
    float score;
    uint16_t slot;

    Lowest(const Batch<D>& batch, int lane, uint16_t start)
        : score(batch.score[lane]), slot(start) {
        for (int j = 0; j < D; ++j) scaled[j] = batch.scaled[j][lane];
    }

    // Takes those entries of a leaf whose bit is set.
    void take(const KmeansLeaves& leaves, const KmeansFrame& in, int64_t leaf, uint32_t entries) {
        for (; entries != 0; entries &= entries - 1) {
            const int e = __builtin_ctz(entries);
            const int64_t at = leaf * kLeafEntries + e;
            const float* c = leaves.c + leaf * (D * kLeafEntries) + e;
            float sum = in.bias[at];
            for (int j = 0; j < D; ++j) sum = __builtin_fmaf(scaled[j], c[j * kLeafEntries], sum);
            if (sum < score || (sum == score && leaves.entry[at] < leaves.entry[slot])) {
                score = sum;
                slot = static_cast<uint16_t>(at);
            }
        }
    }
};

template <int D>
uint16_t lowest_of_few(const KmeansLeaves& leaves, const KmeansFrame& in, const Batch<D>& batch,
                       int lane, uint16_t start) {
    Lowest<D> lowest(batch, lane, start);
    const int64_t end = batch.leaves_end[lane];
    for (int64_t first = batch.begin(lane); first < end; first += Lanes::kWidth) {
        const Int entries = Lanes::load_codes(in.near_entries + first);
        uint32_t any = Lanes::bits(Lanes::at_most(Lanes::all_int(1), entries));
        if (first + Lanes::kWidth > end) any &= (1u << (end - first)) - 1u;
        for (; any != 0; any &= any - 1) {
            const int64_t index = first + __builtin_ctz(any);
            lowest.take(leaves, in, in.near_leaves[index], in.near_entries[index]);
        }
    }
    return lowest.slot;
}

// The point started with an entry far away: what is found instead says again what is near.
template <int D>
uint16_t lowest_of_many(const KmeansLeaves& leaves, const KmeansFrame& in, const Scale<D>& scale,
                        const Batch<D>& batch, int lane, uint16_t start) {
    GridPoint<D> point(batch, lane);
    Lowest<D> lowest(batch, lane, start);
    for (int64_t index = batch.begin(lane); index < batch.leaves_end[lane]; ++index) {
        const int32_t leaf = in.near_leaves[index];
        lowest.take(leaves, in, leaf, point.near_entries(in, leaf));
        point.limit = grid_limit<D>(scale, Lanes::all(batch.energy[lane]), Lanes::all(lowest.score),
                                    Lanes::all(batch.beyond[lane]));
    }
    return lowest.slot;
}

template <int D>
void search_deep(const KmeansSlice& points, const KmeansLeaves& leaves, const KmeansFrame& in,
                 const Scale<D>& scale, bool guided, uint16_t* best) {
    Batch<D> batch;
    int near[kBatch];
    for (int64_t i = 0; i < points.count; i += kBatch) {
        place(points, scale, i, batch);
        for (int lane = 0; lane < kBatch; ++lane) {
            best[i + lane] = guided ? points.slots[i + lane] : guess(leaves, in, batch, lane);
        }
        bound(leaves, in, scale, best + i, batch);
        choose_leaves(in, batch, choose_branches(leaves, in, batch));
        count_entries(in, batch, near);
        int count = 0, chosen[kBatch];
        for (int lane = 0; lane < kBatch; ++lane) {
            chosen[count] = lane;
            count += near[lane] > 1;  // one is the entry that it started with
        }
        for (int c = 0; c < count; ++c) {
            const int lane = chosen[c];
            uint16_t& slot = best[i + lane];
            slot = near[lane] <= kFew ? lowest_of_few(leaves, in, batch, lane, slot)
                                      : lowest_of_many(leaves, in, scale, batch, lane, slot);
        }
    }
}

}  // namespace
}  // namespace nowag::cpu
