// The integer kernel of vq_gemv.h, d of 5 to 8, for AVX2 and above.
//
// Decode with entries and inputs of 16-bit integers, 8 of them to 128 bits: one instruction
// multiplies an entry from memory with a position's inputs and adds neighbours up, one more adds
// the four sums to the row's. A run of positions is added up so before it is multiplied by its
// unit. Floats, 8 of which are twice as wide, have to be made of float16 first. (VNNI's one
// instruction for both has been no faster: 1.7 cycles a code on Zen 4.)
//
// A vector holds the inputs of one token or, with the entry broadcast to its halves, of two; two
// vectors share a pass over the entries. What is done for a token is the same, lane by lane.
//
// In an anonymous namespace: each instruction set compiles its own copy.
#pragma once

#include <immintrin.h>

#include "cpu/vq/vq_expand_avx2.h"
#include "cpu/vq/vq_gemv_decode.h"
#include "cpu/vq/vq_gemv_table.h"

namespace nowag::cpu {
namespace {

// Of both integers: a run adds up in 32 bits, two products at a time.
constexpr int kLargestInteger = 8191;
static_assert(2 * kVqIntegerRun * kLargestInteger * kLargestInteger <= 0x7fffffff);
// Smallest unit: inputs this small have no need of more precision, and 1 / unit stays finite.
constexpr float kSmallestUnit = 0x1p-100f;

float unit_for(float largest) {
    const float wanted = largest / static_cast<float>(kLargestInteger);
    return wanted < kSmallestUnit ? kSmallestUnit : wanted;  // NaN stays
}

// 8 floats to the nearest integers.
__m128i to_integers(__m256 values) {
    const __m256i wide = _mm256_cvtps_epi32(values);
    return _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
}

float arrange_integer_codebook(const uint16_t* codebook, int64_t entries, int d, int16_t* out) {
    // Magnitudes of float16 are ordered as their bits are.
    const __m256i magnitude = _mm256_set1_epi16(0x7fff);
    __m256i most = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + 16 <= entries * d; i += 16) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codebook + i));
        most = _mm256_max_epu16(most, _mm256_and_si256(bits, magnitude));
    }
    alignas(32) uint16_t each[16];
    _mm256_store_si256(reinterpret_cast<__m256i*>(each), most);
    uint16_t largest = 0;
    for (const uint16_t one : each) largest = one > largest ? one : largest;
    for (; i < entries * d; ++i) {
        const uint16_t one = codebook[i] & 0x7fff;
        largest = one > largest ? one : largest;
    }

    const float unit = unit_for(float16_to_float(largest));
    const __m256 scale = _mm256_set1_ps(1.0f / unit);
    const __m128i lane = _mm_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7);
    const __m128i used = _mm_cmpgt_epi16(_mm_set1_epi16(static_cast<int16_t>(d)), lane);
    int64_t k = 0;
    const auto write = [&](const uint16_t* entry) {
        const __m256 values = load_eight(entry, 0, DType::float16);
        const __m128i integers = to_integers(_mm256_mul_ps(values, scale));
        _mm_store_si128(reinterpret_cast<__m128i*>(out) + k, _mm_and_si128(integers, used));
    };
    for (; k * d + 8 <= entries * d; ++k) write(codebook + k * d);
    // 8 numbers would reach past the codebook's end.
    for (; k < entries; ++k) {
        uint16_t entry[8] = {};
        for (int j = 0; j < d; ++j) entry[j] = codebook[k * d + j];
        write(entry);
    }
    return unit;
}

void arrange_run(const float* inputs, int d, int64_t positions, float codebook_unit, int token,
                 VqIntegerRun& run) {
    const __m256 sign = _mm256_set1_ps(-0.0f), most = _mm256_set1_ps(__FLT_MAX__);
    alignas(32) float own[kVqIntegerRun][kVqIntegerLanes] = {};
    __m256 largest = _mm256_setzero_ps();
    __m256 finite = _mm256_cmp_ps(largest, most, _CMP_LE_OQ);
    for (int64_t p = 0; p < positions; ++p) {
        for (int j = 0; j < d; ++j) own[p][j] = inputs[p * d + j];
        const __m256 size = _mm256_andnot_ps(sign, _mm256_load_ps(own[p]));
        finite = _mm256_and_ps(finite, _mm256_cmp_ps(size, most, _CMP_LE_OQ));
        largest = _mm256_max_ps(largest, size);
    }
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps(largest, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    four = _mm_max_ss(four, _mm_movehdup_ps(four));
    const float unit = unit_for(_mm_cvtss_f32(four));
    const __m256 scale = _mm256_set1_ps(1.0f / unit);
    for (int64_t p = 0; p < kVqIntegerRun; ++p) {
        _mm_store_si128(reinterpret_cast<__m128i*>(run.inputs[p][token]),
                        to_integers(_mm256_mul_ps(_mm256_load_ps(own[p]), scale)));
    }
    // Integers cannot say that an input is not finite: the unit does, to all rows.
    const bool all_finite = _mm256_movemask_ps(finite) == 0xff;
    run.units[token] = all_finite ? unit * codebook_unit : __builtin_nanf("");
}

void arrange_integer_inputs(const float* inputs, int d, int64_t positions, float codebook_unit,
                            int token, VqIntegerRun* runs) {
    for (int64_t first = 0; first < positions; first += kVqIntegerRun, ++runs) {
        const int64_t left = positions - first;
        arrange_run(inputs + first * d, d, left < kVqIntegerRun ? left : kVqIntegerRun,
                    codebook_unit, token, *runs);
    }
}

// Codes of 12 bits, as offsets of entries in 16: twice as many to a register as Unpacker has.
class Unpacker12 {
  public:
    using Offset = uint16_t;

    void unpack_positions(const uint8_t* streams, int64_t count, const uint8_t*,
                          Offset* offsets) const {
        // A code begins at a byte, or half a byte later. The last 8 codes' bytes are loaded with
        // those before them: none past the position's are read.
        const __m256i first = _mm256_setr_epi8(0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11, 0,
                                               1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11);
        const __m256i last = _mm256_add_epi8(
            first, _mm256_inserti128_si256(_mm256_setzero_si256(), _mm_set1_epi8(4), 1));
        for (int64_t p = 0; p < count; ++p, streams += kBytes, offsets += kTileRows) {
            store(offsets, load(streams, streams + 12), first);
            store(offsets + 16, load(streams + 24, streams + 32), last);
        }
    }

    int bytes() const { return kBytes; }

  private:
    static constexpr int kBytes = 4 * 12;

    static __m256i load(const uint8_t* low, const uint8_t* high) {
        const __m128i one = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low));
        const __m128i two = _mm_loadu_si128(reinterpret_cast<const __m128i*>(high));
        return _mm256_inserti128_si256(_mm256_castsi128_si256(one), two, 1);
    }

    // 16 codes times an entry's 16 bytes.
    static void store(Offset* offsets, __m256i raw, __m256i shuffle) {
        const __m256i up = _mm256_set1_epi32(1 << 16 | 16), mask = _mm256_set1_epi16(-16);
        const __m256i codes = _mm256_mullo_epi16(_mm256_shuffle_epi8(raw, shuffle), up);
        _mm256_store_si256(reinterpret_cast<__m256i*>(offsets), _mm256_and_si256(codes, mask));
    }
};

class Unpacker32 {
  public:
    using Offset = uint32_t;

    explicit Unpacker32(int code_bits) : unpacker_(code_bits, 4) {}
    void unpack_positions(const uint8_t* streams, int64_t count, const uint8_t* end,
                          Offset* offsets) const {
        unpacker_.unpack_positions(streams, count, end, offsets);
    }
    int bytes() const { return unpacker_.bytes(); }

  private:
    Unpacker unpacker_;
};

// The inputs of one token in a vector, and of two.
struct One {
    using Integers = __m128i;
    static constexpr int kTokens = 1;
    static Integers load(const void* p) { return _mm_load_si128(static_cast<const __m128i*>(p)); }
    static Integers entry(const void* p) { return load(p); }
    static Integers multiply(Integers a, Integers b) { return _mm_madd_epi16(a, b); }
    static void add_to_floats(Integers sum, const float* units, float* sums) {
        const __m128 unit = _mm_set1_ps(units[0]);
        _mm_store_ps(sums, _mm_fmadd_ps(_mm_cvtepi32_ps(sum), unit, _mm_load_ps(sums)));
    }
};

struct Two {
    using Integers = __m256i;
    static constexpr int kTokens = 2;
    static Integers load(const void* p) {
        return _mm256_load_si256(static_cast<const __m256i*>(p));
    }
    static Integers entry(const void* p) {
        return _mm256_broadcastsi128_si256(_mm_load_si128(static_cast<const __m128i*>(p)));
    }
    static Integers multiply(Integers a, Integers b) { return _mm256_madd_epi16(a, b); }
    static void add_to_floats(Integers sum, const float* units, float* sums) {
        const __m256 unit = _mm256_set_m128(_mm_set1_ps(units[1]), _mm_set1_ps(units[0]));
        _mm256_store_ps(sums, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), unit, _mm256_load_ps(sums)));
    }
};

// sum + products, in the sum's register: GCC 12 would move each to another and back.
template <class Integers>
Integers added(Integers sum, Integers products) {
    asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(products));
    return sum;
}

// sums [kVectors][32][4 kTokens], of kRows rows, += what `count` positions of a run add to them.
// The runs of one vector's tokens are `stride` after those of the one before.
template <class V, int kRows, int kVectors, class Offset>
void add_run_to(const Offset* offsets, int64_t count, const int16_t* entries,
                const VqIntegerRun* runs, int64_t stride, float* sums, const uint8_t* ahead,
                int64_t ahead_step) {
    constexpr int kFloats = 4 * V::kTokens;
    const char* base = reinterpret_cast<const char*>(entries);
    typename V::Integers acc[kRows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) acc[r][v] = typename V::Integers{};
    }
    for (int64_t p = 0; p < count; ++p) {
        _mm_prefetch(reinterpret_cast<const char*>(ahead + p * ahead_step), _MM_HINT_T0);
        typename V::Integers x[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) x[v] = V::load(runs[v * stride].inputs[p]);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
            const typename V::Integers entry = V::entry(base + offsets[p * kTileRows + r]);
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) {
                acc[r][v] = added(acc[r][v], V::multiply(entry, x[v]));
            }
        }
    }
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
            V::add_to_floats(acc[r][v], runs[v * stride].units,
                             sums + (v * kTileRows + r) * kFloats);
        }
    }
}

template <class V, class U>
void multiply_integer_tile_of(const VqIntegerTile& tile, const U& unpacker) {
    constexpr int kFloats = 4 * V::kTokens;
    static_assert(kDecodeBlock % kVqIntegerRun == 0);
    const int vectors = (tile.tokens + V::kTokens - 1) / V::kTokens;
    const int64_t stride = (tile.positions + kVqIntegerRun - 1) / kVqIntegerRun;
    alignas(64) typename U::Offset offsets[kDecodeBlock * kTileRows];
    alignas(64) float sums[kVqGemvMaxTokens * kTileRows * 4];
    for (int i = 0; i < vectors * kTileRows * kFloats; ++i) sums[i] = 0.0f;
    for (int64_t begin = 0; begin < tile.positions; begin += kDecodeBlock) {
        const int64_t left = tile.positions - begin;
        const int64_t count = left < kDecodeBlock ? left : kDecodeBlock;
        const uint8_t* streams = tile.codes + begin * unpacker.bytes();
        unpacker.unpack_positions(streams, count, tile.codes_end, offsets);
        // While these codes are in use, the next block's arrive: a share with each run and pass.
        const auto pass = [&](auto rows, auto vectors_at_once, int v) {
            constexpr int kRows = decltype(rows)::kValue;
            const int64_t share = unpacker.bytes() * kRows / kTileRows;
            const uint8_t* next = streams + count * unpacker.bytes();
            for (int64_t p = 0; p < count; p += kVqIntegerRun) {
                const int64_t here = count - p < kVqIntegerRun ? count - p : kVqIntegerRun;
                const VqIntegerRun* runs = tile.runs + v * stride + (begin + p) / kVqIntegerRun;
                for (int r = 0; r < kTileRows; r += kRows) {
                    add_run_to<V, kRows, decltype(vectors_at_once)::kValue>(
                        offsets + p * kTileRows + r, here, tile.entries, runs, stride,
                        sums + (v * kTileRows + r) * kFloats, next, share);
                    next += here * share;
                }
            }
        };
        int v = 0;
        if constexpr (V::kTokens > 1) {
            for (; v + 2 <= vectors; v += 2) pass(Constant<4>(), Constant<2>(), v);
        }
        if (v < vectors) pass(Constant<8>(), Constant<1>(), v);
    }
    for (int t = 0; t < tile.tokens; ++t) {
        const float* own = sums + t / V::kTokens * kTileRows * kFloats + t % V::kTokens * 4;
        for (int r = 0; r < kTileRows; ++r) {
            tile.sums[t * kTileRows + r] = add_lanes(own + r * kFloats, 4);
        }
    }
}

template <class V>
void multiply_integer_tile_as(const VqIntegerTile& tile) {
    if (tile.code_bits == 12) return multiply_integer_tile_of<V>(tile, Unpacker12());
    multiply_integer_tile_of<V>(tile, Unpacker32(tile.code_bits));
}

void multiply_integer_tile(const VqIntegerTile& tile) {
    if (tile.tokens == 1) return multiply_integer_tile_as<One>(tile);
    multiply_integer_tile_as<Two>(tile);
}

const VqIntegerTable kIntegers = {arrange_integer_codebook, arrange_integer_inputs,
                                  multiply_integer_tile};

}  // namespace
}  // namespace nowag::cpu
