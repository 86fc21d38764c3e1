#include "cpu/kmeans_lanes_scalar.h"
//
#include "cpu/kmeans_kernel.h"

namespace nowag::cpu {
const KmeansTable kKmeansScalar = kTable;
}  // namespace nowag::cpu
