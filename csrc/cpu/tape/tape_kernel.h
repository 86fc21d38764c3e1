// The arithmetic of tape.h, compiled once for each instruction set: the compiler vectorises these
// loops under the flags of the file that includes this. `static`, so that no instruction set's copy
// is ever linked in place of another's.
#pragma once

#include <cstdint>

#include "cpu/tape/tape_table.h"
#include "nowag/dtype.h"
#include "nowag/tape.h"

namespace nowag::cpu {

// Elements that are taken from memory to registers and back at a time.
constexpr int64_t kTapeChunk = 256;
// Partial sums of a sum, added up pairwise: the same on every instruction set.
constexpr int64_t kTapeLanes = 16;
// Keys whose scores are taken together.
constexpr int64_t kTapeKeys = 64;

constexpr float kTapeInfinity = __builtin_inff();

static inline const uint8_t* tape_at(const TapeTensor& tensor, int64_t element, int64_t size) {
    return reinterpret_cast<const uint8_t*>(tensor.address) + element * size;
}

template <typename T, typename Convert>
static void tape_read(const T* from, int64_t stride, int64_t count, float* to, Convert convert) {
    if (stride == 1) {
        for (int64_t j = 0; j < count; ++j) to[j] = convert(from[j]);
    } else if (stride == 0) {
        const float value = convert(from[0]);
        for (int64_t j = 0; j < count; ++j) to[j] = value;
    } else {
        for (int64_t j = 0; j < count; ++j) to[j] = convert(from[j * stride]);
    }
}

// `count` elements from `element` on, `stride` apart, as floats.
static void tape_load(const TapeTensor& tensor, int64_t element, int64_t stride, int64_t count,
                      float* to) {
    switch (tensor.type) {
        case TapeType::float32:
            tape_read(reinterpret_cast<const float*>(tape_at(tensor, element, 4)), stride, count,
                      to, [](float value) { return value; });
            break;
        case TapeType::float16:
            tape_read(reinterpret_cast<const uint16_t*>(tape_at(tensor, element, 2)), stride, count,
                      to, [](uint16_t value) { return float16_to_float(value); });
            break;
        case TapeType::bfloat16:
            tape_read(reinterpret_cast<const uint16_t*>(tape_at(tensor, element, 2)), stride, count,
                      to, [](uint16_t value) { return bfloat16_to_float(value); });
            break;
        case TapeType::int64:
            tape_read(reinterpret_cast<const int64_t*>(tape_at(tensor, element, 8)), stride, count,
                      to, [](int64_t value) { return static_cast<float>(value); });
            break;
        default:
            tape_read(tape_at(tensor, element, 1), stride, count, to,
                      [](uint8_t value) { return value != 0 ? 1.0f : 0.0f; });
    }
}

template <typename T, typename Convert>
static void tape_write(const float* from, int64_t stride, int64_t count, T* to, Convert convert) {
    if (stride == 1) {
        for (int64_t j = 0; j < count; ++j) to[j] = convert(from[j]);
    } else {
        for (int64_t j = 0; j < count; ++j) to[j * stride] = convert(from[j]);
    }
}

static void tape_store(const float* from, const TapeTensor& tensor, int64_t element, int64_t stride,
                       int64_t count) {
    switch (tensor.type) {
        case TapeType::float32:
            tape_write(from, stride, count, reinterpret_cast<float*>(tensor.address) + element,
                       [](float value) { return value; });
            break;
        case TapeType::float16:
            tape_write(from, stride, count, reinterpret_cast<uint16_t*>(tensor.address) + element,
                       [](float value) { return float_to_float16(value); });
            break;
        default:
            tape_write(from, stride, count, reinterpret_cast<uint16_t*>(tensor.address) + element,
                       [](float value) { return float_to_bfloat16(value); });
    }
}

// Within 2 units in the last place; what would be subnormal or more than the largest float is the
// smallest normal number or near the largest.
static inline float tape_exp(float x) {
    x = x < -87.3f ? -87.3f : x;
    x = x > 88.7f ? 88.7f : x;
    // x = n log 2 + r: adding 1.5 * 2^23 rounds to an integer, in the last places of the sum.
    const float shifted = x * 0x1.715476p0f + 0x1.8p23f, n = shifted - 0x1.8p23f;
    const float r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
    float sum = 0x1.6c16c2p-10f;
    sum = sum * r + 0x1.111112p-7f;
    sum = sum * r + 0x1.555556p-5f;
    sum = sum * r + 0x1.555556p-3f;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    return sum * bits_float((float_bits(shifted) << 23) + 0x3f800000u);
}

static inline float tape_sigmoid(float x) { return 1.0f / (1.0f + tape_exp(-x)); }

static inline float tape_tanh(float x) {
    // Near 0 the difference below would lose all places: there the series is exact enough.
    const float square = x * x;
    const float series = x * (1.0f + square * (-1.0f / 3.0f + square * (2.0f / 15.0f)));
    const float whole = 1.0f - 2.0f / (tape_exp(2.0f * x) + 1.0f);
    return square < 0.0025f ? series : whole;
}

template <typename Function>
static inline void tape_map(float* x, const float* y, int64_t count, Function function) {
    for (int64_t j = 0; j < count; ++j) x[j] = function(x[j], y[j]);
}

// x = op(x, y, z), for what has no other operands.
static void tape_apply(TapeOp op, float* x, const float* y, const float* z, int64_t count) {
    switch (op) {
        case TapeOp::negate:
            tape_map(x, x, count, [](float a, float) { return -a; });
            break;
        case TapeOp::reciprocal_sqrt:
            tape_map(x, x, count, [](float a, float) { return 1.0f / __builtin_sqrtf(a); });
            break;
        case TapeOp::silu:
            tape_map(x, x, count, [](float a, float) { return a / (1.0f + tape_exp(-a)); });
            break;
        case TapeOp::sigmoid:
            tape_map(x, x, count, [](float a, float) { return tape_sigmoid(a); });
            break;
        case TapeOp::tanh:
            tape_map(x, x, count, [](float a, float) { return tape_tanh(a); });
            break;
        case TapeOp::gelu_tanh:
            // a (1 + tanh(u)) / 2 = a sigmoid(2 u)
            tape_map(x, x, count, [](float a, float) {
                const float u = 0x1.988454p-1f * (a + 0.044715f * a * a * a);
                return a * tape_sigmoid(2.0f * u);
            });
            break;
        case TapeOp::add:
            tape_map(x, y, count, [](float a, float b) { return a + b; });
            break;
        case TapeOp::subtract:
            tape_map(x, y, count, [](float a, float b) { return a - b; });
            break;
        case TapeOp::multiply:
            tape_map(x, y, count, [](float a, float b) { return a * b; });
            break;
        case TapeOp::divide:
            tape_map(x, y, count, [](float a, float b) { return a / b; });
            break;
        case TapeOp::select:
            for (int64_t j = 0; j < count; ++j) x[j] = x[j] != 0.0f ? y[j] : z[j];
            break;
        default:  // copy
            break;
    }
}

static inline int64_t tape_offset(const TapeTensor& tensor, int64_t i, int64_t j, int64_t k) {
    return i * tensor.strides[0] + j * tensor.strides[1] + k * tensor.strides[2];
}

// Calls body(offset of a row of each of out, a, b, c) for every row of the step.
template <typename Body>
static void tape_rows(const TapeStep& step, Body&& body) {
    for (int64_t i = 0; i < step.sizes[0]; ++i) {
        for (int64_t j = 0; j < step.sizes[1]; ++j) {
            for (int64_t k = 0; k < step.sizes[2]; ++k) {
                body(tape_offset(step.out, i, j, k), tape_offset(step.a, i, j, k),
                     tape_offset(step.b, i, j, k), tape_offset(step.c, i, j, k));
            }
        }
    }
}

static int64_t tape_integer(const TapeTensor& tensor, int64_t element) {
    switch (tensor.type) {
        case TapeType::int64:
            return *reinterpret_cast<const int64_t*>(tape_at(tensor, element, 8));
        case TapeType::boolean:
            return *tape_at(tensor, element, 1) != 0;
        default: {
            float value;
            tape_load(tensor, element, 0, 1, &value);
            return static_cast<int64_t>(value);
        }
    }
}

static void tape_integers(const TapeStep& step) {
    auto* out = reinterpret_cast<int64_t*>(step.out.address);
    const bool adds = step.op == TapeOp::add;
    tape_rows(step, [&](int64_t out_at, int64_t a_at, int64_t b_at, int64_t) {
        for (int64_t j = 0; j < step.sizes[3]; ++j) {
            int64_t value = tape_integer(step.a, a_at + j * step.a.strides[3]);
            if (adds) value += tape_integer(step.b, b_at + j * step.b.strides[3]);
            out[out_at + j * step.out.strides[3]] = value;
        }
    });
}

static void tape_elements(const TapeStep& step) {
    float x[kTapeChunk], y[kTapeChunk], z[kTapeChunk];
    const int64_t last = kTapeDims - 1;
    const bool has_b = step.op >= TapeOp::add, has_c = step.op == TapeOp::select;
    tape_rows(step, [&](int64_t out_at, int64_t a_at, int64_t b_at, int64_t c_at) {
        for (int64_t begin = 0; begin < step.sizes[last]; begin += kTapeChunk) {
            const int64_t left = step.sizes[last] - begin;
            const int64_t count = left < kTapeChunk ? left : kTapeChunk;
            const auto load = [&](const TapeTensor& tensor, int64_t at, float* to) {
                const int64_t stride = tensor.strides[last];
                tape_load(tensor, at + begin * stride, stride, count, to);
            };
            load(step.a, a_at, x);
            if (has_b) load(step.b, b_at, y);
            if (has_c) load(step.c, c_at, z);
            tape_apply(step.op, x, y, z, count);
            const int64_t stride = step.out.strides[last];
            tape_store(x, step.out, out_at + begin * stride, stride, count);
        }
    });
}

static float tape_total(float* lanes) {
    for (int64_t half = kTapeLanes / 2; half > 0; half /= 2) {
        for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    return lanes[0];
}

static void tape_mean(const TapeStep& step) {
    float x[kTapeChunk];
    const int64_t count = step.sizes[kTapeDims - 1], stride = step.a.strides[kTapeDims - 1];
    tape_rows(step, [&](int64_t out_at, int64_t a_at, int64_t, int64_t) {
        float lanes[kTapeLanes] = {};
        for (int64_t begin = 0; begin < count; begin += kTapeChunk) {
            const int64_t size = count - begin < kTapeChunk ? count - begin : kTapeChunk;
            tape_load(step.a, a_at + begin * stride, stride, size, x);
            for (int64_t j = size; j % kTapeLanes != 0; ++j) x[j] = 0.0f;
            for (int64_t j = 0; j < size; j += kTapeLanes) {
                for (int64_t lane = 0; lane < kTapeLanes; ++lane) lanes[lane] += x[j + lane];
            }
        }
        const float mean = tape_total(lanes) / static_cast<float>(count);
        tape_store(&mean, step.out, out_at, 1, 1);
    });
}

static void tape_step(const TapeStep& step) {
    if (step.out.type == TapeType::int64) {
        tape_integers(step);
    } else if (step.op == TapeOp::mean) {
        tape_mean(step);
    } else {
        tape_elements(step);
    }
}

static int64_t tape_visible_keys(const TapeStep& step, int64_t batch, int64_t head) {
    if (step.d.address == 0) return step.extent;
    int64_t visible = 0;
    for (int64_t query = 0; query < step.sizes[2]; ++query) {
        const int64_t row = tape_offset(step.d, batch, head, query), stride = step.d.strides[3];
        for (int64_t end = step.extent; end > visible;) {
            float added[kTapeChunk];
            const int64_t begin = end > kTapeChunk ? end - kTapeChunk : 0;
            tape_load(step.d, row + begin * stride, stride, end - begin, added);
            while (end > begin && added[end - 1 - begin] == -kTapeInfinity) --end;
            if (end > begin) {
                visible = end > visible ? end : visible;
                break;
            }
        }
    }
    return visible;
}

// The scores of `keys` keys from `first` on for all queries, [query][key of the block].
static void tape_scores(const TapeStep& step, int64_t batch, int64_t head, int64_t first,
                        int64_t keys, const float* queries, float* scores) {
    const int64_t features = step.sizes[3];
    float key[kTapeFeatures];
    for (int64_t features_end = features; features_end % kTapeLanes != 0; ++features_end) {
        key[features_end] = 0.0f;
    }
    const float scale = static_cast<float>(step.scale);
    for (int64_t j = 0; j < keys; ++j) {
        tape_load(step.b, tape_offset(step.b, batch, head, first + j), step.b.strides[3], features,
                  key);
        for (int64_t query = 0; query < step.sizes[2]; ++query) {
            const float* q = queries + query * kTapeFeatures;
            float lanes[kTapeLanes] = {};
            for (int64_t f = 0; f < features; f += kTapeLanes) {
                for (int64_t lane = 0; lane < kTapeLanes; ++lane) {
                    lanes[lane] += q[f + lane] * key[f + lane];
                }
            }
            scores[query * kTapeKeys + j] = tape_total(lanes) * scale;
        }
    }
    if (step.d.address == 0) return;
    float added[kTapeKeys];
    for (int64_t query = 0; query < step.sizes[2]; ++query) {
        const int64_t stride = step.d.strides[3];
        tape_load(step.d, tape_offset(step.d, batch, head, query) + first * stride, stride, keys,
                  added);
        for (int64_t j = 0; j < keys; ++j) scores[query * kTapeKeys + j] += added[j];
    }
}

// Softmax as keys come (Milakov & Gimelshein, arXiv 1805.02867): sums are kept relative to the
// largest score so far.
static void tape_attend(const TapeStep& step, int64_t batch, int64_t head, int64_t visible) {
    const int64_t count = step.sizes[2], features = step.sizes[3];
    float queries[kTapeQueries * kTapeFeatures], sums[kTapeQueries * kTapeFeatures];
    float scores[kTapeQueries * kTapeKeys], value[kTapeFeatures];
    float largest[kTapeQueries], weights[kTapeQueries];
    for (int64_t query = 0; query < count; ++query) {
        float* q = queries + query * kTapeFeatures;
        tape_load(step.a, tape_offset(step.a, batch, head, query), step.a.strides[3], features, q);
        for (int64_t f = features; f % kTapeLanes != 0; ++f) q[f] = 0.0f;
        for (int64_t f = 0; f < features; ++f) sums[query * kTapeFeatures + f] = 0.0f;
        largest[query] = -kTapeInfinity;
        weights[query] = 0.0f;
    }
    for (int64_t first = 0; first < visible; first += kTapeKeys) {
        const int64_t keys = visible - first < kTapeKeys ? visible - first : kTapeKeys;
        tape_scores(step, batch, head, first, keys, queries, scores);
        for (int64_t query = 0; query < count; ++query) {
            float* row = scores + query * kTapeKeys;
            float top = largest[query];
            for (int64_t j = 0; j < keys; ++j) top = row[j] > top ? row[j] : top;
            const float base = top == -kTapeInfinity ? 0.0f : top;
            const float shrink = top == largest[query] ? 1.0f : tape_exp(largest[query] - base);
            for (int64_t j = 0; j < keys; ++j) {
                row[j] = row[j] == -kTapeInfinity ? 0.0f : tape_exp(row[j] - base);
            }
            float total = 0.0f;
            for (int64_t j = 0; j < keys; ++j) total += row[j];
            weights[query] = weights[query] * shrink + total;
            for (int64_t f = 0; f < features; ++f) sums[query * kTapeFeatures + f] *= shrink;
            largest[query] = top;
        }
        for (int64_t j = 0; j < keys; ++j) {
            tape_load(step.c, tape_offset(step.c, batch, head, first + j), step.c.strides[3],
                      features, value);
            for (int64_t query = 0; query < count; ++query) {
                const float weight = scores[query * kTapeKeys + j];
                float* sum = sums + query * kTapeFeatures;
                for (int64_t f = 0; f < features; ++f) sum[f] += weight * value[f];
            }
        }
    }
    for (int64_t query = 0; query < count; ++query) {
        float* sum = sums + query * kTapeFeatures;
        // A query to which no key is visible attends to nothing.
        const float total = largest[query] == -kTapeInfinity ? 1.0f : weights[query];
        for (int64_t f = 0; f < features; ++f) sum[f] /= total;
        tape_store(sum, step.out, tape_offset(step.out, batch, head, query), step.out.strides[3],
                   features);
    }
}

static constexpr TapeTable kTapeTable = {tape_step, tape_visible_keys, tape_attend};

}  // namespace nowag::cpu
