// One product of vq_gemv.h, and the algorithms that it can be computed by.
#pragma once

#include <cstdint>
#include <memory>

#include "nowag/dtype.h"
#include "nowag/format.h"

namespace nowag::cpu {

struct VqProblem {
    const void* x;
    DType dtype;
    int64_t tokens;
    int64_t cols;
    const uint8_t* packed;
    const uint16_t* codebook;
    const uint16_t* row_norms;
    const uint16_t* col_norms;
    const void* bias;
    int64_t rows;
    int d;
    int code_bits;
    void* y;

    int64_t positions() const { return code_positions(cols, d); }
    int64_t codes() const { return rows * positions(); }
    int64_t tiles() const { return row_tiles(rows); }
    int64_t entries() const { return int64_t{1} << code_bits; }
    // Bytes of a tile's codes, and where all codes end.
    int64_t stride() const { return positions() * tile_bytes(code_bits); }
    const uint8_t* codes_end() const { return packed + tiles() * stride(); }
};

// One product: parts of what is made of its inputs, then parts of the product, each in any order
// and on any thread; then what is left.
class VqProduct {
  public:
    explicit VqProduct(const VqProblem& problem) : problem_(problem) {}
    VqProduct(const VqProduct&) = delete;
    VqProduct& operator=(const VqProduct&) = delete;
    virtual ~VqProduct() = default;

    virtual int64_t preparations() const { return 1; }
    virtual void prepare(int64_t index) = 0;
    virtual int64_t parts() const = 0;
    virtual void multiply(int64_t part) = 0;
    virtual void finish() {}

  protected:
    const VqProblem problem_;
};

// Tables of fewer positions are built sooner than a second thread starts.
constexpr int64_t kPositionsForThreads = 512;

// By tables of products (lookup): of codes of 8 bits and of 4. Null where the layer is no such, or
// the instruction set has nothing for it.
std::unique_ptr<VqProduct> vq_look_up(const VqProblem& problem, int threads);
std::unique_ptr<VqProduct> vq_look_up_nibbles(const VqProblem& problem, int threads);
// By entries (decode): of any layer.
std::unique_ptr<VqProduct> vq_decode(const VqProblem& problem);

// x * col_norms of one token, [positions * d], zeros in the padding.
void scaled_inputs(const VqProblem& problem, int64_t token, float* out);
// Rows [first, first + rows) of a token's y from their sums.
void finish_rows(const VqProblem& problem, int64_t token, int64_t first, int64_t rows,
                 const float* sums);

}  // namespace nowag::cpu
