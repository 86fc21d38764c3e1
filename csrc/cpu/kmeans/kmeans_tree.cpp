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

}  // namespace

KmeansTree::KmeansTree(const float* codebook, int64_t entries, int d, const float* spread,
                       int threads)
    : count_(ceil_div(entries, kLeafEntries)),
      branches_(ceil_div(count_, kBranchLeaves)),
      first_branch_(branches_ * kBranchLeaves),
      stride_(first_branch_ + ceil_div(branches_, kBranchLeaves) * kBranchLeaves),
      c_(buffer<float>(count_ * kLeafEntries * d)),
      lower_(buffer<float>(stride_ * d)),
      upper_(buffer<float>(stride_ * d)),
      least_(codebook, codebook + d),
      most_(least_),
      entry_(static_cast<size_t>(count_ * kLeafEntries), 0),
      slots_(static_cast<size_t>(entries)) {
    std::fill_n(c_.get(), count_ * kLeafEntries * d, 0.0f);
    std::fill_n(lower_.get(), stride_ * d, kNowhere);
    std::fill_n(upper_.get(), stride_ * d, kNowhere);
    std::iota(entry_.begin(), entry_.begin() + entries, uint16_t{0});
    split(codebook, d, spread, threads);
    fill(codebook, entries, d);
}

// Halves all parts at once, level by level. Both halves but the last are whole leaves.
void KmeansTree::split(const float* codebook, int d, const float* spread, int threads) {
    const int64_t entries = static_cast<int64_t>(slots_.size());
    const Buffer<uint64_t> keys = buffer<uint64_t>(entries);
    std::vector<int64_t> ends{0, entries};
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

void KmeansTree::fill(const float* codebook, int64_t entries, int d) {
    for (int64_t slot = 0; slot < entries; ++slot) {
        const int64_t k = entry_[static_cast<size_t>(slot)];
        const int64_t leaf = slot / kLeafEntries;
        slots_[static_cast<size_t>(k)] = static_cast<uint16_t>(slot);
        for (int j = 0; j < d; ++j) {
            const float value = codebook[k * d + j];
            float& least = least_[static_cast<size_t>(j)];
            float& most = most_[static_cast<size_t>(j)];
            least = std::min(least, value);
            most = std::max(most, value);
            const int64_t branch = leaf / kBranchLeaves;
            enclose(leaf, j, value, slot == leaf * kLeafEntries);
            enclose(first_branch_ + branch, j, value,
                    slot == branch * kBranchLeaves * kLeafEntries);
            c_[(leaf * d + j) * kLeafEntries + slot % kLeafEntries] = value;
        }
    }
}

// Widens a box, or makes it around its first entry.
void KmeansTree::enclose(int64_t box, int j, float value, bool first) {
    float& lower = lower_[j * stride_ + box];
    float& upper = upper_[j * stride_ + box];
    lower = first ? value : std::min(lower, value);
    upper = first ? value : std::max(upper, value);
}

KmeansLeaves KmeansTree::leaves() const {
    return {count_,       branches_,    first_branch_, stride_,      c_.get(),
            lower_.get(), upper_.get(), least_.data(), most_.data(), entry_.data()};
}

}  // namespace nowag::cpu
