#include "cpu/normalize/normalize_kernel.h"

namespace nowag::cpu {
const NormalizeTable kNormalizeAvx2 = kNormalizeTable;
}  // namespace nowag::cpu
