// The search of k-means with points in lanes: entries come one at a time, broadcast, and leaves
// whose box is farther from every lane than its best so far are passed over. The best there is for
// few leaves, and for all of them. For kmeans_kernel.h.
#pragma once

#include "cpu/kmeans/kmeans_found.h"

namespace nowag::cpu {
namespace {

// The numbers 0 to kLeafEntries - 1, each in all lanes.
struct LeafIndex {
    int32_t value[kLeafEntries][kMaxLanes];
};
constexpr LeafIndex leaf_index() {
    LeafIndex table{};
    for (int e = 0; e < kLeafEntries; ++e) {
        for (int lane = 0; lane < kMaxLanes; ++lane) table.value[e][lane] = e;
    }
    return table;
}
alignas(64) constexpr LeafIndex kLeafIndex = leaf_index();

// Boxes with coordinate j times sqrt(h_j), so that distances in the position's metric are plain
// ones.
template <int D>
void frame_boxes(const KmeansLeaves& leaves, const float* root, const KmeansFrame& frame) {
    for (int j = 0; j < D; ++j) {
        const int64_t end = j * leaves.stride + leaves.first_branch;
        for (int64_t at = j * leaves.stride; at < end; at += Lanes::kWidth) {
            const Float factor = Lanes::all(root[j]);
            Lanes::store(frame.lower + at, Lanes::mul(Lanes::load(leaves.lower + at), factor));
            Lanes::store(frame.upper + at, Lanes::mul(Lanes::load(leaves.upper + at), factor));
        }
    }
}

template <int D>
struct Wide : Found<D> {
    using Found<D>::energy;
    using Found<D>::best;
    using Found<D>::second;
    using Found<D>::passed;

    Float scaled[D];  // -2 h x
    Float rooted[D];  // sqrt(h) x
    Int slot;

    Wide(const KmeansSlice& points, const float* root, int64_t i) : slot(Lanes::all_int(0)) {
        best = second = passed = Lanes::all(__builtin_inff());
        energy = Lanes::all(kTinyEnergy);
        for (int j = 0; j < D; ++j) {
            const Float x = Lanes::load(points.x + j * points.stride + i);
            scaled[j] = Lanes::mul(Lanes::all(-2.0f * points.h[j]), x);
            rooted[j] = Lanes::mul(Lanes::all(root[j]), x);
            energy = Lanes::fma(rooted[j], rooted[j], energy);
        }
    }

    void visit(const KmeansLeaves& leaves, const float* bias, int64_t leaf) {
        const float* c = leaves.c + leaf * D * kLeafEntries;
        const Float before = best;
        Int index = slot;
        for (int e = 0; e < kLeafEntries; ++e) {
            Float score = Lanes::all(bias[leaf * kLeafEntries + e]);
            for (int j = 0; j < D; ++j) {
                score = Lanes::fma(scaled[j], Lanes::all(c[j * kLeafEntries + e]), score);
            }
            const auto nearer = Lanes::less(score, best);
            index = Lanes::select(nearer, Lanes::load_int(kLeafIndex.value[e]), index);
            second = Lanes::min(Lanes::max(score, best), second);
            best = Lanes::min(score, best);
        }
        const Int first = Lanes::all_int(static_cast<int32_t>(leaf * kLeafEntries));
        slot = Lanes::select(Lanes::less(best, before), Lanes::add(first, index), slot);
    }

    Float box_distance(const KmeansLeaves& leaves, const KmeansFrame& in, int64_t leaf) const {
        Float sum = Lanes::all(0.0f);
        for (int j = 0; j < D; ++j) {
            const int64_t box = j * leaves.stride + leaf;
            const Float inside = Lanes::min(Lanes::max(rooted[j], Lanes::all(in.lower[box])),
                                            Lanes::all(in.upper[box]));
            const Float outside = Lanes::sub(rooted[j], inside);
            sum = Lanes::fma(outside, outside, sum);
        }
        return sum;
    }
};

// The distinct leaves of a vector of slots, ascending.
int64_t own_leaves(const uint16_t* slots, int64_t* own) {
    int64_t count = 0;
    for (int lane = 0; lane < Lanes::kWidth; ++lane) {
        const int64_t leaf = slots[lane] / kLeafEntries;
        if (count == 0 || leaf != own[count - 1]) own[count++] = leaf;
    }
    return count;
}

// Visits the points' own leaves, then those whose box is near enough.
template <int D>
void visit_near(Wide<D>& points, const uint16_t* slots, const KmeansLeaves& leaves,
                const KmeansFrame& in) {
    int64_t own[kMaxLanes + 1];
    const int64_t count = own_leaves(slots, own);
    own[count] = leaves.count;
    for (int64_t index = 0; index < count; ++index) points.visit(leaves, in.bias, own[index]);
    Float limit = points.limit();
    const int64_t* next = own;
    for (int64_t leaf = 0; leaf < leaves.count; ++leaf) {
        if (leaf == *next) {
            ++next;
            continue;
        }
        const Float distance = points.box_distance(leaves, in, leaf);
        if (Lanes::bits(Lanes::not_greater(distance, limit)) == 0) {
            points.passed = Lanes::min(points.passed, distance);
            continue;
        }
        points.visit(leaves, in.bias, leaf);
        limit = points.limit();
    }
}

template <int D>
void search_wide(const KmeansSlice& points, const KmeansLeaves& leaves, const KmeansFrame& in,
                 const float* root, bool guided, uint16_t* best, float* gaps) {
    for (int64_t i = 0; i < points.count; i += Lanes::kWidth) {
        Wide<D> found(points, root, i);
        if (guided) {
            visit_near(found, points.slots + i, leaves, in);
        } else {
            for (int64_t leaf = 0; leaf < leaves.count; ++leaf) found.visit(leaves, in.bias, leaf);
        }
        Lanes::store_codes(best + i, found.slot);
        finish<D>(found, points, leaves, in.bias, i, best, gaps);
    }
}

}  // namespace
}  // namespace nowag::cpu
