#include "cpu/tape/tape_kernel.h"

namespace nowag::cpu {
const TapeTable kTapeAvx512 = kTapeTable;
}  // namespace nowag::cpu
