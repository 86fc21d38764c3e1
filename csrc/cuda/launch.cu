#include "launch.h"

namespace nowag::cuda {

#ifdef NOWAG_SIMT

const char* last_error() { return ""; }

// Small, so that small matrices already meet every way of splitting the work.
DeviceLimits device_limits() { return {3, 100 << 10, false}; }

#else

namespace {
thread_local const char* error_of_this_thread = "";
}

const char* last_error() { return error_of_this_thread; }

Status check_runtime(cudaError_t error) {
    if (error == cudaSuccess) return Status::ok;
    error_of_this_thread = cudaGetErrorString(error);
    return Status::unsupported;
}

// Asked several times for every token of every layer.
DeviceLimits device_limits() {
    thread_local int known = -1;
    thread_local DeviceLimits limits{};
    int device = 0;
    cudaGetDevice(&device);
    if (device == known) return limits;
    int major = 0;
    limits = {1, 48 << 10, false};
    cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    limits.starts_early = major >= 9;
    known = device;
    return limits;
}

#endif

}  // namespace nowag::cuda
