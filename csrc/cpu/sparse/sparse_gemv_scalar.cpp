#include "cpu/sparse/sparse_gemv_table.h"

namespace nowag::cpu {
namespace {

constexpr int64_t kWord = 64;

uint64_t word_at(const uint8_t* bits, int64_t j) {
    uint64_t word;
    std::memcpy(&word, bits + j / 8, sizeof word);
    return word;
}

template <DType Values>
float dot_row(const float* x, int64_t cols, const uint8_t* bits, const void* values) {
    int64_t next = 0;
    float sum = 0.0f;
    for (int64_t chunk = 0; chunk < cols; chunk += kSparseGemvChunk) {
        float chunk_sum = 0.0f;
        for (int64_t j = chunk; j < chunk + kSparseGemvChunk && j < cols; j += kWord) {
            float word_sum = 0.0f;
            for (uint64_t left = word_at(bits, j); left != 0; left &= left - 1) {
                word_sum += x[j + __builtin_ctzll(left)] * load_float(values, next++, Values);
            }
            chunk_sum += word_sum;
        }
        sum += chunk_sum;
    }
    return sum;
}

template <DType Values>
void dot(const SparseGemvBlock& block, float* sums) {
    for (int64_t t = 0; t < block.tokens; ++t) {
        const float* x = block.x + t * block.x_stride;
        for (int64_t r = 0; r < block.rows; ++r) {
            sums[t * block.rows + r] = dot_row<Values>(
                x, block.x_stride, block.bitmap + r * block.row_bytes, block.values[r]);
        }
    }
}

}  // namespace

const SparseGemvTable kSparseGemvScalar = {
    {dot<DType::float32>, dot<DType::float16>, dot<DType::bfloat16>}, {nullptr, nullptr, nullptr}};

}  // namespace nowag::cpu
