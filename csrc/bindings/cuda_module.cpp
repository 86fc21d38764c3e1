// nowag_ext._cuda: every operation's launcher under its name, with the arguments of _cpu's
// function, then scratch memory and the stream; and <name>_workspace, which says how much scratch
// memory the same arguments need, in bytes.
#include "bindings/binding.h"
#include "cuda/base/error.h"

#define NOWAG_BIND(stem, name)                                                      \
    nowag::bindings::bind(module, {#name "_workspace", nowag::cuda::take_error},    \
                          nowag::name##_parameters, nowag::cuda::name##_workspace); \
    nowag::bindings::bind(                                                          \
        module, {#name, nowag::cuda::take_error},                                   \
        std::string(nowag::name##_parameters) + ", void* workspace, Stream stream", \
        nowag::cuda::name);

PYBIND11_MODULE(_cuda, module) {
    pybind11::options options;
    options.disable_function_signatures();
    NOWAG_OPERATIONS(NOWAG_BIND)
}
