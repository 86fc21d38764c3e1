#include "cpu/sparse/sparse_gemv_avx512.h"

namespace nowag::cpu {
namespace {

// Values of 16 bits are widened, then expanded: expanding 16-bit lanes takes VBMI2.
struct ExpandFloat16 {
    static constexpr int kVectors = 1, kValueBytes = 2;
    static void step(const void* values, uint64_t mask, __m512* out) {
        const __m256i halves = _mm256_loadu_si256(static_cast<const __m256i*>(values));
        *out = _mm512_maskz_expand_ps(static_cast<__mmask16>(mask), _mm512_cvtph_ps(halves));
    }
};

struct ExpandBfloat16 {
    static constexpr int kVectors = 1, kValueBytes = 2;
    static void step(const void* values, uint64_t mask, __m512* out) {
        const __m256i halves = _mm256_loadu_si256(static_cast<const __m256i*>(values));
        const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
        *out = _mm512_maskz_expand_ps(static_cast<__mmask16>(mask), _mm512_castsi512_ps(wide));
    }
};

}  // namespace

const SparseGemvTable kSparseGemvAvx512 = {
    {dot<ExpandFloat32>, dot<ExpandFloat16>, dot<ExpandBfloat16>}, {nullptr, nullptr, nullptr}};

}  // namespace nowag::cpu
