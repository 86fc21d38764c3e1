#include "cpu/sparse/sparse_pack_avx2.h"

#include "cpu/base/convert_row.h"
#include "cpu/sparse/sparse_pack_scalar.h"
#include "cpu/sparse/sparse_pack_table.h"

namespace nowag::cpu {
namespace {

constexpr int64_t kLanes = 8;

// Kept elements are stored one by one: there is no compression below AVX-512, and packing is done
// once a layer.
template <typename Element>
void gather(const Element* row, const uint8_t* bits, int64_t cols, Element* values) {
    int64_t j = 0;
    for (; j + kLanes <= cols; j += kLanes) {
        for (unsigned left = bits[j / kLanes]; left != 0; left &= left - 1) {
            *values++ = row[j + __builtin_ctz(left)];
        }
    }
    gather_from(j, row, bits, cols, values);
}

void expand16(const uint16_t* values, const uint8_t* bits, int64_t cols, uint16_t* row) {
    int64_t j = 0;
    for (; j + kLanes <= cols; j += kLanes) {
        const unsigned mask = bits[j / kLanes];
        _mm_storeu_si128(reinterpret_cast<__m128i*>(row + j), expand_halves(values, mask));
        values += _mm_popcnt_u32(mask);
    }
    expand_from(j, values, bits, cols, row);
}

void expand32(const uint32_t* values, const uint8_t* bits, int64_t cols, uint32_t* row) {
    int64_t j = 0;
    for (; j + kLanes <= cols; j += kLanes) {
        const unsigned mask = bits[j / kLanes];
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + j), expand_lanes(values, mask));
        values += _mm_popcnt_u32(mask);
    }
    expand_from(j, values, bits, cols, row);
}

}  // namespace

const SparsePackTable kSparsePackAvx2 = {gather<uint16_t>, gather<uint32_t>, expand16, expand32,
                                         convert_row};

}  // namespace nowag::cpu
