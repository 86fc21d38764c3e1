// What the seeding kernels share: sums and scans over the threads of a block, in integers, so that
// any order gives the same bits, and how floats become those integers.
#pragma once

#include "cuda/base/device.cuh"

namespace nowag::cuda {

constexpr int kSeedThreads = 512;
constexpr int kSeedWarps = kSeedThreads / kWarpSize;

__device__ __forceinline__ int lane_of_thread() { return threadIdx.x % kWarpSize; }
__device__ __forceinline__ int warp_of_thread() { return threadIdx.x / kWarpSize; }

__device__ __forceinline__ unsigned long long warp_sum(unsigned long long value) {
    for (int flip = kWarpSize / 2; flip > 0; flip /= 2) {
        value += __shfl_xor_sync(kFullWarp, value, flip);
    }
    return value;
}

struct BlockScan {
    unsigned long long upto;   // the sum over the threads up to and with this one
    unsigned long long total;  // over all threads
};

// Every thread calls it. warp_sums: kSeedWarps numbers in shared memory.
__device__ __forceinline__ BlockScan block_scan(unsigned long long value,
                                                unsigned long long* warp_sums) {
    for (int step = 1; step < kWarpSize; step *= 2) {
        const unsigned long long before = __shfl_up_sync(kFullWarp, value, step);
        if (lane_of_thread() >= step) value += before;
    }
    __syncthreads();
    if (lane_of_thread() == kWarpSize - 1) warp_sums[warp_of_thread()] = value;
    __syncthreads();
    BlockScan scan{value, 0};
    for (int warp = 0; warp < kSeedWarps; ++warp) {
        if (warp < warp_of_thread()) scan.upto += warp_sums[warp];
        scan.total += warp_sums[warp];
    }
    return scan;
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
