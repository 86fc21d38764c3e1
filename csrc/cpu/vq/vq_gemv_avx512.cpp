#include "cpu/vq/vq_gemv_decode.h"
#include "cpu/vq/vq_gemv_integer.h"

namespace nowag::cpu {
const VqDecodeTable kVqDecodeAvx512 = {scale_inputs, arrange_codebook, multiply_tile, finish,
                                       &kIntegers};
}  // namespace nowag::cpu
