#include "cpu/vq/vq_gemv_decode.h"

namespace nowag::cpu {
const VqDecodeTable kVqDecodeAvx512 = {scale_inputs, arrange_codebook, multiply_tile, finish,
                                       nullptr};
}  // namespace nowag::cpu
