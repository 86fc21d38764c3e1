#include "cpu/base/convert_row.h"
#include "cpu/sparse/sparse_pack_avx512.h"
#include "cpu/sparse/sparse_pack_table.h"

namespace nowag::cpu {
namespace {

constexpr int64_t kHalfLanes = 32;

__mmask32 half_mask_at(const uint8_t* bits, int64_t j) {
    uint32_t mask;
    std::memcpy(&mask, bits + j / 8, sizeof mask);
    return mask;
}

void gather16(const uint16_t* row, const uint8_t* bits, int64_t cols, uint16_t* values) {
    int64_t j = 0;
    for (; j + kHalfLanes <= cols; j += kHalfLanes) {
        const __mmask32 mask = half_mask_at(bits, j);
        const int kept_halves = _mm_popcnt_u32(mask);
        const __m512i packed = _mm512_maskz_compress_epi16(mask, _mm512_loadu_si512(row + j));
        _mm512_mask_storeu_epi16(values, _bzhi_u32(~0u, kept_halves), packed);
        values += kept_halves;
    }
    gather_from(j, row, bits, cols, values);
}

void expand16(const uint16_t* values, const uint8_t* bits, int64_t cols, uint16_t* row) {
    int64_t j = 0;
    for (; j + kHalfLanes <= cols; j += kHalfLanes) {
        const __mmask32 mask = half_mask_at(bits, j);
        const __m512i halves = _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values));
        _mm512_storeu_si512(row + j, halves);
        values += _mm_popcnt_u32(mask);
    }
    expand_from(j, values, bits, cols, row);
}

}  // namespace

const SparsePackTable kSparsePackAvx512Vbmi = {gather16, gather32, expand16, expand32, convert_row};

}  // namespace nowag::cpu
