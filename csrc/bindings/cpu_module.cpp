// nowag_ext._cpu: every operation's CPU side under its name, the constants of the contracts, and
// the instruction set.
#include <sys/syscall.h>
#include <unistd.h>

#include "bindings/binding.h"
#include "cpu/base/interrupt.h"
#include "cpu/base/simd.h"
#include "nowag/dtype.h"
#include "nowag/format.h"
#include "nowag/kmeans_feedback.h"
#include "nowag/tape.h"

namespace nowag::bindings {
namespace {

// Statuses say all there is to say.
const char* no_reason() { return ""; }

// Runs the Python handlers of the signals that have come; whether one raised. Python does so on its
// main thread alone; the others do not wait for the GIL, which they have no use for.
bool signal_raised() {
    if (syscall(SYS_gettid) != getpid()) return false;
    const PyGILState_STATE state = PyGILState_Ensure();
    const bool raised = PyErr_CheckSignals() != 0;
    PyGILState_Release(state);
    return raised;
}

void add_constants(py::module_& module) {
    module.attr("format_version") = kFormatVersion;
    module.attr("tile_rows") = kTileRows;
    module.attr("max_subvector") = kMaxSubvector;
    module.attr("max_code_bits") = kMaxCodeBits;
    module.attr("bitmap_align") = kBitmapAlign;
    module.attr("max_group") = kMaxGroup;
    module.attr("norm_eps") = kNormEps;
    module.attr("vq_gemv_max_tokens") = kVqGemvMaxTokens;
    module.attr("vq_max_members") = kVqMaxMembers;
    module.attr("sparse_gemv_max_tokens") = kSparseGemvMaxTokens;
    module.attr("float32") = static_cast<int>(DType::float32);
    module.attr("float16") = static_cast<int>(DType::float16);
    module.attr("bfloat16") = static_cast<int>(DType::bfloat16);
    module.attr("tape_words") = kTapeWords;
    module.attr("tape_queries") = kTapeQueries;
    module.attr("tape_features") = kTapeFeatures;
    module.attr("tape_int64") = static_cast<int>(TapeType::int64);
    module.attr("tape_boolean") = static_cast<int>(TapeType::boolean);
#define NOWAG_ADD_TAPE_OP(name) module.attr("tape_" #name) = static_cast<int>(TapeOp::name);
    NOWAG_TAPE_OPS(NOWAG_ADD_TAPE_OP)
#undef NOWAG_ADD_TAPE_OP
    module.attr("init_random") = static_cast<int>(KmeansInit::random);
    module.attr("init_plus_plus") = static_cast<int>(KmeansInit::plus_plus);
}

void add_instruction_set(py::module_& module) {
    if (const char* refused = cpu::simd_refused()) {
        throw std::runtime_error(
            std::string("NOWAG_SIMD=") + refused +
            " is not an instruction set of this machine and build; the best is " +
            cpu::simd_name(cpu::simd_best()));
    }
    module.def(
        "simd_level", [] { return cpu::simd_name(cpu::simd_level()); }, "simd_level() -> str");
    module.def("simd_best", [] { return cpu::simd_name(cpu::simd_best()); }, "simd_best() -> str");
}

void add_limits(py::module_& module) {
    module.def(
        "vq_gemv_device_tokens",
        [](int dtype, int d, int code_bits) {
            return vq_gemv_device_tokens(static_cast<DType>(dtype), d, code_bits);
        },
        "vq_gemv_device_tokens(dtype: int, d: int, code_bits: int) -> int");
}

}  // namespace
}  // namespace nowag::bindings

#define NOWAG_BIND(name)                                                           \
    nowag::bindings::bind(module, {#name, nowag::bindings::no_reason},             \
                          std::string(nowag::name##_parameters) + ", int threads", \
                          nowag::cpu::name);
#define NOWAG_BIND_LISTED(stem, name) NOWAG_BIND(name)

PYBIND11_MODULE(_cpu, module) {
    pybind11::options options;
    options.disable_function_signatures();
    nowag::cpu::set_interrupt_check(nowag::bindings::signal_raised);
    nowag::bindings::add_instruction_set(module);
    nowag::bindings::add_constants(module);
    nowag::bindings::add_limits(module);
    NOWAG_OPERATIONS(NOWAG_BIND_LISTED)
    NOWAG_CPU_OPERATIONS(NOWAG_BIND_LISTED)
}
