// Dense rows from codes: for each code its entry times the row's norm times the columns' norms,
// written 4 or 8 wide. Where d is smaller than that, the next code's values overwrite the excess.
#include <immintrin.h>

#include "cpu/vq_expand_avx2.h"
#include "cpu/vq_pack_table.h"
#include "cpu/vq_unpack_avx2.h"
#include "nowag/format.h"

namespace nowag::cpu {
namespace {

// Positions unpacked at a time: their 8 KiB of offsets stay in L1.
constexpr int64_t kDenseBlock = 64;

template <int kLanes>
__m256 load(const float* p) {
    if constexpr (kLanes == 8) return _mm256_loadu_ps(p);
    return _mm256_castps128_ps256(_mm_loadu_ps(p));
}

struct Row {
    const char* entries;
    const uint32_t* offsets;  // of this row's codes, kTileRows apart
    __m256 norm;
    void* out;
    int64_t out_begin;  // element of `out` at which the row starts
};

// Values of block positions [begin, end), the first of which is position `first` of the row.
template <int kLanes, DType kType>
void write_whole(const VqDenseTile& tile, const Row& row, int64_t first, int64_t begin,
                 int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
        const float* entry =
            reinterpret_cast<const float*>(row.entries + row.offsets[p * kTileRows]);
        const int64_t column = (first + p) * tile.d;
        const __m256 value = _mm256_mul_ps(_mm256_mul_ps(row.norm, load<kLanes>(entry)),
                                           load<kLanes>(tile.col_norms + column));
        store<kLanes>(row.out, row.out_begin + column, kType, value);
    }
}

// The same for sub-vectors of exactly 4, two at a time.
template <DType kType>
int64_t write_pairs(const VqDenseTile& tile, const Row& row, int64_t first, int64_t end) {
    int64_t p = 0;
    for (; p + 2 <= end; p += 2) {
        const auto entry = [&](int64_t at) {
            return _mm_load_ps(
                reinterpret_cast<const float*>(row.entries + row.offsets[at * kTileRows]));
        };
        const int64_t column = (first + p) * 4;
        const __m256 value =
            _mm256_mul_ps(_mm256_mul_ps(row.norm, _mm256_set_m128(entry(p + 1), entry(p))),
                          _mm256_loadu_ps(tile.col_norms + column));
        store<8>(row.out, row.out_begin + column, kType, value);
    }
    return p;
}

// Values one by one, where a whole vector would reach past the row's end.
void write_single(const VqDenseTile& tile, const Row& row, int64_t first, int64_t begin,
                  int64_t end) {
    const float norm = _mm256_cvtss_f32(row.norm);
    for (int64_t p = begin; p < end; ++p) {
        const float* entry =
            reinterpret_cast<const float*>(row.entries + row.offsets[p * kTileRows]);
        for (int j = 0; j < tile.d && (first + p) * tile.d + j < tile.cols; ++j) {
            const int64_t column = (first + p) * tile.d + j;
            store_float(row.out, row.out_begin + column, tile.dtype,
                        (norm * entry[j]) * tile.col_norms[column]);
        }
    }
}

template <int kLanes, DType kType>
void dequantize_as(const VqDenseTile& tile) {
    const Unpacker unpacker(tile.code_bits, kLanes == 8 ? 5 : 4);
    alignas(64) uint32_t offsets[kDenseBlock * kTileRows];
    // Positions from here on are too near the row's end for a whole vector.
    const int64_t fits = tile.cols < kLanes ? 0 : (tile.cols - kLanes) / tile.d + 1;
    for (int64_t first = 0; first < tile.positions; first += kDenseBlock) {
        const int64_t left = tile.positions - first;
        const int64_t count = left < kDenseBlock ? left : kDenseBlock;
        unpacker.unpack_positions(tile.codes + first * unpacker.bytes(), count, tile.codes_end,
                                  offsets);
        const int64_t room = fits > first ? fits - first : 0;
        const int64_t whole = room < count ? room : count;
        for (int r = 0; r < tile.height; ++r) {
            const Row row{reinterpret_cast<const char*>(tile.entries), offsets + r,
                          _mm256_set1_ps(tile.row_norms[r]), tile.out, r * tile.out_stride};
            int64_t done = 0;
            if (kLanes == 4 && tile.d == 4) done = write_pairs<kType>(tile, row, first, whole);
            write_whole<kLanes, kType>(tile, row, first, done, whole);
            write_single(tile, row, first, whole, count);
        }
    }
}

template <int kLanes>
void dequantize_lanes(const VqDenseTile& tile) {
    switch (tile.dtype) {
        case DType::float32:
            return dequantize_as<kLanes, DType::float32>(tile);
        case DType::float16:
            return dequantize_as<kLanes, DType::float16>(tile);
        case DType::bfloat16:
            return dequantize_as<kLanes, DType::bfloat16>(tile);
    }
}

void dequantize_tile(const VqDenseTile& tile) {
    return tile.lanes == 8 ? dequantize_lanes<8>(tile) : dequantize_lanes<4>(tile);
}

}  // namespace

const VqPackTable kVqPackAvx2 = {widen, expand_codebook, dequantize_tile};

}  // namespace nowag::cpu
