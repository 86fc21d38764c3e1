// Decode: see vq_gemv.h.
#include <algorithm>

#include "cpu/base/buffer.h"
#include "cpu/base/simd.h"
#include "cpu/vq/vq_gemv_product.h"
#include "cpu/vq/vq_gemv_table.h"

namespace nowag::cpu {
namespace {

const VqDecodeTable* decode_table() {
#ifdef NOWAG_X86
    return simd_pick(&kVqDecodeScalar, &kVqDecodeAvx2, &kVqDecodeAvx512,
                     static_cast<const VqDecodeTable*>(nullptr));
#else
    return &kVqDecodeScalar;
#endif
}

// The rows of a tile from the sums of all tokens, [tokens, 32].
void finish_tile(const VqProblem& problem, int64_t tile, const float* sums) {
    const int64_t first = tile * kTileRows;
    const int64_t height = std::min<int64_t>(kTileRows, problem.rows - first);
    for (int64_t t = 0; t < problem.tokens; ++t) {
        finish_rows(problem, t, first, height, sums + t * kTileRows);
    }
}

// A tile of 32 rows is a part.
class Decode : public VqProduct {
  public:
    explicit Decode(const VqProblem& problem)
        : VqProduct(problem),
          lanes_(problem.d <= 4 ? 4 : 8),
          // With company, tokens fill whole vectors of 16 floats.
          together_(problem.tokens == 1 ? 1 : 16 / lanes_),
          stride_(ceil_div(problem.tokens, together_) * together_),
          inputs_(buffer<float>(problem.positions() * stride_ * lanes_)),
          codebook_(buffer<float>(problem.entries() * lanes_)) {}

    // The inputs as VqDecodeTile wants them: [positions, stride, lanes], zeros in all padding.
    void prepare(int64_t) override {
        const int64_t positions = problem_.positions(), d = problem_.d;
        std::fill_n(inputs_.get(), positions * stride_ * lanes_, 0.0f);
        const Buffer<float> scaled = buffer<float>(positions * d);
        for (int64_t t = 0; t < problem_.tokens; ++t) {
            scaled_inputs(problem_, t, scaled.get());
            for (int64_t p = 0; p < positions; ++p) {
                std::copy_n(&scaled[p * d], d, &inputs_[(p * stride_ + t) * lanes_]);
            }
        }
        decode_table()->arrange_codebook(problem_.codebook, problem_.entries(), problem_.d, lanes_,
                                         codebook_.get());
    }

    int64_t parts() const override { return problem_.tiles(); }

    void multiply(int64_t tile) override {
        float sums[kVqGemvMaxTokens * kTileRows];
        decode_table()->multiply_tile({problem_.packed + tile * problem_.stride(), codebook_.get(),
                                       inputs_.get(), problem_.positions(), problem_.code_bits,
                                       lanes_, static_cast<int>(problem_.tokens), stride_,
                                       problem_.codes_end(), sums});
        finish_tile(problem_, tile, sums);
    }

  private:
    const int lanes_;
    const int64_t together_, stride_;
    const Buffer<float> inputs_;
    const Buffer<float> codebook_;
};

class DecodeIntegers : public VqProduct {
  public:
    DecodeIntegers(const VqProblem& problem, const VqIntegerTable& kernel)
        : VqProduct(problem),
          kernel_(kernel),
          stride_(ceil_div(problem.positions(), kVqIntegerRun)),
          codebook_(buffer<int16_t>(problem.entries() * kVqIntegerLanes)),
          runs_(buffer<VqIntegerRun>(ceil_div(problem.tokens, 2) * stride_)) {}

    void prepare(int64_t) override {
        const int64_t positions = problem_.positions(), tokens = problem_.tokens;
        const float unit = kernel_.arrange_codebook(problem_.codebook, problem_.entries(),
                                                    problem_.d, codebook_.get());
        // The last token alone has nobody beside it.
        if (tokens % 2 == 1) std::fill_n(&runs_[tokens / 2 * stride_], stride_, VqIntegerRun{});
        const Buffer<float> scaled = buffer<float>(positions * problem_.d);
        for (int64_t t = 0; t < tokens; ++t) {
            scaled_inputs(problem_, t, scaled.get());
            kernel_.arrange_inputs(scaled.get(), problem_.d, positions, unit,
                                   static_cast<int>(t % 2), &runs_[t / 2 * stride_]);
        }
    }

    int64_t parts() const override { return problem_.tiles(); }

    void multiply(int64_t tile) override {
        float sums[kVqGemvMaxTokens * kTileRows];
        kernel_.multiply_tile({problem_.packed + tile * problem_.stride(), codebook_.get(),
                               runs_.get(), problem_.positions(), problem_.code_bits,
                               static_cast<int>(problem_.tokens), problem_.codes_end(), sums});
        finish_tile(problem_, tile, sums);
    }

  private:
    const VqIntegerTable& kernel_;
    const int64_t stride_;  // runs of a token
    const Buffer<int16_t> codebook_;
    const Buffer<VqIntegerRun> runs_;
};

}  // namespace

void scaled_inputs(const VqProblem& problem, int64_t token, float* out) {
    const int64_t offset = token * problem.cols * dtype_size(problem.dtype);
    decode_table()->scale_inputs(static_cast<const char*>(problem.x) + offset, problem.dtype,
                                 problem.col_norms, problem.cols, out);
    std::fill(out + problem.cols, out + problem.positions() * problem.d, 0.0f);
}

void finish_rows(const VqProblem& problem, int64_t token, int64_t first, int64_t rows,
                 const float* sums) {
    const int64_t size = dtype_size(problem.dtype);
    const char* bias = static_cast<const char*>(problem.bias);
    decode_table()->finish(sums, problem.row_norms + first,
                           bias == nullptr ? nullptr : bias + first * size, problem.dtype, rows,
                           static_cast<char*>(problem.y) + (token * problem.rows + first) * size);
}

std::unique_ptr<VqProduct> vq_decode(const VqProblem& problem) {
    if (problem.d > 4 && decode_table()->integers != nullptr) {
        return std::make_unique<DecodeIntegers>(problem, *decode_table()->integers);
    }
    return std::make_unique<Decode>(problem);
}

}  // namespace nowag::cpu
