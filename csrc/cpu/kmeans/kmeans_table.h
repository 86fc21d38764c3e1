// What each instruction set provides for the k-means drivers.
#pragma once

#include <cstdint>

namespace nowag::cpu {

// Entries of a leaf: one vector of AVX-512.
constexpr int kLeafEntries = 16;

// Leaves of a branch, for the same reason.
constexpr int kBranchLeaves = 16;

// Positions that are taken together: 16 floats are a cache line, so that threads do not share one.
constexpr int kTilePositions = 16;

// From this many leaves on, points are searched one by one and gaps are not kept, which hardly ever
// hold among so many entries: measured.
constexpr int64_t kManyLeaves = 64;

// Points are padded to a multiple of this, the widest vector.
constexpr int kMaxLanes = 16;

constexpr int kCollectSlack = 8;

// A codebook cut into leaves of entries that are near each other, each in a box (kmeans_tree.h).
// Slot s is entry s % kLeafEntries of leaf s / kLeafEntries. Sixteen neighbouring leaves are a
// branch, in a box of its own.
struct KmeansLeaves {
    int64_t count;
    int64_t branches;       // ceil(count / kBranchLeaves)
    int64_t first_branch;   // column of the first branch's box: count padded to kBranchLeaves
    int64_t stride;         // of lower and upper: first_branch + branches, padded likewise
    const float* c;         // [count, d, kLeafEntries]
    const float* lower;     // [d, stride]: the boxes of leaves, then those of branches; what fills
    const float* upper;     // [d, stride]  up is of no account
    const float* least;     // [d]: the box of all entries
    const float* most;      // [d]
    const uint16_t* entry;  // [count * kLeafEntries]: slot -> entry
};

// Points of one position, coordinate by coordinate: x[j * stride + i]. The slot of each one's
// previous entry is non-decreasing, so that neighbours visit the same leaves.
struct KmeansSlice {
    const float* x;
    const float* h;  // the position's metric [d]
    const uint16_t* slots;
    int64_t stride;
    int64_t count;  // a multiple of kMaxLanes
};

// Where a search looks first: at the slots of KmeansSlice, or where it likes; `exhaustive`: it
// looks at every entry.
enum class KmeansStart { previous, nothing, exhaustive };

// Room for what the searches at one position share.
struct KmeansFrame {
    float* bias;   // [slots], of kmeans.h; infinity for slots that hold no entry
    float* lower;  // [d, stride]: the leaves' boxes in the position's metric
    float* upper;
    // For many leaves only. On the grid of kmeans_grid.h, coordinates in pairs: entries
    // [count, pairs, kLeafEntries] and, for every kBranchLeaves boxes,
    // [lower and upper, pairs, kBranchLeaves].
    int32_t* grid_entries;
    int32_t* grid_boxes;
    // Lists of all branches or leaves for each of kMaxLanes points, and a vector more.
    int32_t* near_branches;
    int32_t* near_leaves;
    uint16_t* near_entries;  // of each of near_leaves
};

struct KmeansTable {
    // x[j * count + i] = points[rows[i] * stride + j]; count is a multiple of kMaxLanes, and
    // kCollectSlack floats after the last point may be read.
    void (*collect)(const float* points, int64_t stride, const int32_t* rows, int64_t count, int d,
                    float* x);

    // What the searches of a position share: makes the frame for its metric h.
    void (*frame)(const KmeansLeaves& leaves, int64_t entries, int d, const float* h,
                  KmeansStart start, const KmeansFrame& frame);

    // best[i] = slot of the entry of the smallest score, the lowest entry among equals; gaps[i] =
    // a lower bound of how much nearer it is than any other (kmeans_found.h), if there are not many
    // leaves.
    void (*search)(const KmeansSlice& points, const KmeansLeaves& leaves, int d, KmeansStart start,
                   const KmeansFrame& frame, uint16_t* best, float* gaps);

    // drift[k] = an upper bound of how much nearer any other entry can have come to a point of
    // entry k at one position, given how far entries moved: moves[j * entries + k].
    void (*drift)(const float* moves, int64_t entries, const float* h, int d, float* drift);

    // One row of a tile of `count` positions: gaps shrink by drift[p * entries + code]. Returns the
    // positions, one a bit, at which nothing is left of them.
    uint32_t (*shrink)(const uint16_t* codes, const float* drift, int64_t entries, int count,
                       float* gaps);

    // The smallest merge cost (kmeans.h) of an entry of these weights with entries [begin, end) of
    // columns [d, entries]; infinity if there are none.
    float (*merge)(const float* columns, int64_t entries, int64_t begin, int64_t end,
                   const float* entry, const float* weights, int d);

    // One step of k-means++ on points [begin, end) of a sample: narrowed[i] is the smaller of
    // nearest[i] and the distance to `entry`; returns the sum of round(narrowed[i] * scale).
    // nearest and narrowed may be the same.
    uint64_t (*narrow)(const float* x, const float* h, int64_t stride, int64_t begin, int64_t end,
                       const float* entry, int d, double scale, const float* nearest,
                       float* narrowed);

    // y[j * stride + i] becomes the fma over columns c ascending, from itself, of
    // x[c * stride + i] * factor[c * factor_stride + j], for j < d and i < points, a multiple of
    // kMaxLanes.
    void (*rotate)(const float* x, int64_t stride, int64_t points, int64_t columns,
                   const float* factor, int64_t factor_stride, int d, float* y);
};

extern const KmeansTable kKmeansScalar, kKmeansAvx2, kKmeansAvx512;

// The table of the instruction set in use.
const KmeansTable& kmeans_table();

}  // namespace nowag::cpu
