#include "cpu/kmeans_tree.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "nowag/format.h"

namespace nowag::cpu {
namespace {

// A corner of the boxes that fill up a vector: farther than any point, its square still finite.
constexpr float kNowhere = 1e15f;

int widest(const float* codebook, int d, const float* spread, const uint16_t* begin,
           const uint16_t* end) {
    int best = 0;
    float width = -1.0f;
    for (int j = 0; j < d; ++j) {
        float low = std::numeric_limits<float>::infinity(), high = -low;
        for (const uint16_t* k = begin; k < end; ++k) {
            const float value = codebook[*k * d + j];
            low = std::min(low, value);
            high = std::max(high, value);
        }
        const float extent = (high - low) * (high - low) * spread[j];
        if (extent > width) {
            width = extent;
            best = j;
        }
    }
    return best;
}

}  // namespace

KmeansTree::KmeansTree(const float* codebook, int64_t entries, int d, const float* spread)
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
    split(codebook, d, spread, entry_.data(), entry_.data() + entries);
    fill(codebook, entries, d);
}

// Both halves but the last are whole leaves.
void KmeansTree::split(const float* codebook, int d, const float* spread, uint16_t* begin,
                       uint16_t* end) {
    const int64_t leaves = ceil_div(end - begin, kLeafEntries);
    if (leaves <= 1) return;
    const int j = widest(codebook, d, spread, begin, end);
    uint16_t* middle = begin + ceil_div(leaves, 2) * kLeafEntries;
    std::nth_element(begin, middle, end, [&](uint16_t a, uint16_t b) {
        const float left = codebook[a * d + j], right = codebook[b * d + j];
        return left < right || (left == right && a < b);
    });
    split(codebook, d, spread, begin, middle);
    split(codebook, d, spread, middle, end);
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
            enclose(leaf, j, value);
            enclose(first_branch_ + leaf / kBranchLeaves, j, value);
            c_[(leaf * d + j) * kLeafEntries + slot % kLeafEntries] = value;
        }
    }
}

// Widens a box, or makes it if it is still nowhere.
void KmeansTree::enclose(int64_t box, int j, float value) {
    float& lower = lower_[j * stride_ + box];
    float& upper = upper_[j * stride_ + box];
    const bool first = lower == kNowhere;
    lower = first ? value : std::min(lower, value);
    upper = first ? value : std::max(upper, value);
}

KmeansLeaves KmeansTree::leaves() const {
    return {count_,       branches_,    first_branch_, stride_,      c_.get(),
            lower_.get(), upper_.get(), least_.data(), most_.data(), entry_.data()};
}

}  // namespace nowag::cpu
