// Threads, layout and bookkeeping of error feedback. Rows are independent, so each thread takes a
// part of them through all positions of the block; what positions have in common, the entries in
// each one's metric and their trees, is made before.
#include "nowag/kmeans_feedback.h"

#include <omp.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/base/buffer.h"
#include "cpu/base/failure.h"
#include "cpu/base/parallel.h"
#include "cpu/kmeans/kmeans_points.h"
#include "cpu/kmeans/kmeans_search.h"
#include "cpu/kmeans/kmeans_table.h"
#include "cpu/kmeans/kmeans_tree.h"

namespace nowag::cpu {
namespace {

// Rows that a thread takes at a time: enough to pay for the frames of a search, few enough that
// their columns stay in the second-level cache.
constexpr int64_t kMostRows = 512;
constexpr float kOnes[kMaxSubvector] = {1, 1, 1, 1, 1, 1, 1, 1};

// One thread's memory. Columns lie `stride` floats apart.
struct Worker {
    Buffer<float> columns, y, bias, lower, upper, gaps;
    Buffer<uint16_t> slots, best, near_entries;
    Buffer<int32_t> grid_entries, grid_boxes, near_branches, near_leaves;
    Buffer<uint64_t> sums;
    bool begun = false;
};

class Feedback {
  public:
    Feedback(float* x, int64_t x_stride, float* carried, const float* factor, int64_t factor_stride,
             const float* codebook, int64_t rows, int64_t positions, int64_t entries, int d,
             uint16_t* codes, double scale, int64_t* sums, int threads)
        : x_(x),
          x_stride_(x_stride),
          carried_(carried),
          factor_(factor),
          factor_stride_(factor_stride),
          codebook_(codebook),
          rows_(rows),
          positions_(positions),
          entries_(entries),
          d_(d),
          codes_(codes),
          scale_(scale),
          sums_(sums),
          threads_(threads),
          part_(pad_lanes(std::min(ceil_div(rows, threads), kMostRows))),
          stride_(part_ + kMaxLanes),
          trees_(static_cast<size_t>(positions)) {}

    void run() {
        rotate_entries();
        // All memory before anything is written.
        std::vector<Worker> workers(static_cast<size_t>(threads_));
        for (Worker& worker : workers) allocate(worker);
        parallel_for(ceil_div(rows_, part_), threads_, [&](int64_t part) {
            Worker& worker = workers[static_cast<size_t>(omp_get_thread_num())];
            if (!worker.begun) begin(worker);
            settle(worker, part * part_, std::min(rows_, (part + 1) * part_));
        });
        for (const Worker& worker : workers) {
            for (int64_t i = 0; worker.begun && i < sums_size(); ++i) {
                sums_[i] = static_cast<int64_t>(static_cast<uint64_t>(sums_[i]) + worker.sums[i]);
            }
        }
    }

  private:
    static int64_t pad_lanes(int64_t count) { return ceil_div(count, kMaxLanes) * kMaxLanes; }

    int64_t columns() const { return positions_ * d_; }
    int64_t sums_of_entry() const { return d_ + d_ * (d_ + 1) / 2 + 1; }
    int64_t sums_size() const { return sums_ == nullptr ? 0 : entries_ * sums_of_entry(); }

    // V from the first column of position p to the first column of position q on.
    const float* block(int64_t p, int64_t q) const {
        return factor_ + p * d_ * factor_stride_ + q * d_;
    }

    // Trees of the entries in each position's metric, cut as that of the codebook itself: cutting
    // is most of the work, and what is near stays near.
    void rotate_entries() {
        const KmeansTree plain(codebook_, entries_, d_, kOnes, threads_);
        const uint16_t* entry = plain.leaves().entry;
        const int64_t padded = pad_lanes(entries_);
        const Buffer<float> columns = buffer<float>(padded * d_);
        std::fill_n(columns.get(), padded * d_, 0.0f);
        for (int64_t slot = 0; slot < entries_; ++slot) {
            const float* from = codebook_ + entry[slot] * d_;
            for (int j = 0; j < d_; ++j) columns[j * padded + slot] = from[j];
        }
        parallel_for(positions_, threads_, [&](int64_t p) {
            const Buffer<float> rotated = buffer<float>(padded * d_);
            std::fill_n(rotated.get(), padded * d_, 0.0f);
            kmeans_table().rotate(columns.get(), padded, padded, d_, block(p, p), factor_stride_,
                                  d_, rotated.get());
            trees_[static_cast<size_t>(p)] =
                std::make_unique<KmeansTree>(plain, rotated.get(), padded, d_);
        });
    }

    void allocate(Worker& worker) const {
        const KmeansLeaves leaves = trees_[0]->leaves();  // as many at every position
        const int64_t slots = leaves.count * kLeafEntries, pairs = ceil_div(d_, 2);
        worker.bias = buffer<float>(slots);
        worker.lower = buffer<float>(leaves.stride * d_);
        worker.upper = buffer<float>(leaves.stride * d_);
        worker.gaps = buffer<float>(part_);
        worker.slots = buffer<uint16_t>(part_);
        worker.best = buffer<uint16_t>(part_);
        worker.grid_entries = buffer<int32_t>(slots * pairs);
        worker.grid_boxes = buffer<int32_t>(2 * leaves.stride * pairs);
        worker.near_branches = buffer<int32_t>(kMaxLanes * (leaves.branches + 1));
        worker.near_leaves = buffer<int32_t>(kMaxLanes * (leaves.count + 1));
        worker.near_entries = buffer<uint16_t>(kMaxLanes * (leaves.count + 1));
        worker.y = buffer<float>(stride_ * d_);
        worker.sums = buffer<uint64_t>(sums_size());
        worker.columns = buffer<float>(stride_ * columns());
    }

    // On the worker's own thread, which so has the memory near it.
    void begin(Worker& worker) const {
        std::fill_n(worker.slots.get(), part_, uint16_t{0});
        std::fill_n(worker.sums.get(), sums_size(), uint64_t{0});
        worker.begun = true;
    }

    // Takes rows [begin, end) through all positions.
    void settle(Worker& worker, int64_t begin, int64_t end) const {
        const int64_t rows = end - begin, padded = pad_lanes(rows);
        to_columns(x_ + begin * x_stride_, x_stride_, rows, columns(), worker.columns.get());
        const KmeansFrame frame{worker.bias.get(),        worker.lower.get(),
                                worker.upper.get(),       worker.grid_entries.get(),
                                worker.grid_boxes.get(),  worker.near_branches.get(),
                                worker.near_leaves.get(), worker.near_entries.get()};
        for (int64_t p = 0; p < positions_; ++p) {
            const KmeansLeaves leaves = trees_[static_cast<size_t>(p)]->leaves();
            to_columns(carried_ + begin * columns() + p * d_, columns(), rows, d_, worker.y.get());
            kmeans_table().rotate(worker.columns.get(), stride_, padded, (p + 1) * d_, block(0, p),
                                  factor_stride_, d_, worker.y.get());
            const KmeansSlice points{worker.y.get(), kOnes, worker.slots.get(), stride_, padded};
            search_polling(points, leaves, entries_, d_, KmeansStart::nothing, frame,
                           worker.best.get(), worker.gaps.get());
            store(worker, leaves, p, begin, rows);
        }
        for (int64_t row = 0; row < rows; ++row) {
            float* to = x_ + (begin + row) * x_stride_;
            for (int64_t c = 0; c < columns(); ++c) to[c] = worker.columns[c * stride_ + row];
        }
    }

    // Rows as columns, filled up with zeros to whole vectors.
    void to_columns(const float* from, int64_t from_stride, int64_t rows, int64_t count,
                    float* to) const {
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t c = 0; c < count; ++c) to[c * stride_ + row] = from[row * from_stride + c];
        }
        for (int64_t c = 0; c < count; ++c) {
            std::fill(to + c * stride_ + rows, to + c * stride_ + pad_lanes(rows), 0.0f);
        }
    }

    // Writes codes and errors of what was found for rows [begin, begin + rows) at position p.
    void store(Worker& worker, const KmeansLeaves& leaves, int64_t p, int64_t begin,
               int64_t rows) const {
        int64_t metric[kMaxSubvector * (kMaxSubvector + 1) / 2];
        if (sums_ != nullptr) fix_metric(p, metric);
        float* column = worker.columns.get() + p * d_ * stride_;
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t slot = worker.best[row];
            const uint16_t entry = leaves.entry[slot];
            codes_[(begin + row) * positions_ + p] = entry;
            if (sums_ != nullptr) add(worker, p, row, entry, metric);
            const float* e =
                leaves.c + slot / kLeafEntries * d_ * kLeafEntries + slot % kLeafEntries;
            float* carried = carried_ + (begin + row) * columns() + p * d_;
            for (int j = 0; j < d_; ++j) {
                carried[j] = worker.y[j * stride_ + row] - e[j * kLeafEntries];
                column[j * stride_ + row] -= codebook_[entry * d_ + j];
            }
        }
    }

    void fix_metric(int64_t p, int64_t* metric) const {
        const float* v = block(p, p);
        for (int a = 0; a < d_; ++a) {
            for (int b = a; b < d_; ++b) {
                double sum = 0.0;
                for (int j = b; j < d_; ++j) {
                    sum += static_cast<double>(v[a * factor_stride_ + j]) *
                           static_cast<double>(v[b * factor_stride_ + j]);
                }
                *metric++ = fixed_point(sum * scale_);
            }
        }
    }

    // Without signed overflow, whatever the scale.
    void add(Worker& worker, int64_t p, int64_t row, uint16_t entry, const int64_t* metric) const {
        uint64_t* to = worker.sums.get() + entry * sums_of_entry();
        const float* v = block(p, p);
        for (int a = 0; a < d_; ++a) {
            double sum = 0.0;
            for (int j = a; j < d_; ++j) {
                sum += static_cast<double>(worker.y[j * stride_ + row]) *
                       static_cast<double>(v[a * factor_stride_ + j]);
            }
            *to++ += static_cast<uint64_t>(fixed_point(sum * scale_));
        }
        for (int i = 0; i < d_ * (d_ + 1) / 2; ++i) *to++ += static_cast<uint64_t>(metric[i]);
        ++*to;
    }

    float* const x_;
    const int64_t x_stride_;
    float* const carried_;
    const float* const factor_;
    const int64_t factor_stride_;
    const float* const codebook_;
    const int64_t rows_, positions_, entries_;
    const int d_;
    uint16_t* const codes_;
    const double scale_;
    int64_t* const sums_;
    const int threads_;
    const int64_t part_, stride_;
    std::vector<std::unique_ptr<const KmeansTree>> trees_;  // by position
};

}  // namespace

Status kmeans_feedback(float* x, int64_t x_stride, float* carried, const float* factor,
                       int64_t factor_stride, const float* codebook, int64_t rows,
                       int64_t positions, int64_t entries, int d, uint16_t* codes, double scale,
                       int64_t* sums, int threads) try {
    if (x == nullptr || carried == nullptr || factor == nullptr || codebook == nullptr ||
        codes == nullptr || d < 1 || d > kMaxSubvector || rows < 1 || positions < 1 ||
        !valid_entries(entries) || x_stride < positions * d || factor_stride < positions * d ||
        threads < 1) {
        return Status::invalid_argument;
    }
    Feedback(x, x_stride, carried, factor, factor_stride, codebook, rows, positions, entries, d,
             codes, scale, sums, threads)
        .run();
    return Status::ok;
} catch (...) {
    return failure();
}

}  // namespace nowag::cpu
