// How a launcher starts a kernel, on CUDA and on the host SIMT executor.
//
// A launcher validates, then launches on the caller's stream and current device; it neither
// allocates nor synchronises, so that a CUDA graph can capture it. Scratch memory is the caller's:
// <op>_workspace(the same arguments) says how many bytes.
#pragma once

#include <cstddef>
#include <tuple>
#include <type_traits>

#include "cuda/base/device.cuh"
#include "nowag/format.h"
#include "nowag/operation.h"

namespace nowag::cuda {

constexpr int kMaxCluster = 8;  // blocks: what every device that has clusters takes

struct DeviceLimits {
    int multiprocessors;
    int shared_bytes;   // dynamic shared memory that one block can have
    bool starts_early;  // it has programmatic dependent launch (compute capability 9.0)
    // Clusters of so many blocks that run at once, each block with all of a multiprocessor's shared
    // memory; 0 where there are none. Multiprocessors of one cluster are neighbours, of which a
    // device has groups of several sizes: some may be left over.
    int clusters[kMaxCluster + 1];
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

template <typename... Parameters, typename... Arguments>
Status launch_after(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                    Stream stream, Arguments... arguments) {
    return launch(kernel, grid, block, shared_bytes, stream, arguments...);
}

// As launch, with every block resident at once: they may wait for each other.
template <typename... Parameters, typename... Arguments>
Status launch_together(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                       Stream, Arguments... arguments) {
    simt::run_grid_together(grid, block, shared_bytes, [&] { kernel(arguments...); });
    return Status::ok;
}

// As launch, in clusters of blocks that follow one another along x and see each other's shared
// memory (device.cuh). Where device_limits() has such clusters.
template <typename... Parameters, typename... Arguments>
Status launch_in_clusters(int cluster, void (*kernel)(Parameters...), unsigned blocks, dim3 block,
                          size_t shared_bytes, Stream, Arguments... arguments) {
    simt::run_grid_in_clusters(dim3(blocks), block, static_cast<unsigned>(cluster), shared_bytes,
                               [&] { kernel(arguments...); });
    return Status::ok;
}

inline Status clear(void* memory, size_t bytes, Stream) {
    std::memset(memory, 0, bytes);
    return Status::ok;
}
#else
Status check_runtime(cudaError_t error);

constexpr size_t kSharedWithoutAsking = 48 << 10;

// With an attribute, or none (null).
template <typename... Parameters, typename... Arguments>
Status launch_as(cudaLaunchAttribute* attribute, void (*kernel)(Parameters...), dim3 grid,
                 dim3 block, size_t shared_bytes, Stream stream, Arguments... arguments) {
    if (shared_bytes > kSharedWithoutAsking) {
        // Always the most there is, not what this launch needs: another thread may be launching the
        // same kernel at another size. No kernel has static shared memory, which would count too.
        const Status allowed =
            check_runtime(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                               static_cast<int>(device_limits().shared_bytes)));
        if (allowed != Status::ok) return allowed;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attribute;
    config.numAttrs = attribute == nullptr ? 0 : 1;
    return check_runtime(
        cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

template <typename... Parameters, typename... Arguments>
Status launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
              Stream stream, Arguments... arguments) {
    return launch_as(nullptr, kernel, grid, block, shared_bytes, stream, arguments...);
}

// As launch, for a kernel that follows another of the same launcher: it may start, and do what
// needs none of the others' results, as soon as that lets it (device.cuh). Why nothing is read too
// early or overwritten:
// - The first kernel of a launcher is launched plainly. It starts when all work before it in the
//   stream has ended, whoever's that was: the layer's weights are there, and nobody uses scratch
//   memory any more that torch has handed out again.
// - Each later kernel reads weights alone and writes shared memory alone before its threads call
//   wait_for_previous_kernel(), and all of them do. So no kernel ends before the one ahead of it,
//   and behind its wait all kernels of the launcher ahead of it have ended.
// - The last one lets nobody start: what follows in the stream sees a kernel like any other.
// A CUDA graph captures the launch as a programmatic edge, between two kernels always.
template <typename... Parameters, typename... Arguments>
Status launch_after(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                    Stream stream, Arguments... arguments) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    return launch_as(device_limits().starts_early ? &attribute : nullptr, kernel, grid, block,
                     shared_bytes, stream, arguments...);
}

inline cudaLaunchAttribute cluster_of(int blocks) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(blocks);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    return attribute;
}

// As launch, in clusters of blocks that follow one another along x and see each other's shared
// memory (device.cuh). Where device_limits() has such clusters.
template <typename... Parameters, typename... Arguments>
Status launch_in_clusters(int cluster, void (*kernel)(Parameters...), unsigned blocks, dim3 block,
                          size_t shared_bytes, Stream stream, Arguments... arguments) {
    cudaLaunchAttribute attribute = cluster_of(cluster);
    return launch_as(&attribute, kernel, dim3(blocks), block, shared_bytes, stream, arguments...);
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
