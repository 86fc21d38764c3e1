// How a launcher starts a kernel, on CUDA and on the host SIMT executor.
//
// A launcher validates, then launches on the caller's stream and current device; it neither
// allocates nor synchronises, so that a CUDA graph can capture it. Scratch memory is the caller's:
// <op>_workspace(the same arguments) says how many bytes.
#pragma once

#include <cstddef>
#include <tuple>
#include <type_traits>

#include "device.cuh"
#include "launchers.h"
#include "nowag/format.h"
#include "nowag/status.h"

namespace nowag::cuda {

struct DeviceLimits {
    int multiprocessors;
    int shared_bytes;  // dynamic shared memory that one block can have
};

// Of the current device.
DeviceLimits device_limits();

#ifdef NOWAG_SIMT
template <typename... Parameters, typename... Arguments>
Status launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Stream,
              Arguments... arguments) {
    simt::run_grid(grid, block, shared_bytes, [&] { kernel(arguments...); });
    return Status::ok;
}

// As launch, with every block resident at once: they may wait for each other.
template <typename... Parameters, typename... Arguments>
Status launch_together(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                       Stream, Arguments... arguments) {
    simt::run_grid_together(grid, block, shared_bytes, [&] { kernel(arguments...); });
    return Status::ok;
}

inline Status clear(void* memory, size_t bytes, Stream) {
    std::memset(memory, 0, bytes);
    return Status::ok;
}
#else
Status check_runtime(cudaError_t error);

constexpr size_t kSharedWithoutAsking = 48 << 10;

template <typename... Parameters, typename... Arguments>
Status launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
              Stream stream, Arguments... arguments) {
    if (shared_bytes > kSharedWithoutAsking) {
        const Status allowed = check_runtime(cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
        if (allowed != Status::ok) return allowed;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    return check_runtime(
        cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

// As launch, with every block resident at once: they may wait for each other.
template <typename... Parameters, typename... Arguments>
Status launch_together(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                       Stream stream, Arguments... arguments) {
    std::tuple<std::decay_t<Parameters>...> values(static_cast<Parameters>(arguments)...);
    return std::apply(
        [&](auto&... value) {
            void* addresses[] = {&value...};
            return check_runtime(cudaLaunchCooperativeKernel(
                kernel, grid, block, addresses, shared_bytes, static_cast<cudaStream_t>(stream)));
        },
        values);
}

inline Status clear(void* memory, size_t bytes, Stream stream) {
    return check_runtime(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)));
}
#endif

inline unsigned blocks_for(int64_t work, int64_t each) {
    return static_cast<unsigned>(ceil_div(work, each));
}

// Runs the steps of a launcher in order, up to the first that fails.
template <typename... Steps>
Status in_order(Steps&&... steps) {
    Status status = Status::ok;
    (void)(((status = steps()) == Status::ok) && ...);
    return status;
}

}  // namespace nowag::cuda
