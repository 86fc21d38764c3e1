#include <cstdlib>
#include <utility>

#include "cuda/base/error.h"
#include "cuda/base/launch.h"

namespace nowag::cuda {

#ifdef NOWAG_SIMT

const char* take_error() { return ""; }

// Small, so that small matrices already meet every way of splitting the work; shared memory as the
// smallest devices have it, or of as many KiB as a test says.
DeviceLimits device_limits() {
    const char* shared = std::getenv("SIMT_SHARED_KIB");
    return {3, (shared == nullptr ? 100 : std::atoi(shared)) << 10, false};
}

#else

namespace {

thread_local const char* error_of_this_thread = "";

// Never launched: its attributes tell what all kernels were compiled for.
__global__ void probe() {}

Status ask_device(int device, DeviceLimits* limits) {
    cudaFuncAttributes compiled{};
    const auto attribute = [&](int* value, cudaDeviceAttr name) {
        return check_runtime(cudaDeviceGetAttribute(value, name, device));
    };
    const Status status = in_order(
        [&] { return attribute(&limits->multiprocessors, cudaDevAttrMultiProcessorCount); },
        [&] { return attribute(&limits->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin); },
        [&] { return check_runtime(cudaFuncGetAttributes(&compiled, probe)); });
    // Code for older devices, compiled again for this one, does not wait for the kernel before it.
    limits->starts_early = compiled.ptxVersion >= 90;
    return status;
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

// Asked several times for every token of every layer.
DeviceLimits device_limits() {
    thread_local int known = -1;
    thread_local DeviceLimits limits{};
    int device = -1;
    if (check_runtime(cudaGetDevice(&device)) == Status::ok && device == known) return limits;
    limits = {1, static_cast<int>(kSharedWithoutAsking), false};
    known = ask_device(device, &limits) == Status::ok ? device : -1;
    return limits;
}

#endif

}  // namespace nowag::cuda
