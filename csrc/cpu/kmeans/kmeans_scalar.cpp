#include "cpu/kmeans/kmeans_lanes_scalar.h"
//
#include "cpu/kmeans/kmeans_kernel.h"

namespace nowag::cpu {
const KmeansTable kKmeansScalar = kTable;
}  // namespace nowag::cpu
