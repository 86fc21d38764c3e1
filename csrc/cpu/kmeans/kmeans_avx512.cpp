#include "cpu/kmeans/kmeans_lanes_avx512.h"
//
#include "cpu/kmeans/kmeans_kernel.h"

namespace nowag::cpu {
const KmeansTable kKmeansAvx512 = kTable;
}  // namespace nowag::cpu
