// What the seeding kernels share: sums over a warp, and how floats become the integers that are
// summed and scanned (base/block.cuh), so that any order gives the same bits.
#pragma once

#include "cuda/base/block.cuh"

namespace nowag::cuda {

constexpr int kSeedThreads = 512;
constexpr int kSeedWarps = kSeedThreads / kWarpSize;

__device__ __forceinline__ unsigned long long warp_sum(unsigned long long value) {
    for (int flip = kWarpSize / 2; flip > 0; flip /= 2) {
        value += __shfl_xor_sync(kFullWarp, value, flip);
    }
    return value;
}

// Raises *largest, the bits of a float that is not negative, to the largest value of the warp.
__device__ __forceinline__ void raise_to_warp(unsigned* largest, float value) {
    for (int flip = kWarpSize / 2; flip > 0; flip /= 2) {
        value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, flip));
    }
    const volatile unsigned* seen = largest;  // it only rises: most warps need no atomic operation
    const unsigned bits = __float_as_uint(value);
    if (lane_of_thread() == 0 && bits > *seen) atomicMax(largest, bits);
}

// 2^(bits - exponent), where *largest holds the bits of a float and exponent is that of the float
// (frexp): the float times this scale is less than 2^bits.
__device__ __forceinline__ double scale_to_bits(const unsigned* largest, int bits) {
    const volatile unsigned* seen = largest;
    int exponent = 0;
    frexpf(__uint_as_float(*seen), &exponent);
    return ldexp(1.0, bits - exponent);
}

__device__ __forceinline__ unsigned long long quantized(float value, double scale) {
    return static_cast<unsigned long long>(round_to_integer(value * scale));
}

}  // namespace nowag::cuda
