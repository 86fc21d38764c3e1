// Small operations on dense tensors, one after another: what a decoder's token is made of beside
// its linears. There are a thousand of them, on a few hundred to a few thousand elements each, and
// torch's dispatcher takes longer for one than its arithmetic does.
//
// A tape is an array of steps, a step kTapeWords integers of 64 bits, in this order:
//   op       a TapeOp
//   sizes    [4], of the output unless the operation says otherwise
//   out, a, b, c, d   operands: address (0: none), TapeType, strides [4] in elements
//   extent   a size, where the operation has one more
//   scale    a float64's bits
// A dimension along which an operand is the same has stride 0. Arithmetic is float32, rounded to
// the output's type once: torch's, but for the order of sums and the last places of exp. Outputs of
// int64 are computed in int64. An operand may lie where the output does, element for element; other
// overlaps are not allowed. Steps run in order, each on what those before it wrote.
//
//   copy             out = a
//   negate           out = -a
//   reciprocal_sqrt  out = 1 / sqrt(a)
//   silu, sigmoid    out = a / (1 + exp(-a)), 1 / (1 + exp(-a))
//   tanh, gelu_tanh  out = tanh(a), a (1 + tanh(sqrt(2 / pi) (a + 0.044715 a^3))) / 2
//   add, subtract    out = a + b, a - b
//   multiply, divide out = a b, a / b
//   select           out = a ? b : c
//   mean             out = the mean of a over the last dimension; sizes are a's
//   index_copy       out[b[i], ...] = a[i, ...]; sizes are a's, b holds int64 in [0, extent)
//   attention        out = softmax(scale a b^T + d) c;  sizes are those of out and of a, the
//                    queries: batch, heads, queries, features. b and c are the keys and values,
//                    [.., extent, features]; d, if there is one, is added to scores, [.., queries,
//                    extent]; a query of which all are -inf gets 0. At most kTapeQueries queries
//                    and kTapeFeatures features.
#pragma once

#include <cstdint>

#include "nowag/operation.h"

namespace nowag {

#define NOWAG_TAPE_OPS(EACH) \
    EACH(copy)               \
    EACH(negate)             \
    EACH(reciprocal_sqrt)    \
    EACH(silu)               \
    EACH(sigmoid)            \
    EACH(tanh)               \
    EACH(gelu_tanh)          \
    EACH(add)                \
    EACH(subtract)           \
    EACH(multiply)           \
    EACH(divide)             \
    EACH(select)             \
    EACH(mean)               \
    EACH(index_copy)         \
    EACH(attention)

#define NOWAG_ENUMERATOR(name) name,
enum class TapeOp : int64_t { NOWAG_TAPE_OPS(NOWAG_ENUMERATOR) count };
#undef NOWAG_ENUMERATOR

// The first three are those of DType. int64 and boolean are read as floats where the output is one.
enum class TapeType : int64_t { float32 = 0, float16, bfloat16, int64, boolean, count };

constexpr int64_t kTapeDims = 4;
constexpr int64_t kTapeQueries = 32;
constexpr int64_t kTapeFeatures = 256;

struct TapeTensor {
    int64_t address;
    TapeType type;
    int64_t strides[kTapeDims];
};

struct TapeStep {
    TapeOp op;
    int64_t sizes[kTapeDims];
    TapeTensor out, a, b, c, d;
    int64_t extent;
    double scale;
};

constexpr int64_t kTapeWords = sizeof(TapeStep) / sizeof(int64_t);

// Runs `count` steps. invalid_argument at a step that is none, or an index out of range: those
// before it have run. The same bits for any number of threads.
NOWAG_DECLARE_CPU(tape_run, const int64_t* steps, int64_t count);

}  // namespace nowag
