// Codebooks and norms as floats, one by one.
#pragma once

#include <cstdint>

#include "nowag/dtype.h"

namespace nowag::cpu {
namespace {

// float16 [count] -> float [count]
[[maybe_unused]] void widen(const uint16_t* halves, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = float16_to_float(halves[i]);
}

// float16 [entries, d] -> float [entries, lanes], zeros in the padding
void expand_codebook(const uint16_t* codebook, int64_t entries, int d, int lanes, float* out) {
    for (int64_t k = 0; k < entries; ++k) {
        for (int j = 0; j < lanes; ++j) {
            out[k * lanes + j] = j < d ? float16_to_float(codebook[k * d + j]) : 0.0f;
        }
    }
}

}  // namespace
}  // namespace nowag::cpu
