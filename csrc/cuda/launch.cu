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

DeviceLimits device_limits() {
    int device = 0;
    int major = 0;
    DeviceLimits limits{1, 48 << 10, false};
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    limits.starts_early = major >= 9;
    return limits;
}

#endif

}  // namespace nowag::cuda
