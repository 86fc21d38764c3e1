// The nibble kernel of vq_gemv.h for AVX-512: as vq_gemv_nibble_avx2.cpp, four positions to a
// register, so that the halves of a run add up in bytes once.

#include <immintrin.h>

#include <cstring>

#include "cpu/vq/vq_gemv_nibble_tables.h"

namespace nowag::cpu {
namespace {

constexpr int kLanes = 4;  // positions of a register
constexpr int kRegisterBytes = kLanes * kPositionBytes;
constexpr int kRegisters = kVqNibbleRun / kLanes;
constexpr int64_t kRunBytes = kVqNibbleRun * kPositionBytes;
static_assert(kRegisters * (kHalfMost + 1) <= 128, "halves add up in bytes");

// sum += bytes, at once: GCC 12 would add up in another order, and keep in memory what it has not
// added yet.
void add_to(__m512i& sum, __m512i bytes) { asm("vpaddb %1, %0, %0" : "+v"(sum) : "v"(bytes)); }

// Sums of the low and the high halves of a tile's even rows, and of its odd ones. A lane has every
// fourth position.
struct Halves {
    __m512i even_low, even_high, odd_low, odd_high;

    void add(__m512i codes, __m512i low, __m512i high) {
        const __m512i nibble = _mm512_set1_epi8(15);
        const __m512i even = _mm512_and_si512(codes, nibble);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble);
        add_to(even_low, _mm512_shuffle_epi8(low, even));
        add_to(even_high, _mm512_shuffle_epi8(high, even));
        add_to(odd_low, _mm512_shuffle_epi8(low, odd));
        add_to(odd_high, _mm512_shuffle_epi8(high, odd));
    }

    // 16-bit sums over all lanes: of rows 0, 2, .. 30, then of 1, 3, .. 31.
    __m512i rows() const {
        const __m512i factors = _mm512_set1_epi16((1 << kHalfBits) << 8 | 1);
        const auto whole = [&](__m512i pairs) { return _mm512_maddubs_epi16(factors, pairs); };
        const __m512i even = add_lanes(whole(_mm512_unpacklo_epi8(even_low, even_high)),
                                       whole(_mm512_unpackhi_epi8(even_low, even_high)));
        const __m512i odd = add_lanes(whole(_mm512_unpacklo_epi8(odd_low, odd_high)),
                                      whole(_mm512_unpackhi_epi8(odd_low, odd_high)));
        return _mm512_add_epi16(_mm512_shuffle_i64x2(even, odd, _MM_SHUFFLE(2, 0, 2, 0)),
                                _mm512_shuffle_i64x2(even, odd, _MM_SHUFFLE(3, 1, 3, 1)));
    }

    // Halves of the sums of the first one's lanes, then of the second one's.
    static __m512i add_lanes(__m512i first, __m512i second) {
        return _mm512_add_epi16(_mm512_shuffle_i64x2(first, second, _MM_SHUFFLE(1, 0, 1, 0)),
                                _mm512_shuffle_i64x2(first, second, _MM_SHUFFLE(3, 2, 3, 2)));
    }
};

// Of a tile's even rows, and of its odd ones.
struct Totals {
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();

    void add(__m512i rows, __m512 unit) {
        const auto worth = [](__m256i half) {
            return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(half));
        };
        even = _mm512_fmadd_ps(worth(_mm512_castsi512_si256(rows)), unit, even);
        odd = _mm512_fmadd_ps(worth(_mm512_extracti64x4_epi64(rows, 1)), unit, odd);
    }

    void store(float* out) const {
        const __m512i first =
            _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        _mm512_storeu_ps(out, _mm512_permutex2var_ps(even, first, odd));
        _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(even, second, odd));
    }
};

// totals += unit * the entries of a run, whose codes are `stride` bytes from those of the next
// tile. Fetches those that are `ahead` bytes from them.
template <int kTiles>
void add_run(const uint8_t* codes, int64_t stride, int64_t ahead, const VqNibbleRun& run,
             Totals (&totals)[kTiles]) {
    const __m512i zero = _mm512_setzero_si512();
    Halves parts[kTiles];
#pragma GCC unroll 2
    for (int i = 0; i < kTiles; ++i) parts[i] = {zero, zero, zero, zero};
#pragma GCC unroll 4
    for (int q = 0; q < kRegisters; ++q, codes += kRegisterBytes) {
        const __m512i low = _mm512_load_si512(run.low[q * kLanes / 2]);
        const __m512i high = _mm512_load_si512(run.high[q * kLanes / 2]);
#pragma GCC unroll 2
        for (int i = 0; i < kTiles; ++i) {
            const uint8_t* here = codes + i * stride;
            _mm_prefetch(reinterpret_cast<const char*>(here + ahead), _MM_HINT_T1);
            parts[i].add(_mm512_loadu_si512(here), low, high);
        }
    }
    const __m512 unit = _mm512_set1_ps(run.unit);
#pragma GCC unroll 2
    for (int i = 0; i < kTiles; ++i) totals[i].add(parts[i].rows(), unit);
}

template <int kTiles>
void multiply_of(const uint8_t* codes, int64_t stride, int64_t positions, const VqNibbleRun* runs,
                 float* sums) {
    Totals totals[kTiles];
    int64_t left = positions;
    for (; left >= kVqNibbleRun; left -= kVqNibbleRun, codes += kRunBytes, ++runs) {
        // What comes after a tile's codes are those of the next tiles.
        const bool ends = left * kPositionBytes <= kVqPrefetchBytes;
        const int64_t ahead = kVqPrefetchBytes + (ends ? (kTiles - 1) * stride : 0);
        add_run<kTiles>(codes, stride, ahead, *runs, totals);
    }
    if (left > 0) {
        // What lies past the end has tables of 0, and codes that must not be read.
        alignas(64) uint8_t rest[kTiles * kRunBytes] = {};
        for (int i = 0; i < kTiles; ++i) {
            std::memcpy(rest + i * kRunBytes, codes + i * stride,
                        static_cast<size_t>(left * kPositionBytes));
        }
        add_run<kTiles>(rest, kRunBytes, 0, *runs, totals);
    }
    for (int i = 0; i < kTiles; ++i) totals[i].store(sums + i * kTileRows);
}

void multiply(const uint8_t* codes, int64_t stride, int64_t positions, int64_t tiles,
              const VqNibbleRun* runs, float* sums) {
    for (; tiles >= 2; tiles -= 2, codes += 2 * stride, sums += 2 * kTileRows) {
        multiply_of<2>(codes, stride, positions, runs, sums);
    }
    if (tiles == 1) multiply_of<1>(codes, stride, positions, runs, sums);
}

}  // namespace

const VqNibbleTable kVqNibbleAvx512 = {build_tables, multiply};

}  // namespace nowag::cpu
