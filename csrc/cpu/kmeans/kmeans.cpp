// Threads, layout and bookkeeping of the assignment; kmeans_kernel.h has the arithmetic.
//
// A unit of work is a tile: kTilePositions positions of a block of rows. Points whose gap outlasts
// the latest moves of the codebook are passed over; the others are collected position by position,
// ordered by the leaf of their previous entry, and searched.
#include "nowag/kmeans.h"

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "cpu/base/buffer.h"
#include "cpu/base/failure.h"
#include "cpu/base/parallel.h"
#include "cpu/base/simd.h"
#include "cpu/kmeans/kmeans_points.h"
#include "cpu/kmeans/kmeans_search.h"
#include "cpu/kmeans/kmeans_table.h"
#include "cpu/kmeans/kmeans_tree.h"

namespace nowag::cpu {
namespace {

// Bounds of the rows of a tile: enough to pay for the frames of its positions, few enough that
// their weights stay in the second-level cache and that a row's number fits beside a slot.
constexpr int kRowBits = 12;
constexpr int64_t kLeastRows = 256, kMostRows = 1 << kRowBits;
constexpr int64_t kEntriesPerRow = 8;
constexpr int64_t kTilesPerThread = 4;
// Rows of W are asked for before they are packed: hardware does not see them coming.
constexpr int64_t kRowsAhead = 8;
// Weights of a tile are addressed by 32-bit offsets from its first.
constexpr int64_t kMostOffset = int64_t{1} << 30;
static_assert(kRowBits + kMaxCodeBits <= 32, "a key is 32 bits");

int64_t pad_lanes(int64_t count) { return ceil_div(count, kMaxLanes) * kMaxLanes; }

// A point to be searched at a known position: its previous entry's slot, its row in the tile.
using Key = uint32_t;
Key make_key(uint16_t slot, int64_t row) {
    return static_cast<uint32_t>(slot) << kRowBits | static_cast<uint32_t>(row);
}
uint16_t slot_of(Key key) { return static_cast<uint16_t>(key >> kRowBits); }
int32_t row_of(Key key) { return static_cast<int32_t>(key & ((1u << kRowBits) - 1u)); }

// What one thread works with, and what it adds up for its points of `problem`: integers, so that
// the sum of all threads does not depend on who had which point.
struct Worker {
    Buffer<float> tile, bias, lower, upper, drift, x, gaps;
    Buffer<uint16_t> slots, best, near_entries;
    Buffer<uint32_t> leaf_ends;
    Buffer<int32_t> rows, grid_entries, grid_boxes, near_branches, near_leaves;
    Buffer<Key> keys[kTilePositions];
    int64_t key_count[kTilePositions];
    Buffer<int64_t> sums;
    const KmeansProblem* problem = nullptr;
    int64_t changed = 0;
};

class Assignment;
using Assignments = std::vector<std::unique_ptr<const Assignment>>;

class Assignment {
  public:
    Assignment(const KmeansProblem& problem, int64_t entries, int d, double scale, bool warm,
               KmeansStart start, int threads)
        : problem_(problem),
          entries_(entries),
          d_(d),
          scale_(scale),
          warm_(warm),
          start_(start),
          positions_(positions_of(problem, d)),
          tree_(problem.codebook, entries, d, mean_metric().data(), threads),
          leaves_(tree_.leaves()),
          moves_(moves()),
          threads_(threads) {}

    // A worker's memory, for any of these problems: their codebooks are of one size.
    static void allocate(Worker& worker, const Assignments& all) {
        const Assignment& first = *all.front();
        const KmeansLeaves& leaves = first.leaves_;
        const int d = first.d_;
        int64_t rows = 0, drift = 0, sums = 0;
        for (const auto& assignment : all) {
            rows = std::max(rows, assignment->block_rows());
            drift = std::max(drift, assignment->drift_size());
            sums = std::max(sums, assignment->sums_size());
        }
        const int64_t points = pad_lanes(rows), slots = leaves.count * kLeafEntries;
        worker.tile = buffer<float>(kTilePositions * first.plane(rows) + kCollectSlack);
        worker.bias = buffer<float>(slots);
        worker.lower = buffer<float>(leaves.stride * d);
        worker.upper = buffer<float>(leaves.stride * d);
        worker.leaf_ends = buffer<uint32_t>(leaves.count);
        if (first.many()) {
            const int64_t pairs = ceil_div(d, 2);
            worker.grid_entries = buffer<int32_t>(slots * pairs);
            worker.grid_boxes = buffer<int32_t>(2 * leaves.stride * pairs);
            worker.near_branches = buffer<int32_t>(kMaxLanes * (leaves.branches + 1));
            worker.near_leaves = buffer<int32_t>(kMaxLanes * (leaves.count + 1));
            worker.near_entries = buffer<uint16_t>(kMaxLanes * (leaves.count + 1));
        }
        worker.x = buffer<float>(points * d);
        worker.gaps = buffer<float>(points);
        worker.slots = buffer<uint16_t>(points);
        worker.best = buffer<uint16_t>(points);
        worker.rows = buffer<int32_t>(points);
        for (Buffer<Key>& keys : worker.keys) keys = buffer<Key>(points);
        worker.drift = buffer<float>(drift);
        worker.sums = buffer<int64_t>(sums);
    }

    int64_t run(std::vector<Worker>& workers) const {
        const int64_t height = block_rows(), blocks = ceil_div(problem_.rows, height);
        try {
            parallel_for(tiles() * blocks, threads_, [&](int64_t item) {
                Worker& worker = workers[static_cast<size_t>(omp_get_thread_num())];
                if (worker.problem != &problem_) begin(worker);
                const int64_t first = item % blocks * height;
                assign_tile(worker, item / blocks * kTilePositions, first,
                            std::min(problem_.rows, first + height));
            });
        } catch (...) {
            // What was settled stays so: sums are again those of the codes.
            if (warm_) gather(workers);
            throw;
        }
        return gather(workers);
    }

  private:
    // Weighs the coordinates of the tree; not part of any result.
    std::vector<float> mean_metric() const {
        std::vector<float> mean(static_cast<size_t>(d_), 0.0f);
        for (int64_t j = 0; j < positions_ * d_; ++j) {
            mean[static_cast<size_t>(j % d_)] += problem_.h[j];
        }
        return mean;
    }

    bool many() const { return leaves_.count >= kManyLeaves; }

    bool tracking() const {
        return warm_ && !many() && problem_.gaps != nullptr && problem_.previous != nullptr;
    }

    // [d, K]: how far each entry moved along each coordinate since the gaps were taken.
    std::vector<float> moves() const {
        std::vector<float> moves;
        if (!tracking()) return moves;
        moves.resize(static_cast<size_t>(entries_ * d_));
        for (int64_t k = 0; k < entries_; ++k) {
            for (int j = 0; j < d_; ++j) {
                const int64_t from = k * d_ + j;
                moves[static_cast<size_t>(j * entries_ + k)] =
                    problem_.codebook[from] - problem_.previous[from];
            }
        }
        return moves;
    }

    int64_t drift_size() const { return tracking() ? kTilePositions * entries_ : 0; }
    int64_t sums_size() const { return problem_.sums == nullptr ? 0 : entries_ * (2 * d_ + 1); }
    int64_t tiles() const { return ceil_div(positions_, kTilePositions); }

    // Rows of a tile.
    int64_t block_rows() const {
        const int64_t fewest = ceil_div(problem_.rows, kMostRows);
        const int64_t wanted = std::max(ceil_div(threads_ * kTilesPerThread, tiles()), fewest);
        const int64_t least = std::max(kLeastRows, entries_ / kEntriesPerRow);
        const int64_t blocks = std::clamp<int64_t>(problem_.rows / least, fewest, wanted);
        return std::clamp<int64_t>(kMostOffset / problem_.cols, 1, ceil_div(problem_.rows, blocks));
    }

    // On the worker's own thread, which so has the memory near it.
    void begin(Worker& worker) const {
        std::fill_n(worker.sums.get(), sums_size(), int64_t{0});
        worker.changed = 0;
        worker.problem = &problem_;
    }

    // Floats from one point of the tile to the next: a power of two, so that none crosses a line.
    int64_t point_stride() const {
        int64_t stride = 1;
        while (stride < d_) stride *= 2;
        return stride;
    }

    // Floats from one position of the tile to the next: an odd number of lines, or they would all
    // be in the same sets of the caches.
    int64_t plane(int64_t rows) const {
        constexpr int64_t kLine = 16;
        return (ceil_div(rows * point_stride(), kLine) | 1) * kLine;
    }

    void assign_tile(Worker& worker, int64_t first, int64_t row_begin, int64_t row_end) const {
        const int count = static_cast<int>(std::min<int64_t>(kTilePositions, positions_ - first));
        collect_keys(worker, first, count, row_begin, row_end);
        pack_tile(worker, first, count, row_begin, row_end);
        for (int p = 0; p < count; ++p) {
            if (worker.key_count[p] > 0) {
                assign_position(worker, first, p, row_begin, row_end - row_begin);
            }
        }
    }

    // The points to be searched, position by position: rows of W lie so far apart that what is read
    // of them once is not in a cache any more for the next position.
    void pack_tile(Worker& worker, int64_t first, int count, int64_t row_begin,
                   int64_t row_end) const {
        switch (point_stride()) {
            case 1:
                return pack_points<1>(worker, first, count, row_begin, row_end);
            case 2:
                return pack_points<2>(worker, first, count, row_begin, row_end);
            case 4:
                return pack_points<4>(worker, first, count, row_begin, row_end);
            default:
                return pack_points<8>(worker, first, count, row_begin, row_end);
        }
    }

    template <int64_t kStride>
    void pack_points(Worker& worker, int64_t first, int count, int64_t row_begin,
                     int64_t row_end) const {
        const int64_t rows = row_end - row_begin, to_next = plane(rows);
        const float* matrix_end = problem_.w + problem_.rows * problem_.cols;
        const auto pack = [&](int64_t row, int p) {
            const int64_t left = problem_.cols - (first + p) * d_;  // in the row
            const float* from = problem_.w + (row_begin + row + 1) * problem_.cols - left;
            float* to = worker.tile.get() + p * to_next + row * kStride;
            if (d_ <= left && kStride <= matrix_end - from) {
                std::memcpy(to, from, kStride * sizeof(float));
            } else {
                for (int j = 0; j < d_; ++j) to[j] = j < left ? from[j] : 0.0f;
            }
        };
        const int64_t wanted =
            std::accumulate(worker.key_count, worker.key_count + count, int64_t{0});
        if (2 * wanted < rows * count) {
            for (int p = 0; p < count; ++p) {
                for (int64_t i = 0; i < worker.key_count[p]; ++i) {
                    pack(row_of(worker.keys[p][static_cast<size_t>(i)]), p);
                }
            }
            return;
        }
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t coming = row_begin + std::min(row + kRowsAhead, rows - 1);
            const float* ahead = problem_.w + coming * problem_.cols + first * d_;
            for (int j = 0; j < count * d_; j += 16) __builtin_prefetch(ahead + j);
            for (int p = 0; p < count; ++p) pack(row, p);
        }
    }

    // Keys of the points whose gap is spent; of all points if gaps are not tracked.
    void collect_keys(Worker& worker, int64_t first, int count, int64_t row_begin,
                      int64_t row_end) const {
        std::fill_n(worker.key_count, count, 0);
        for (int p = 0; tracking() && p < count; ++p) {
            kmeans_table().drift(moves_.data(), entries_, problem_.h + (first + p) * d_, d_,
                                 worker.drift.get() + p * entries_);
        }
        for (int64_t row = row_begin; row < row_end; ++row) {
            const int64_t point = row * positions_ + first;
            // Rows lie too far apart for the CPU to fetch them ahead on its own.
            const int64_t ahead = std::min(row + kRowsAhead, row_end - 1) * positions_ + first;
            __builtin_prefetch(problem_.codes + ahead, 1);
            const uint16_t* codes = problem_.codes + point;
            uint32_t spent = (1u << count) - 1u;
            if (tracking()) {
                __builtin_prefetch(problem_.gaps + ahead, 1);
                spent = kmeans_table().shrink(codes, worker.drift.get(), entries_, count,
                                              problem_.gaps + point);
            }
            for (; spent != 0; spent &= spent - 1) {
                const int p = __builtin_ctz(spent);
                const uint16_t slot = warm_ ? tree_.slots()[codes[p]] : uint16_t{0};
                worker.keys[p][static_cast<size_t>(worker.key_count[p]++)] =
                    make_key(slot, row - row_begin);
            }
        }
    }

    // Assigns the collected points of position first + p.
    void assign_position(Worker& worker, int64_t first, int p, int64_t row_begin,
                         int64_t rows) const {
        const int64_t position = first + p, count = worker.key_count[p], padded = pad_lanes(count);
        const float* h = problem_.h + position * d_;
        const KmeansFrame frame{worker.bias.get(),        worker.lower.get(),
                                worker.upper.get(),       worker.grid_entries.get(),
                                worker.grid_boxes.get(),  worker.near_branches.get(),
                                worker.near_leaves.get(), worker.near_entries.get()};
        order_points(worker, worker.keys[p].get(), count);
        kmeans_table().collect(worker.tile.get() + p * plane(rows), point_stride(),
                               worker.rows.get(), padded, d_, worker.x.get());
        const KmeansSlice points{worker.x.get(), h, worker.slots.get(), padded, padded};
        search_polling(points, leaves_, entries_, d_, start_, frame, worker.best.get(),
                       worker.gaps.get());
        store(worker, row_begin * positions_ + position, position, count, padded);
    }

    // Rows and slots in the order of the previous entries' leaves: neighbours then visit the same
    // leaves. Filled up with copies of the last.
    void order_points(Worker& worker, const Key* keys, int64_t count) const {
        uint32_t* ends = worker.leaf_ends.get();
        std::fill_n(ends, leaves_.count, 0u);
        for (int64_t i = 0; i < count; ++i) ++ends[slot_of(keys[i]) / kLeafEntries];
        std::partial_sum(ends, ends + leaves_.count, ends);
        for (int64_t i = count; i-- > 0;) {
            const uint32_t at = --ends[slot_of(keys[i]) / kLeafEntries];
            worker.slots[at] = slot_of(keys[i]);
            worker.rows[at] = row_of(keys[i]);
        }
        const size_t last = static_cast<size_t>(count - 1);
        for (size_t i = last + 1; i < static_cast<size_t>(pad_lanes(count)); ++i) {
            worker.slots[i] = worker.slots[last];
            worker.rows[i] = worker.rows[last];
        }
    }

    // Records what the search found; point 0 of the tile at this position is point `origin`.
    void store(Worker& worker, int64_t origin, int64_t position, int64_t count,
               int64_t stride) const {
        for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
            const int64_t point = origin + worker.rows[i] * positions_;
            if (problem_.gaps != nullptr && !many()) problem_.gaps[point] = worker.gaps[i];
            if (warm_ && worker.best[i] == worker.slots[i]) continue;
            const uint16_t entry = leaves_.entry[worker.best[i]];
            ++worker.changed;
            if (problem_.sums != nullptr) {
                const float* x = worker.x.get() + i;
                if (warm_) add(worker, position, x, stride, problem_.codes[point], -1.0);
                add(worker, position, x, stride, entry, 1.0);
            }
            problem_.codes[point] = entry;
        }
    }

    // sign: 1, or -1 to take the point out again.
    void add(Worker& worker, int64_t position, const float* x, int64_t stride, uint16_t entry,
             double sign) const {
        int64_t* sum = worker.sums.get() + entry * (2 * d_ + 1);
        const float* h = problem_.h + position * d_;
        for (int j = 0; j < d_; ++j) {
            const double weight = h[j];
            const double moment = weight * static_cast<double>(x[j * stride]);
            add_to(sum[j], fixed_point(sign * moment * scale_));
            add_to(sum[d_ + j], fixed_point(sign * weight * scale_));
        }
        add_to(sum[2 * d_], static_cast<int64_t>(sign));
    }

    int64_t gather(const std::vector<Worker>& workers) const {
        int64_t changed = 0;
        for (const Worker& worker : workers) {
            if (worker.problem != &problem_) continue;
            changed += worker.changed;
            for (int64_t i = 0; i < sums_size(); ++i) {
                add_to(problem_.sums[i], worker.sums[i]);
            }
        }
        return changed;
    }

    const KmeansProblem& problem_;
    const int64_t entries_;
    const int d_;
    const double scale_;
    const bool warm_;
    const KmeansStart start_;
    const int64_t positions_;
    const KmeansTree tree_;
    const KmeansLeaves leaves_;
    const std::vector<float> moves_;
    const int threads_;
};

Status assign(const KmeansProblem* problems, int64_t count, int64_t entries, int d, double scale,
              bool warm, KmeansStart start, int64_t* changed, int threads) try {
    if (count < 1 || !valid_entries(entries) || threads < 1) return Status::invalid_argument;
    for (int64_t b = 0; b < count; ++b) {
        const KmeansProblem& problem = problems[b];
        if (!valid_points(problem, d) || problem.codebook == nullptr || problem.codes == nullptr) {
            return Status::invalid_argument;
        }
    }
    // All memory, for all problems, before anything is written.
    Assignments assignments;
    for (int64_t b = 0; b < count; ++b) {
        assignments.push_back(std::make_unique<const Assignment>(problems[b], entries, d, scale,
                                                                 warm, start, threads));
    }
    std::vector<Worker> workers(static_cast<size_t>(threads));
    for (Worker& worker : workers) Assignment::allocate(worker, assignments);
    for (int64_t b = 0; b < count; ++b) changed[b] = assignments[b]->run(workers);
    return Status::ok;
} catch (...) {
    return failure();
}

}  // namespace

const KmeansTable& kmeans_table() {
#ifdef NOWAG_X86
    static const KmeansTable* const table = simd_pick(&kKmeansScalar, &kKmeansAvx2, &kKmeansAvx512,
                                                      static_cast<const KmeansTable*>(nullptr));
    return *table;
#else
    return kKmeansScalar;
#endif
}

Status kmeans_assign(const KmeansProblem* problems, int64_t count, int64_t entries, int d,
                     double scale, bool warm, int64_t* changed, int threads) {
    const KmeansStart start = warm ? KmeansStart::previous : KmeansStart::nothing;
    return assign(problems, count, entries, d, scale, warm, start, changed, threads);
}

Status kmeans_assign_exhaustive(const KmeansProblem* problems, int64_t count, int64_t entries,
                                int d, double scale, bool warm, int64_t* changed, int threads) {
    return assign(problems, count, entries, d, scale, warm, KmeansStart::exhaustive, changed,
                  threads);
}

}  // namespace nowag::cpu
