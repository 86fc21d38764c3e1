// The lookup kernel of vq_gemv.h: codes of 8 bits, tables of 256 16-bit products kept as 256 low
// and 256 high bytes, so that a byte permute looks 64 codes up at once. Tokens go one by one.
//
//   table in registers   low [t0 | t1 | t2 | t3]   high [t4 | t5 | t6 | t7]   64 bytes each
//   64 codes             two permutes a half, of two registers each, choose by the codes' low 7
//                        bits; a mask of the top one says which is blended in
//   accumulators         16-bit sums of whole words and of their upper bytes, modulo 2^16:
//                        upper = sum(odd bytes), words - 256 * upper = sum(even bytes)
//
// Four permutes for 64 codes, with the shifts and the mask, bound it on Zen 4 (9.7 cycles; there a
// permute of two registers takes no longer than of one), then the codes' memory traffic.
#include <immintrin.h>

#include "cpu/vq/vq_gemv_table.h"
#include "nowag/format.h"
#include "nowag/vq_gemv.h"

namespace nowag::cpu {
namespace {

constexpr int64_t kTableBytes = 2 * kVqLookupEntries;

// The positions of a group by the size of their products, each class with a unit of its own: the
// few positions of a model's outlier channels must not coarsen all others. order: the positions of
// class 0, then those of class 1; class 0 may be empty.
struct Classes {
    int32_t order[kVqLookupGroup];
    int64_t count[2];
    float unit[2];
};

// Products are biased to be unsigned: one byte of a sum is then a sum of unsigned bytes.
constexpr int kBias = 32768;
// Largest magnitude of a rounded product; below 32767 so that no rounding reaches past it.
constexpr float kLargest = 32700.0f;
// Positions are divided in two classes if that takes rounding's mean square below this share of
// what it is: codes are then read out of order, and read twice where a line holds both classes. The
// border is one of so many powers of two below the largest bound.
constexpr float kWorthDividing = 0.125f;
constexpr int kBorders = 6;
// Smallest unit: inputs this small have no need of more precision, and 1 / unit stays finite.
constexpr float kSmallestUnit = 0x1p-100f;

// Where build() wants entry k, so that its two packing instructions put byte k at place k.
int arranged_slot(int k) { return (k & ~63) | ((k & 12) << 2) | ((k & 48) >> 2) | (k & 3); }

void arrange_codebook(const uint16_t* codebook, int d, float* arranged, float* largest) {
    alignas(64) float floats[kVqLookupEntries * kMaxSubvector];
    for (int i = 0; i < kVqLookupEntries * d; i += 16) {
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codebook + i));
        _mm512_store_ps(floats + i, _mm512_cvtph_ps(halves));
    }
    for (int j = 0; j < d; ++j) {
        float* coordinate = arranged + j * kVqLookupEntries;
        for (int k = 0; k < kVqLookupEntries; ++k) {
            coordinate[arranged_slot(k)] = floats[k * d + j];
        }
        __m512 most = _mm512_setzero_ps();
        for (int k = 0; k < kVqLookupEntries; k += 16) {
            most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_load_ps(coordinate + k)));
        }
        largest[j] = _mm512_reduce_max_ps(most);
    }
}

// bounds[p] >= |T_p[k]| for every k; infinity after the last. The largest, or NaN if an input is
// not finite.
float bound_products(const float* largest, const float* inputs, int d, int64_t positions,
                     float* bounds) {
    float most = 0.0f;
    bool finite = true;
    for (int64_t p = 0; p < positions; ++p) {
        float bound = 0.0f;
        for (int j = 0; j < d; ++j) {
            const float input = inputs[p * d + j];
            bound += (input < 0.0f ? -input : input) * largest[j];
        }
        finite &= bound <= __FLT_MAX__;
        most = bound > most ? bound : most;
        bounds[p] = bound;
    }
    for (int64_t p = positions; p % 16 != 0; ++p) bounds[p] = __builtin_inff();
    return finite ? most : __builtin_nanf("");
}

float unit_for(float bound) {
    const float wanted = bound / kLargest;
    return wanted < kSmallestUnit ? kSmallestUnit : wanted;
}

// Rounding errs by unit^2 / 12 a position: chooses the bound, a power of two below the largest, up
// to which positions share a unit of their own, such that the sum is least.
void divide(const float* largest, const float* inputs, int d, int64_t positions, Classes* out) {
    alignas(64) float bounds[kVqLookupGroup + 16];
    const float most = bound_products(largest, inputs, d, positions, bounds);
    const float count = static_cast<float>(positions);
    float least = kWorthDividing * count * most * most, below = 0.0f, limit = -1.0f;
    float border = most;
    for (int halved = 0; halved < kBorders; ++halved) {
        border /= 2;
        __m512 top = _mm512_setzero_ps();
        int small = 0;
        for (int64_t p = 0; p < positions; p += 16) {
            const __m512 bound = _mm512_load_ps(bounds + p);
            const __mmask16 under = _mm512_cmp_ps_mask(bound, _mm512_set1_ps(border), _CMP_LE_OQ);
            small += __builtin_popcount(under);
            top = _mm512_mask_max_ps(top, under, top, bound);
        }
        const float largest_small = _mm512_reduce_max_ps(top), few = static_cast<float>(small);
        const float error = few * largest_small * largest_small + (count - few) * most * most;
        if (small > 0 && error < least) {
            least = error;
            below = largest_small;
            limit = border;
        }
    }
    out->count[0] = out->count[1] = 0;
    for (int c = 0; c < 2; ++c) {
        for (int64_t p = 0; p < positions; ++p) {
            if ((bounds[p] <= limit) != (c == 0)) continue;
            out->order[out->count[0] + out->count[1]] = static_cast<int32_t>(p);
            ++out->count[c];
        }
    }
    out->unit[0] = unit_for(below);
    out->unit[1] = unit_for(most);
}

// 16 biased products of entries at `arranged` with the scaled input of one position.
__m512i products(const float* arranged, const __m512* input, int d) {
    __m512 sum = _mm512_set1_ps(static_cast<float>(kBias));
    for (int j = 0; j < d; ++j) {
        sum = _mm512_fmadd_ps(_mm512_load_ps(arranged + j * kVqLookupEntries), input[j], sum);
    }
    return _mm512_cvtps_epi32(sum);
}

// Tables of the positions order[0, count), in multiples of the unit.
void build(const float* arranged, const float* inputs, int d, const int32_t* order, int64_t count,
           float unit, uint8_t* tables) {
    const float scale = 1.0f / unit;
    const __m512i low_bytes = _mm512_set1_epi16(0xff);
    for (int64_t p = 0; p < count; ++p) {
        __m512 input[kMaxSubvector];
        for (int j = 0; j < d; ++j) input[j] = _mm512_set1_ps(inputs[order[p] * d + j] * scale);
        uint8_t* table = tables + p * kTableBytes;
        for (int k = 0; k < kVqLookupEntries; k += 64) {
            const __m512i front = _mm512_packus_epi32(products(arranged + k, input, d),
                                                      products(arranged + k + 16, input, d));
            const __m512i back = _mm512_packus_epi32(products(arranged + k + 32, input, d),
                                                     products(arranged + k + 48, input, d));
            _mm512_store_si512(table + k, _mm512_packus_epi16(_mm512_and_si512(front, low_bytes),
                                                              _mm512_and_si512(back, low_bytes)));
            _mm512_store_si512(
                table + kVqLookupEntries + k,
                _mm512_packus_epi16(_mm512_srli_epi16(front, 8), _mm512_srli_epi16(back, 8)));
        }
    }
}

// Sums of the low or of the high bytes that 64 codes have chosen.
struct ByteSums {
    __m512i words = _mm512_setzero_si512();
    __m512i upper = _mm512_setzero_si512();

    void add(__m512i bytes) {
        words = _mm512_add_epi16(words, bytes);
        upper = _mm512_add_epi16(upper, _mm512_srli_epi16(bytes, 8));
    }
    __m512i even() const { return _mm512_sub_epi16(words, _mm512_slli_epi16(upper, 8)); }
    __m512i odd() const { return upper; }
};

// What 64 codes choose of a table; `upper` says which choose of its second half.
__m512i look_up(const __m512i* table, __m512i codes, __mmask64 upper) {
    return _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(table[0], codes, table[1]),
                                  _mm512_permutex2var_epi8(table[2], codes, table[3]));
}

// low + 256 * high - bias of 16 rows, times the unit.
__m512 worth(__m256i low, __m256i high, __m512i bias, __m512 unit) {
    const __m512i sum = _mm512_add_epi32(_mm512_cvtepu16_epi32(low),
                                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 8));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum, bias)), unit);
}

__m256i half_of(__m512i words, int half) {
    return half == 0 ? _mm512_castsi512_si256(words) : _mm512_extracti64x4_epi64(words, 1);
}

// Adds what 64 rows have gathered, even and odd rows interleaved again; the second tile's 32 rows
// only if they exist.
void flush(const ByteSums& low, const ByteSums& high, int64_t positions, float unit, bool both,
           float* sums) {
    const __m512i bias = _mm512_set1_epi32(static_cast<int>(positions) * kBias);
    const __m512 worth_of_one = _mm512_set1_ps(unit);
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (int half = 0; half < (both ? 2 : 1); ++half) {
        const __m512 even =
            worth(half_of(low.even(), half), half_of(high.even(), half), bias, worth_of_one);
        const __m512 odd =
            worth(half_of(low.odd(), half), half_of(high.odd(), half), bias, worth_of_one);
        float* rows = sums + half * kTileRows;
        const auto add = [](float* to, __m512 more) {
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), more));
        };
        add(rows, _mm512_permutex2var_ps(even, first, odd));
        add(rows + 16, _mm512_permutex2var_ps(even, second, odd));
    }
}

// The codes of two tiles at one position; the first tile's twice if there is no second.
__m512i two_tiles(const uint8_t* codes, int64_t second) {
    const __m256i front = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    const __m256i back = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + second));
    return _mm512_inserti64x4(_mm512_castsi256_si512(front), back, 1);
}

// `tiles` tiles, 2 * kPairs of them or one fewer.
template <int kPairs>
void add_pairs(const uint8_t* tables, float unit, const int32_t* order, int64_t count,
               const uint8_t* codes, int64_t tile_stride, int64_t tile_bytes, int64_t tiles,
               float* sums) {
    const bool whole = tiles == 2 * kPairs;
    ByteSums low[kPairs], high[kPairs];
    for (int64_t p = 0; p < count; ++p) {
        __m512i table[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            table[i] = _mm512_load_si512(tables + p * kTableBytes + 64 * i);
        }
        const int64_t place = order[p] * kTileRows;
        // A line holds two positions of a tile: the two tiles take turns. What comes after these
        // tiles' codes are those of the next tiles.
        int64_t ahead = place + kVqPrefetchBytes + p % 2 * tile_stride;
        if (place + kVqPrefetchBytes >= tile_bytes) ahead += 2 * kPairs * tile_stride - tile_bytes;
#pragma GCC unroll 4
        for (int pair = 0; pair < kPairs; ++pair) {
            const uint8_t* here = codes + 2 * pair * tile_stride;
            _mm_prefetch(reinterpret_cast<const char*>(here + ahead), _MM_HINT_T1);
            const __m512i chosen =
                two_tiles(here + place, whole || pair + 1 < kPairs ? tile_stride : int64_t{0});
            const __mmask64 upper = _mm512_movepi8_mask(chosen);
            low[pair].add(look_up(table, chosen, upper));
            high[pair].add(look_up(table + 4, chosen, upper));
        }
    }
#pragma GCC unroll 4
    for (int pair = 0; pair < kPairs; ++pair) {
        flush(low[pair], high[pair], count, unit, whole || pair + 1 < kPairs,
              sums + 2 * pair * kTileRows);
    }
}

// sums[r] += unit * sum over p = order[0, count) of table_p[code(r, p)]
void add_tiles(const uint8_t* tables, float unit, const int32_t* order, int64_t count,
               const uint8_t* codes, int64_t tile_stride, int64_t tile_bytes, int64_t tiles,
               float* sums) {
    for (; tiles >= 8; tiles -= 8, codes += 8 * tile_stride, sums += 8 * kTileRows) {
        add_pairs<4>(tables, unit, order, count, codes, tile_stride, tile_bytes, 8, sums);
    }
    if (tiles > 6)
        add_pairs<4>(tables, unit, order, count, codes, tile_stride, tile_bytes, tiles, sums);
    else if (tiles > 4)
        add_pairs<3>(tables, unit, order, count, codes, tile_stride, tile_bytes, tiles, sums);
    else if (tiles > 2)
        add_pairs<2>(tables, unit, order, count, codes, tile_stride, tile_bytes, tiles, sums);
    else if (tiles > 0)
        add_pairs<1>(tables, unit, order, count, codes, tile_stride, tile_bytes, tiles, sums);
}

void add_group(const VqLookupGroup& group) {
    alignas(64) uint8_t tables[kVqLookupGroup * kTableBytes];
    for (int64_t i = 0; i < group.tiles * kTileRows; ++i) group.sums[i] = 0.0f;
    Classes classes;
    divide(group.largest, group.inputs, group.d, group.positions, &classes);
    const int32_t* order = classes.order;
    for (int c = 0; c < 2; ++c) {
        const int64_t count = classes.count[c];
        if (count == 0) continue;
        build(group.codebook, group.inputs, group.d, order, count, classes.unit[c], tables);
        add_tiles(tables, classes.unit[c], order, count, group.codes, group.tile_stride,
                  group.positions * kTileRows, group.tiles, group.sums);
        order += count;
    }
}

}  // namespace

const VqLookupTable kVqLookupAvx512Vbmi = {1, arrange_codebook, add_group};

}  // namespace nowag::cpu
