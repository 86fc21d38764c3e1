// Sums and scans over the threads of a block, in integers: any order gives the same bits.
#pragma once

#include "cuda/base/device.cuh"

namespace nowag::cuda {

__device__ __forceinline__ int lane_of_thread() { return threadIdx.x % kWarpSize; }
__device__ __forceinline__ int warp_of_thread() { return threadIdx.x / kWarpSize; }

// The sum over the lanes up to and with this one.
template <typename T>
__device__ __forceinline__ T warp_scan(T value) {
    for (int step = 1; step < kWarpSize; step *= 2) {
        const T before = __shfl_up_sync(kFullWarp, value, step);
        if (lane_of_thread() >= step) value += before;
    }
    return value;
}

template <typename T>
struct BlockScan {
    T upto;   // the sum over the threads up to and with this one
    T total;  // over all threads
};

// kThreads: those of the block, all of which call it. T: an integer type. warp_sums: shared memory
// for kThreads / kWarpSize numbers, which may hold what an earlier scan left.
template <int kThreads, typename T>
__device__ __forceinline__ BlockScan<T> block_scan(T value, T* warp_sums) {
    value = warp_scan(value);
    __syncthreads();
    if (lane_of_thread() == kWarpSize - 1) warp_sums[warp_of_thread()] = value;
    __syncthreads();
    BlockScan<T> scan{value, 0};
    for (int warp = 0; warp < kThreads / kWarpSize; ++warp) {
        if (warp < warp_of_thread()) scan.upto += warp_sums[warp];
        scan.total += warp_sums[warp];
    }
    return scan;
}

// The sum over a block's threads alone. Every thread calls it and gets the result; warp_sums as
// for block_scan.
template <int kThreads>
__device__ __forceinline__ unsigned block_sum(unsigned value, unsigned* warp_sums) {
    value = __reduce_add_sync(kFullWarp, value);
    __syncthreads();
    if (lane_of_thread() == 0) warp_sums[warp_of_thread()] = value;
    __syncthreads();
    unsigned sum = 0;
    for (int warp = 0; warp < kThreads / kWarpSize; ++warp) sum += warp_sums[warp];
    return sum;
}

}  // namespace nowag::cuda
