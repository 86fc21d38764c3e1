#include "cpu/sparse/sparse_pack_avx512.h"

#include "cpu/base/convert_row.h"
#include "cpu/sparse/sparse_pack_table.h"

namespace nowag::cpu {
namespace {

// Elements of 16 bits travel in lanes of 32: moving 16-bit lanes takes VBMI2.
void gather16(const uint16_t* row, const uint8_t* bits, int64_t cols, uint16_t* values) {
    int64_t j = 0;
    for (; j + kLanes <= cols; j += kLanes) {
        const __mmask16 mask = mask_at(bits, j);
        const auto* halves = reinterpret_cast<const __m256i*>(row + j);
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(halves));
        const __m512i packed = _mm512_maskz_compress_epi32(mask, wide);
        _mm512_mask_cvtepi32_storeu_epi16(values, first_lanes(kept_lanes(mask)), packed);
        values += kept_lanes(mask);
    }
    gather_from(j, row, bits, cols, values);
}

void expand16(const uint16_t* values, const uint8_t* bits, int64_t cols, uint16_t* row) {
    int64_t j = 0;
    for (; j + kLanes <= cols; j += kLanes) {
        const __mmask16 mask = mask_at(bits, j);
        const auto* halves = reinterpret_cast<const __m256i*>(values);
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(halves));
        const __m256i narrow = _mm512_cvtepi32_epi16(_mm512_maskz_expand_epi32(mask, wide));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + j), narrow);
        values += kept_lanes(mask);
    }
    expand_from(j, values, bits, cols, row);
}

}  // namespace

const SparsePackTable kSparsePackAvx512 = {gather16, gather32, expand16, expand32, convert_row};

}  // namespace nowag::cpu
