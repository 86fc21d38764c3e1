#include "cpu/kmeans/kmeans_tree.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

#include "cpu/base/parallel.h"
#include "nowag/format.h"

namespace nowag::cpu {
namespace {

// A corner of the boxes that fill up a vector: farther than any point, its square still finite.
constexpr float kNowhere = 1e15f;

// The coordinate along which entries lie farthest apart.
int widest(const float* codebook, int d, const float* spread, const uint16_t* begin,
           const uint16_t* end) {
    float low[kMaxSubvector], high[kMaxSubvector];
    std::fill_n(low, d, std::numeric_limits<float>::infinity());
    std::fill_n(high, d, -std::numeric_limits<float>::infinity());
    for (const uint16_t* k = begin; k < end; ++k) {
        for (int j = 0; j < d; ++j) {
            low[j] = std::min(low[j], codebook[*k * d + j]);
            high[j] = std::max(high[j], codebook[*k * d + j]);
        }
    }
    int best = 0;
    float width = -1.0f;
    for (int j = 0; j < d; ++j) {
        const float extent = (high[j] - low[j]) * (high[j] - low[j]) * spread[j];
        if (extent > width) {
            width = extent;
            best = j;
        }
    }
    return best;
}

// An integer that orders entries by a coordinate, then by their number.
uint64_t order_key(float value, uint16_t entry) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits ^= (bits >> 31) != 0 ? 0xffffffffu : 0x80000000u;
    return static_cast<uint64_t>(bits) << 16 | entry;
}

// From the least of lower bounds to the most of upper ones.
void enclose(const float* lowers, const float* uppers, int64_t count, float& lower, float& upper) {
    float least = lowers[0], most = uppers[0];
    for (int64_t i = 1; i < count; ++i) {
        least = std::min(least, lowers[i]);
        most = std::max(most, uppers[i]);
    }
    lower = least;
    upper = most;
}

}  // namespace

KmeansTree::KmeansTree(const float* codebook, int64_t entries, int d, const float* spread,
                       int threads)
    : entries_(entries),
      count_(ceil_div(entries, kLeafEntries)),
      branches_(ceil_div(count_, kBranchLeaves)),
      first_branch_(branches_ * kBranchLeaves),
      stride_(first_branch_ + ceil_div(branches_, kBranchLeaves) * kBranchLeaves),
      entry_(static_cast<size_t>(count_ * kLeafEntries), 0),
      slots_(static_cast<size_t>(entries)) {
    std::iota(entry_.begin(), entry_.begin() + entries, uint16_t{0});
    split(codebook, d, spread, threads);
    const Buffer<float> columns = buffer<float>(entries * d);
    for (int64_t slot = 0; slot < entries; ++slot) {
        const uint16_t k = entry_[static_cast<size_t>(slot)];
        slots_[k] = static_cast<uint16_t>(slot);
        for (int j = 0; j < d; ++j) columns[j * entries + slot] = codebook[k * d + j];
    }
    fill(columns.get(), entries, d);
}

KmeansTree::KmeansTree(const KmeansTree& like, const float* columns, int64_t stride, int d)
    : entries_(like.entries_),
      count_(like.count_),
      branches_(like.branches_),
      first_branch_(like.first_branch_),
      stride_(like.stride_),
      entry_(like.entry_),
      slots_(like.slots_) {
    fill(columns, stride, d);
}

// Halves all parts at once, level by level. Both halves but the last are whole leaves.
void KmeansTree::split(const float* codebook, int d, const float* spread, int threads) {
    const Buffer<uint64_t> keys = buffer<uint64_t>(entries_);
    std::vector<int64_t> ends{0, entries_};
    for (int64_t leaves = count_; leaves > 1; leaves = ceil_div(leaves, 2)) {
        std::vector<int64_t> halved(2 * ends.size() - 1);
        parallel_for(static_cast<int64_t>(ends.size()) - 1, threads, [&](int64_t part) {
            const size_t at = static_cast<size_t>(part);
            const int64_t begin = ends[at], end = ends[at + 1];
            const int64_t half = ceil_div(ceil_div(end - begin, kLeafEntries), 2) * kLeafEntries;
            const int64_t middle = std::min(begin + half, end);
            halved[2 * at + 1] = middle;
            halved[2 * at + 2] = end;
            uint16_t* entry = entry_.data();
            if (middle == end) return;
            const int j = widest(codebook, d, spread, entry + begin, entry + end);
            for (int64_t i = begin; i < end; ++i) {
                keys[i] = order_key(codebook[entry[i] * d + j], entry[i]);
            }
            std::nth_element(keys.get() + begin, keys.get() + middle, keys.get() + end);
            for (int64_t i = begin; i < end; ++i) entry[i] = static_cast<uint16_t>(keys[i]);
        });
        ends = std::move(halved);
    }
}

// Entries leaf by leaf, and boxes around them; columns are in the order of slots.
void KmeansTree::fill(const float* columns, int64_t stride, int d) {
    c_ = buffer<float>(count_ * kLeafEntries * d);
    lower_ = buffer<float>(stride_ * d);
    upper_ = buffer<float>(stride_ * d);
    std::fill_n(lower_.get(), stride_ * d, kNowhere);
    std::fill_n(upper_.get(), stride_ * d, kNowhere);
    least_.resize(static_cast<size_t>(d));
    most_.resize(static_cast<size_t>(d));
    for (int j = 0; j < d; ++j) {
        float* const lower = lower_.get() + j * stride_;
        float* const upper = upper_.get() + j * stride_;
        for (int64_t leaf = 0; leaf < count_; ++leaf) {
            const int64_t first = leaf * kLeafEntries;
            const int64_t present = std::min<int64_t>(kLeafEntries, entries_ - first);
            const float* from = columns + j * stride + first;
            float* to = c_.get() + (leaf * d + j) * kLeafEntries;
            std::copy_n(from, present, to);
            std::fill(to + present, to + kLeafEntries, 0.0f);
            enclose(from, from, present, lower[leaf], upper[leaf]);
        }
        for (int64_t branch = 0; branch < branches_; ++branch) {
            const int64_t first = branch * kBranchLeaves;
            enclose(lower + first, upper + first, std::min<int64_t>(kBranchLeaves, count_ - first),
                    lower[first_branch_ + branch], upper[first_branch_ + branch]);
        }
        enclose(lower + first_branch_, upper + first_branch_, branches_,
                least_[static_cast<size_t>(j)], most_[static_cast<size_t>(j)]);
    }
}

KmeansLeaves KmeansTree::leaves() const {
    return {count_,       branches_,    first_branch_, stride_,      c_.get(),
            lower_.get(), upper_.get(), least_.data(), most_.data(), entry_.data()};
}

}  // namespace nowag::cpu
