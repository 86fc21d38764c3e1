// The search of k-means with entries in lanes, one point at a time: the score of its previous entry
// bounds how far to look, boxes of branches and then of leaves say where, and few leaves are left
// to visit. The best there is for many leaves. For kmeans_kernel.h.
//
// How many boxes are near differs from point to point, and a loop of a length that was only just
// computed stalls the processor. So each step is done for a batch of points before the next one.
#pragma once

#include "cpu/kmeans_found.h"

namespace nowag::cpu {
namespace {

constexpr int kBatch = kMaxLanes;

template <int D>
struct Batch {
    float scaled[D][kBatch];  // -2 h x
    float rooted[D][kBatch];  // sqrt(h) x
    float energy[kBatch];
    float limit[kBatch];                  // squared distance within which boxes are near
    float passed[kBatch][Lanes::kWidth];  // squared distances of boxes passed over: the smallest
    int64_t branches[kBatch], leaves[kBatch];            // lengths of the lists of near ones
    float best[kBatch], second[kBatch], beyond[kBatch];  // what was found: beyond of `passed`
};

template <int D>
Found<D> found_in(const Batch<D>& batch, int lane) {
    return {Lanes::load(batch.energy + lane), Lanes::load(batch.best + lane),
            Lanes::load(batch.second + lane), Lanes::load(batch.beyond + lane)};
}

// Points [i, i + kBatch): everything that is done with points in lanes.
template <int D>
void start(const KmeansSlice& points, const KmeansLeaves& leaves, const KmeansFrame& in,
           const float* root, int64_t i, Batch<D>& batch) {
    int32_t slots[kBatch], places[kBatch];
    for (int lane = 0; lane < kBatch; ++lane) {
        const int32_t slot = points.slots[i + lane];
        slots[lane] = slot;
        places[lane] = slot / kLeafEntries * (D * kLeafEntries) + slot % kLeafEntries;
    }
    for (int lane = 0; lane < kBatch; lane += Lanes::kWidth) {
        Float energy = Lanes::all(kTinyEnergy);
        Float score = Lanes::gather(in.bias, Lanes::load_int(slots + lane));
        const Int place = Lanes::load_int(places + lane);
        for (int j = 0; j < D; ++j) {
            const Float x = Lanes::load(points.x + j * points.stride + i + lane);
            const Float scaled = Lanes::mul(Lanes::all(-2.0f * points.h[j]), x);
            const Float rooted = Lanes::mul(Lanes::all(root[j]), x);
            Lanes::store(batch.scaled[j] + lane, scaled);
            Lanes::store(batch.rooted[j] + lane, rooted);
            energy = Lanes::fma(rooted, rooted, energy);
            score = Lanes::fma(scaled, Lanes::gather(leaves.c + j * kLeafEntries, place), score);
        }
        Lanes::store(batch.energy + lane, energy);
        Lanes::store(batch.limit + lane, Found<D>{energy, score, score, score}.limit());
    }
}

// Appends those of 16 boxes from column `box` to a list that are within the limit, numbered from
// `first` on.
template <int D>
int64_t choose(const KmeansLeaves& leaves, const KmeansFrame& in, Batch<D>& batch, int lane,
               int64_t box, int32_t first, int32_t* list, int64_t count) {
    const Float limit = Lanes::all(batch.limit[lane]);
    Float passed = Lanes::load(batch.passed[lane]);
    for (int part = 0; part < kBranchLeaves; part += Lanes::kWidth) {
        Float sum = Lanes::all(0.0f);
        for (int j = 0; j < D; ++j) {
            const Float x = Lanes::all(batch.rooted[j][lane]);
            const int64_t at = j * leaves.stride + box + part;
            const Float inside =
                Lanes::min(Lanes::max(x, Lanes::load(in.lower + at)), Lanes::load(in.upper + at));
            const Float outside = Lanes::sub(x, inside);
            sum = Lanes::fma(outside, outside, sum);
        }
        const auto near = Lanes::not_greater(sum, limit);
        passed = Lanes::min(Lanes::select(near, passed, sum), passed);
        count = Lanes::append(list, count, near, first + part);
    }
    Lanes::store(batch.passed[lane], passed);
    return count;
}

template <int D>
void choose_branches(const KmeansLeaves& leaves, const KmeansFrame& in, Batch<D>& batch) {
    for (int lane = 0; lane < kBatch; ++lane) {
        Lanes::store(batch.passed[lane], Lanes::all(__builtin_inff()));
        int64_t count = 0;
        for (int64_t b = 0; b < leaves.branches; b += kBranchLeaves) {
            count =
                choose(leaves, in, batch, lane, leaves.first_branch + b, static_cast<int32_t>(b),
                       in.near_branches + lane * in.branch_room, count);
        }
        batch.branches[lane] = count;
    }
}

template <int D>
void choose_leaves(const KmeansLeaves& leaves, const KmeansFrame& in, Batch<D>& batch) {
    for (int lane = 0; lane < kBatch; ++lane) {
        const int32_t* near = in.near_branches + lane * in.branch_room;
        int64_t count = 0;
        for (int64_t b = 0; b < batch.branches[lane]; ++b) {
            const int32_t first = near[b] * kBranchLeaves;
            count = choose(leaves, in, batch, lane, first, first,
                           in.near_leaves + lane * in.leaf_room, count);
        }
        batch.leaves[lane] = count;
    }
}

// Visits the near leaves of one point. Returns the slot of the lowest score, which goes to
// batch.best; the next score goes to batch.second, the same if two entries share the lowest.
template <int D>
uint16_t visit(const KmeansLeaves& leaves, const KmeansFrame& in, Batch<D>& batch, int lane) {
    const int32_t* near = in.near_leaves + lane * in.leaf_room;
    Float scaled[D];
    for (int j = 0; j < D; ++j) scaled[j] = Lanes::all(batch.scaled[j][lane]);
    Float best = Lanes::all(__builtin_inff()), second = best;
    Int first = Lanes::all_int(0);  // slot of each lane's best, less the lane
    for (int64_t index = 0; index < batch.leaves[lane]; ++index) {
        for (int part = 0; part < kLeafEntries; part += Lanes::kWidth) {
            const int32_t slot = near[index] * kLeafEntries + part;
            const float* c = leaves.c + near[index] * (D * kLeafEntries) + part;
            Float score = Lanes::load(in.bias + slot);
            for (int j = 0; j < D; ++j) {
                score = Lanes::fma(scaled[j], Lanes::load(c + j * kLeafEntries), score);
            }
            first = Lanes::select(Lanes::less(score, best), Lanes::all_int(slot), first);
            second = Lanes::min(Lanes::max(score, best), second);
            best = Lanes::min(score, best);
        }
    }
    const float lowest = Lanes::lowest(best);
    const auto winners = Lanes::equal(best, Lanes::all(lowest));
    const uint32_t lanes = Lanes::bits(winners);
    const bool shared = (lanes & (lanes - 1)) != 0;
    batch.best[lane] = lowest;
    batch.second[lane] = shared ? lowest : Lanes::lowest(Lanes::select(winners, second, best));
    batch.beyond[lane] = Lanes::lowest(Lanes::load(batch.passed[lane]));
    uint16_t slots[kMaxLanes];
    Lanes::store_codes(slots, first);
    const int winner = lanes == 0 ? 0 : __builtin_ctz(lanes);
    return static_cast<uint16_t>(slots[winner] + winner);
}

template <int D>
void search_deep(const KmeansSlice& points, const KmeansLeaves& leaves, const KmeansFrame& in,
                 const float* root, uint16_t* best, float* gaps) {
    Batch<D> batch;
    for (int64_t i = 0; i < points.count; i += kBatch) {
        start(points, leaves, in, root, i, batch);
        choose_branches(leaves, in, batch);
        choose_leaves(leaves, in, batch);
        for (int lane = 0; lane < kBatch; ++lane) best[i + lane] = visit(leaves, in, batch, lane);
        for (int lane = 0; lane < kBatch; lane += Lanes::kWidth) {
            finish<D>(found_in(batch, lane), points, leaves, in.bias, i + lane, best, gaps);
        }
    }
}

}  // namespace
}  // namespace nowag::cpu
