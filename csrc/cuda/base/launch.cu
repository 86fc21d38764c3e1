#include <cstdlib>
#include <utility>

#include "cuda/base/error.h"
#include "cuda/base/launch.h"

namespace nowag::cuda {

#ifdef NOWAG_SIMT

const char* take_error() { return ""; }

// Small, so that small matrices already meet every way of splitting the work. Tests say otherwise:
// shared memory in KiB, and how many clusters of 1, 2, 3, ... blocks run at once, "4,2,1".
DeviceLimits device_limits() {
    const auto setting = [](const char* name, const char* otherwise) {
        const char* text = std::getenv(name);
        return text == nullptr ? otherwise : text;
    };
    DeviceLimits limits{3, std::atoi(setting("SIMT_SHARED_KIB", "100")) << 10, false, {}};
    char* rest = const_cast<char*>(setting("SIMT_CLUSTERS", ""));
    for (int size = 1; *rest != '\0' && size <= kMaxCluster; ++size) {
        limits.clusters[size] = static_cast<int>(std::strtol(rest, &rest, 10));
        rest += *rest == ',';
    }
    return limits;
}

#else

namespace {

thread_local const char* error_of_this_thread = "";

// Never launched: its attributes tell what all kernels were compiled for.
__global__ void probe() {}

// Sizes that the device refuses have no clusters.
void count_clusters(DeviceLimits* limits) {
    for (int size = 1; size <= kMaxCluster; ++size) {
        cudaLaunchAttribute attribute = cluster_of(size);
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(static_cast<unsigned>(size));
        config.blockDim = dim3(kWarpSize);
        config.dynamicSmemBytes = static_cast<size_t>(limits->shared_bytes);
        config.attrs = &attribute;
        config.numAttrs = 1;
        int* found = limits->clusters + size;
        if (cudaOccupancyMaxActiveClusters(found, probe, &config) == cudaSuccess) continue;
        (void)cudaGetLastError();
        *found = 0;
    }
}

Status ask_device(int device, DeviceLimits* limits) {
    cudaFuncAttributes compiled{};
    const auto attribute = [&](int* value, cudaDeviceAttr name) {
        return check_runtime(cudaDeviceGetAttribute(value, name, device));
    };
    const Status status = in_order(
        [&] { return attribute(&limits->multiprocessors, cudaDevAttrMultiProcessorCount); },
        [&] { return attribute(&limits->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin); },
        [&] { return check_runtime(cudaFuncGetAttributes(&compiled, probe)); });
    // Code for older devices, compiled again for this one, does not wait for the kernel before it,
    // and has no clusters.
    limits->starts_early = compiled.ptxVersion >= 90;
    if (status != Status::ok || !limits->starts_early) return status;
    const Status allowed = check_runtime(cudaFuncSetAttribute(
        probe, cudaFuncAttributeMaxDynamicSharedMemorySize, limits->shared_bytes));
    if (allowed == Status::ok) count_clusters(limits);
    return allowed;
}

}  // namespace

const char* take_error() { return std::exchange(error_of_this_thread, ""); }

Status check_runtime(cudaError_t error) {
    if (error == cudaSuccess) return Status::ok;
    const bool no_code =
        error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction;
    error_of_this_thread =
        no_code ? "no kernel for this device: nowag_ext is for compute capability 8.0 and newer, "
                  "and this build for those that NOWAG_CUDA_ARCHS named"
                : cudaGetErrorString(error);
    return Status::unsupported;
}

// Asked several times for every token of every layer, which may be spread over several devices.
DeviceLimits device_limits() {
    constexpr int kRemembered = 64;
    thread_local DeviceLimits known[kRemembered]{};
    DeviceLimits limits{1, static_cast<int>(kSharedWithoutAsking), false, {}};
    int device = -1;
    if (check_runtime(cudaGetDevice(&device)) != Status::ok) return limits;
    const bool remembered = device < kRemembered;
    if (remembered && known[device].multiprocessors > 0) return known[device];
    if (ask_device(device, &limits) == Status::ok && remembered) known[device] = limits;
    return limits;
}

#endif

}  // namespace nowag::cuda
