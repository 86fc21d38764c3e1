#include "cpu/tape/tape_kernel.h"

namespace nowag::cpu {
const TapeTable kTapeScalar = kTapeTable;
}  // namespace nowag::cpu
