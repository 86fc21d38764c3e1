#include "cpu/normalize_kernel.h"

namespace nowag::cpu {
const NormalizeTable kNormalizeScalar = kNormalizeTable;
}  // namespace nowag::cpu
