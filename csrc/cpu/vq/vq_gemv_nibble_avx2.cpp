#include "cpu/vq/vq_gemv_nibble.h"

namespace nowag::cpu {
namespace {

// 16-bit sums of rows 0, 2, .. 14, of 16, .. 30, of 1, .. 15, of 17, .. 31; a lane has a half of
// the positions.
struct Sums16 {
    __m256i rows[4];

    void add(const Halves& halves) {
        const __m256i factors = _mm256_set1_epi16((1 << kHalfBits) << 8 | 1);
        const auto whole = [&](__m256i pairs) { return _mm256_maddubs_epi16(factors, pairs); };
        const auto into = [&](__m256i& sum, __m256i pairs) {
            sum = _mm256_add_epi16(sum, whole(pairs));
        };
        into(rows[0], _mm256_unpacklo_epi8(halves.even_low, halves.even_high));
        into(rows[1], _mm256_unpackhi_epi8(halves.even_low, halves.even_high));
        into(rows[2], _mm256_unpacklo_epi8(halves.odd_low, halves.odd_high));
        into(rows[3], _mm256_unpackhi_epi8(halves.odd_low, halves.odd_high));
    }
};

// Every second of 16 rows, and the others, to all in order.
void store_rows(__m256 even, __m256 odd, float* out) {
    const __m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
    _mm256_storeu_ps(out, _mm256_permute2f128_ps(low, high, 0x20));
    _mm256_storeu_ps(out + 8, _mm256_permute2f128_ps(low, high, 0x31));
}

template <int kTiles>
class Totals {
  public:
    // += unit * the entries of a run.
    void add(const RunCodes& codes, const VqNibbleRun& run) {
        const __m256i zero = _mm256_setzero_si256();
        Sums16 sums[kTiles];
#pragma GCC unroll 2
        for (int i = 0; i < kTiles; ++i) sums[i] = {{zero, zero, zero, zero}};
        for (int begin = 0; begin < kVqNibbleRun * kPositionBytes;
             begin += kTogether * kRegisterBytes) {
            Halves parts[kTiles];
            add_halves(codes, begin, run, parts);
#pragma GCC unroll 2
            for (int i = 0; i < kTiles; ++i) sums[i].add(parts[i]);
        }
        const __m256 unit = _mm256_set1_ps(run.unit);
#pragma GCC unroll 2
        for (int i = 0; i < kTiles; ++i) {
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) {
                const __m128i both = _mm_add_epi16(_mm256_castsi256_si128(sums[i].rows[r]),
                                                   _mm256_extracti128_si256(sums[i].rows[r], 1));
                const __m256 values = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(both));
                rows_[i][r] = _mm256_fmadd_ps(values, unit, rows_[i][r]);
            }
        }
    }

    void store(float* out) const {
        for (const auto& rows : rows_) {
            store_rows(rows[0], rows[2], out);
            store_rows(rows[1], rows[3], out + kTileRows / 2);
            out += kTileRows;
        }
    }

  private:
    __m256 rows_[kTiles][4] = {};  // in the order of Sums16
};

}  // namespace

const VqNibbleTable kVqNibbleAvx2 = {build_tables, multiply<Totals>};

}  // namespace nowag::cpu
