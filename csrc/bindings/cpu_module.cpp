// nowag_ext._cpu: one bind_* a header in include/nowag.
#include "bindings/binding.h"
#include "cpu/base/simd.h"
#include "nowag/format.h"

namespace nowag::bindings {
void bind_normalize(py::module_& module);
void bind_kmeans(py::module_& module);
void bind_prune(py::module_& module);
void bind_vq_pack(py::module_& module);
void bind_sparse_pack(py::module_& module);
void bind_vq_gemv(py::module_& module);
void bind_sparse_gemv(py::module_& module);
}  // namespace nowag::bindings

PYBIND11_MODULE(_cpu, module) {
    using namespace nowag;
    if (const char* refused = cpu::simd_refused()) {
        throw std::runtime_error(
            std::string("NOWAG_SIMD=") + refused +
            " is not an instruction set of this machine and build; the best is " +
            cpu::simd_name(cpu::simd_best()));
    }
    module.attr("format_version") = kFormatVersion;
    module.attr("tile_rows") = kTileRows;
    module.def("simd_level", [] { return cpu::simd_name(cpu::simd_level()); });
    module.def("simd_best", [] { return cpu::simd_name(cpu::simd_best()); });
    bindings::bind_normalize(module);
    bindings::bind_kmeans(module);
    bindings::bind_prune(module);
    bindings::bind_vq_pack(module);
    bindings::bind_sparse_pack(module);
    bindings::bind_vq_gemv(module);
    bindings::bind_sparse_gemv(module);
}
