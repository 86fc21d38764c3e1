#include "cpu/tape/tape_kernel.h"

namespace nowag::cpu {
const TapeTable kTapeAvx2 = kTapeTable;
}  // namespace nowag::cpu
