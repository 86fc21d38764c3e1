#include "cpu/vq/vq_gemv_nibble.h"

namespace nowag::cpu {
namespace {

static_assert(kVqNibbleRun * kPositionBytes == kTogether * kRegisterBytes);

// Halves of the sums of the first one's lanes, then of the second one's.
__m512i add_lanes(__m512i first, __m512i second) {
    return _mm512_add_epi16(_mm512_shuffle_i64x2(first, second, _MM_SHUFFLE(1, 0, 1, 0)),
                            _mm512_shuffle_i64x2(first, second, _MM_SHUFFLE(3, 2, 3, 2)));
}

// 16-bit sums over all lanes: of rows 0, 2, .. 30, then of 1, 3, .. 31.
__m512i sums_of(const Halves& halves) {
    const __m512i factors = _mm512_set1_epi16((1 << kHalfBits) << 8 | 1);
    const auto whole = [&](__m512i pairs) { return _mm512_maddubs_epi16(factors, pairs); };
    const __m512i even = add_lanes(whole(_mm512_unpacklo_epi8(halves.even_low, halves.even_high)),
                                   whole(_mm512_unpackhi_epi8(halves.even_low, halves.even_high)));
    const __m512i odd = add_lanes(whole(_mm512_unpacklo_epi8(halves.odd_low, halves.odd_high)),
                                  whole(_mm512_unpackhi_epi8(halves.odd_low, halves.odd_high)));
    return _mm512_add_epi16(_mm512_shuffle_i64x2(even, odd, _MM_SHUFFLE(2, 0, 2, 0)),
                            _mm512_shuffle_i64x2(even, odd, _MM_SHUFFLE(3, 1, 3, 1)));
}

__m512 floats(__m256i words) { return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(words)); }

template <int kTiles>
class Totals {
  public:
    // += unit * the entries of a run.
    void add(const RunCodes& codes, const VqNibbleRun& run) {
        Halves parts[kTiles];
        add_halves(codes, 0, run, parts);
        const __m512 unit = _mm512_set1_ps(run.unit);
#pragma GCC unroll 2
        for (int i = 0; i < kTiles; ++i) {
            const __m512i sums = sums_of(parts[i]);
            even_[i] = _mm512_fmadd_ps(floats(_mm512_castsi512_si256(sums)), unit, even_[i]);
            odd_[i] = _mm512_fmadd_ps(floats(_mm512_extracti64x4_epi64(sums, 1)), unit, odd_[i]);
        }
    }

    void store(float* out) const {
        const __m512i first =
            _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        for (int i = 0; i < kTiles; ++i, out += kTileRows) {
            _mm512_storeu_ps(out, _mm512_permutex2var_ps(even_[i], first, odd_[i]));
            _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(even_[i], second, odd_[i]));
        }
    }

  private:
    __m512 even_[kTiles] = {}, odd_[kTiles] = {};  // of a tile's even rows, and of its odd ones
};

}  // namespace

const VqNibbleTable kVqNibbleAvx512 = {build_tables, multiply<Totals>};

}  // namespace nowag::cpu
