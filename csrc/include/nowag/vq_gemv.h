// y = x W^T + bias for few tokens, straight from the packed form (format.h); W is never expanded.
//
//   x     [tokens, cols] of `dtype`, contiguous;  y [tokens, rows] of `dtype`, contiguous
//   bias  [rows] of `dtype`, or null
//   y[t, i] = row_norms[i] * sum_p T_p[code(i, p)] + bias[i]
//   T_p[k]  = sum_j (x_j col_norms_j) c_kj
//
// Which algorithm runs depends on the instruction set and the layer's shape, on a GPU on the number
// of tokens too.
//   decode: fetches the codebook entry of each code and multiplies. float32 throughout, but for
//           d > 4 on AVX2 and above: entries are 14-bit integers in one unit for the codebook, x_j
//           col_norms_j in one for each token and run of 16 positions, whose products are summed
//           exactly.
//   lookup: computes T_p once for every position and adds T_p[code] for every row.
//           Codes of 8 bits, 512 rows or more, on AVX2 and AVX-512: T_p is float32.
//           The same on AVX-512 VBMI: T_p is rounded to 16-bit integers, and sums of integers are
//           exact. Each group of at most kVqLookupGroup positions has two scales, one for the
//           positions whose products are small, one for the others (those of a model's outlier
//           channels).
//           Codes of 4 bits, on AVX2 and above: T_p is rounded to 12-bit integers in one unit for
//           each run of 16 positions, which are summed exactly.
//           Codes of 12 bits and d = 6 on a GPU, one token: T_p is float32. The same, two tokens of
//           16 bits: T_p is rounded to float16, scaled by a power of two for each token and
//           position.
//   split:  decodes on a GPU's tensor cores, for up to 16 tokens: d = 6 at 12 bits, where lookup
//           does not take them, and d = 4 at 8 and 12; up to 8 in one kernel where blocks come in
//           clusters. x_j col_norms_j is the sum of two float16 numbers, scaled by a power of two
//           for each token and run of 8 positions.
//   batch:  the same for 17 to 64 tokens of 16 bits. x_j col_norms_j is rounded to one float16
//           number, scaled by a power of two for each token.
// The sum, times the norm, plus the bias is rounded to `dtype` once. A token's outputs do not
// depend on the other tokens, on their order or on the number of threads. They do not depend on the
// number of tokens up to 16 on a CPU; on a GPU 1, 2, 3 to 8, 9 to 16 and more may have other bits,
// and two GPUs of one model too: how many clusters run at once differs from chip to chip.
// They differ between instruction sets, within the error bound.
//
// Error bound, y64 being the same product in float64:
//   |y - y64| <= 8e-6 * sum_j |x_j W_ij| + rounding to `dtype`
//                and, for decode in integers,
//                + row_norms[i] * sum over positions of d * M * max |c_kj| / 8000,
//                M = the largest |x_j col_norms_j| of the position's run (an M or max |c_k| below
//                2^-85 counts as that);
//                or, for lookup of 16-bit integers,
//                + row_norms[i] * sum over groups and scales of (their positions) * L / 62000,
//                L = their largest  sum_j |x_j col_norms_j| max_k |c_kj|,  a bound of |T_p[k]|;
//                of 12-bit integers,
//                + row_norms[i] * sum over positions of L / 4000,
//                L = the largest  sum_j |x_j col_norms_j c_kj|  of the position's run (one below
//                2^-85 counts as that);
//                of float16,
//                + 5e-4 * sum_j |x_j W_ij| + row_norms[i] * sum over positions of 2^-38 * L,
//                L = sum_j |x_j col_norms_j| max |c_kj|, of all k and j (L below 2^-112 counts as
//                that, a max of 0 as 2^-24): products far smaller than it lose bits;
//                or, for split,
//                + row_norms[i] * sum over runs of 2^-39 * M * sum_j |c_kj|,
//                M = the run's largest |x_j col_norms_j|: inputs far smaller than it lose bits;
//                or, for batch,
//                the same with the whole token for a run, + 5.7e-4 * sum_j |x_j W_ij|: what
//                rounding W to float16 would lose, and an eighth of what bfloat16 does.
// On a GPU an input that is not finite makes all outputs of its token inf or NaN, and no others.
// In practice rounding errors cancel: ||y - y64|| / ||y64|| <= 2e-3 on inputs with outlier channels
// (tested; on SmolLM2's layers with its own activations 1e-3 at most, 2e-4 typically).
#pragma once

#include <cstdint>

#include "nowag/dtype.h"
#include "nowag/operation.h"

namespace nowag {

// The most tokens the kernel takes; nowag_ext/ops dequantises tiles into a dense GEMM beyond. On a
// GPU it takes kVqGemvBatchTokens of 16 bits where codes go straight to tensor cores.
constexpr int64_t kVqGemvMaxTokens = 16;
constexpr int64_t kVqGemvBatchTokens = 64;

constexpr bool vq_gemv_on_tensor_cores(int d, int code_bits) {
    return (d == 4 && code_bits == 8) || (code_bits == 12 && (d == 4 || d == 6));
}

constexpr int64_t vq_gemv_device_tokens(DType dtype, int d, int code_bits) {
    return dtype != DType::float32 && vq_gemv_on_tensor_cores(d, code_bits) ? kVqGemvBatchTokens
                                                                            : kVqGemvMaxTokens;
}

// The most positions of a group, whose sums are added up in order: the unit of work of a CPU's
// thread. On VBMI 16-bit sums of 256 bytes cannot overflow, and the tables, 128 KiB, stay in an L2
// cache. Long runs of positions let codes stream from memory.
constexpr int64_t kVqLookupGroup = 256;

// On a GPU the codebook is aligned to 4 bytes.
NOWAG_DECLARE(vq_gemv, const void* x, DType dtype, int64_t tokens, const uint8_t* packed,
              const uint16_t* codebook, const uint16_t* row_norms, const uint16_t* col_norms,
              const void* bias, int64_t rows, int64_t cols, int d, int code_bits, void* y);

// Several products of the same x at once: linears that read the same input. On a CPU the bits are
// those of vq_gemv; on a GPU sums are cut elsewhere, for up to 8 tokens, and the bound is the same.
//
// A member is kVqMemberWords integers of 64 bits in the host's memory: its addresses and sizes, in
// the order of VqMember.
constexpr int64_t kVqMaxMembers = 8;

struct VqMember {
    const uint8_t* packed;
    const uint16_t* codebook;
    const uint16_t* row_norms;
    const uint16_t* col_norms;
    const void* bias;  // or null
    int64_t rows;
    int d;
    int code_bits;
    void* y;
};

constexpr int64_t kVqMemberWords = 9;

inline VqMember vq_member(const int64_t* members, int64_t index) {
    const int64_t* words = members + index * kVqMemberWords;
    const auto at = [&](int word) { return reinterpret_cast<void*>(words[word]); };
    return {static_cast<const uint8_t*>(at(0)),
            static_cast<const uint16_t*>(at(1)),
            static_cast<const uint16_t*>(at(2)),
            static_cast<const uint16_t*>(at(3)),
            at(4),
            words[5],
            static_cast<int>(words[6]),
            static_cast<int>(words[7]),
            at(8)};
}

NOWAG_DECLARE(vq_gemv_group, const void* x, DType dtype, int64_t tokens, int64_t cols,
              const int64_t* members, int64_t count);

}  // namespace nowag
