#include "cpu/kmeans/kmeans_lanes_avx2.h"
//
#include "cpu/kmeans/kmeans_kernel.h"

namespace nowag::cpu {
const KmeansTable kKmeansAvx2 = kTable;
}  // namespace nowag::cpu
