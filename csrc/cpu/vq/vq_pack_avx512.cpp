#include "cpu/vq/vq_pack_dequantize.h"

namespace nowag::cpu {
const VqPackTable kVqPackAvx512 = {widen, expand_codebook, dequantize_tile};
}  // namespace nowag::cpu
