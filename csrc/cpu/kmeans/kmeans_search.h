// The search at a position for many points, in slices between which it polls.
#pragma once

#include <algorithm>

#include "cpu/base/interrupt.h"
#include "cpu/kmeans/kmeans_table.h"

namespace nowag::cpu {

// Points of a slice times entries: at worst every entry is looked at for every point, which must
// not take longer than a tenth of a second.
constexpr int64_t kSearchedAtOnce = int64_t{1} << 22;

// KmeansTable::frame, then KmeansTable::search for all points.
inline void search_polling(const KmeansSlice& points, const KmeansLeaves& leaves, int64_t entries,
                           int d, KmeansStart start, const KmeansFrame& frame, uint16_t* best,
                           float* gaps) {
    const KmeansTable& table = kmeans_table();
    table.frame(leaves, entries, d, points.h, start, frame);
    const int64_t step = (kSearchedAtOnce / entries + kMaxLanes) / kMaxLanes * kMaxLanes;
    for (int64_t first = 0; first < points.count; first += step) {
        poll();
        const KmeansSlice slice{points.x + first, points.h, points.slots + first, points.stride,
                                std::min(step, points.count - first)};
        table.search(slice, leaves, d, start, frame, best + first, gaps + first);
    }
}

}  // namespace nowag::cpu
