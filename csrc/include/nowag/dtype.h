// Element types that cross the boundary between Python and the kernels, and their conversions.
//
// The conversions are bit-exact on every instruction set: widening is exact, narrowing rounds to
// nearest, ties to even, and keeps NaN a NaN. `static` because each instruction set compiles its
// own copy: a function shared across translation units might be the one built with AVX-512.
#pragma once

#include <cstdint>
#include <cstring>

namespace nowag {

// The numbers reach Python as attributes of the compiled module.
enum class DType : int { float32 = 0, float16 = 1, bfloat16 = 2 };

static inline int64_t dtype_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

static inline uint32_t float_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float bits_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float bfloat16_to_float(uint16_t half) {
    return bits_float(static_cast<uint32_t>(half) << 16);
}

static inline uint16_t float_to_bfloat16(float value) {
    const uint32_t bits = float_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x0040u);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float float16_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
    // Normal and subnormal alike: shift into place, then scale by 2^112 to correct the exponent.
    const float scaled = bits_float(magnitude << 13) * 0x1p112f;
    return bits_float(sign | float_bits(scaled));
}

static inline uint16_t float_to_float16(float value) {
    const uint32_t bits = float_bits(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // >= 65536
    if (magnitude < 0x38800000u) {
        // Subnormal half: adding 0.5 puts the last place of a half at the last place of the float,
        // so the addition itself rounds to nearest even.
        const float shifted = bits_float(magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (float_bits(shifted) - 0x3f000000u));
    }
    const uint32_t odd = (magnitude >> 13) & 1u;
    return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

// Reads or writes element `index` of an array of `dtype` as a float.
static inline float load_float(const void* data, int64_t index, DType dtype) {
    if (dtype == DType::float32) return static_cast<const float*>(data)[index];
    const uint16_t half = static_cast<const uint16_t*>(data)[index];
    return dtype == DType::float16 ? float16_to_float(half) : bfloat16_to_float(half);
}

static inline void store_float(void* data, int64_t index, DType dtype, float value) {
    if (dtype == DType::float32) {
        static_cast<float*>(data)[index] = value;
    } else {
        static_cast<uint16_t*>(data)[index] =
            dtype == DType::float16 ? float_to_float16(value) : float_to_bfloat16(value);
    }
}

}  // namespace nowag
