#include "cpu/vq/vq_gemv_decode.h"
#include "cpu/vq/vq_gemv_integer.h"

namespace nowag::cpu {
namespace {
const VqIntegerTable kIntegers = {arrange_integer_codebook, arrange_integer_inputs,
                                  multiply_integer_tile};
}  // namespace

const VqDecodeTable kVqDecodeAvx2 = {scale_inputs, arrange_codebook, multiply_tile, finish,
                                     &kIntegers};
}  // namespace nowag::cpu
