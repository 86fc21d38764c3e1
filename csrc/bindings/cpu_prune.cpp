#include "bindings/binding.h"
#include "nowag/prune.h"

namespace nowag::bindings {

void bind_prune(py::module_& module) {
    module.def("prune_select", [](Address w, Address h, int64_t rows, int64_t cols, int64_t n_prune,
                                  Address bitmap, int threads) {
        run("prune_select", [&] {
            return cpu::prune_select(pointer<const float>(w), pointer<const float>(h), rows, cols,
                                     n_prune, pointer<uint8_t>(bitmap), threads);
        });
    });
    module.def("prune_select_nm", [](Address w, Address h, int64_t rows, int64_t cols, int n, int m,
                                     Address bitmap, int threads) {
        run("prune_select_nm", [&] {
            return cpu::prune_select_nm(pointer<const float>(w), pointer<const float>(h), rows,
                                        cols, n, m, pointer<uint8_t>(bitmap), threads);
        });
    });
    module.def("prune_objective", [](Address w, Address h, Address bitmap, int64_t rows,
                                     int64_t cols, Address sums, int threads) {
        run("prune_objective", [&] {
            return cpu::prune_objective(pointer<const float>(w), pointer<const float>(h),
                                        pointer<const uint8_t>(bitmap), rows, cols,
                                        pointer<double>(sums), threads);
        });
    });
}

}  // namespace nowag::bindings
