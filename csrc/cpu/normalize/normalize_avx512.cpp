#include "cpu/normalize/normalize_kernel.h"

namespace nowag::cpu {
const NormalizeTable kNormalizeAvx512 = kNormalizeTable;
}  // namespace nowag::cpu
