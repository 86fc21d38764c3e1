#include "cpu/normalize/normalize_kernel.h"

namespace nowag::cpu {
const NormalizeTable kNormalizeScalar = kNormalizeTable;
}  // namespace nowag::cpu
