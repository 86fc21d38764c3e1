#include "cpu/sparse/sparse_gemv_avx512.h"

namespace nowag::cpu {
namespace {

__m512i expand_halves(const void* values, uint64_t mask) {
    return _mm512_maskz_expand_epi16(static_cast<__mmask32>(mask), _mm512_loadu_si512(values));
}

struct ExpandFloat16 {
    static constexpr int kVectors = 2, kValueBytes = 2;
    static void step(const void* values, uint64_t mask, __m512* out) {
        const __m512i halves = expand_halves(values, mask);
        out[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
        out[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
    }
};

// A bfloat16 is a float's upper half: of 32 columns the even ones are shifted into place and the
// odd ones masked, with no use of the port that expands. x is arranged to match.
struct ExpandBfloat16 {
    static constexpr int kVectors = 2, kValueBytes = 2;
    static void step(const void* values, uint64_t mask, __m512* out) {
        const __m512i halves = expand_halves(values, mask);
        const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
        out[0] = _mm512_castsi512_ps(_mm512_slli_epi32(halves, 16));
        out[1] = _mm512_castsi512_ps(_mm512_and_si512(halves, upper));
    }
};

// Of every 32 columns the even ones first, then the odd ones.
void split_pairs(float* x, int64_t stride) {
    const __m512i even =
        _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    for (int64_t j = 0; j < stride; j += 32) {
        const __m512 first = _mm512_loadu_ps(x + j), second = _mm512_loadu_ps(x + j + 16);
        _mm512_storeu_ps(x + j, _mm512_permutex2var_ps(first, even, second));
        _mm512_storeu_ps(x + j + 16, _mm512_permutex2var_ps(first, odd, second));
    }
}

}  // namespace

const SparseGemvTable kSparseGemvAvx512Vbmi = {
    {dot<ExpandFloat32>, dot<ExpandFloat16>, dot<ExpandBfloat16>}, {nullptr, nullptr, split_pairs}};

}  // namespace nowag::cpu
