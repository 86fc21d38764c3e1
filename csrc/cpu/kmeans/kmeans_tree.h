// A codebook cut into leaves: halved again and again along its widest coordinate, so that the
// entries of a leaf lie in a small box.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/base/buffer.h"
#include "cpu/kmeans/kmeans_table.h"

namespace nowag::cpu {

class KmeansTree {
  public:
    // `spread` [d] weighs the coordinates against each other: the mean of the metric.
    KmeansTree(const float* codebook, int64_t entries, int d, const float* spread, int threads);

    // The leaves of another tree for entries that have all moved, columns[j * stride + slot]: as
    // good where they moved together.
    KmeansTree(const KmeansTree& like, const float* columns, int64_t stride, int d);

    KmeansLeaves leaves() const;
    const uint16_t* slots() const { return slots_.data(); }  // entry -> slot

  private:
    void split(const float* codebook, int d, const float* spread, int threads);
    void fill(const float* columns, int64_t stride, int d);

    int64_t entries_, count_, branches_, first_branch_, stride_;
    Buffer<float> c_, lower_, upper_;
    std::vector<float> least_, most_;
    std::vector<uint16_t> entry_, slots_;
};

}  // namespace nowag::cpu
