#include "bindings/binding.h"
#include "nowag/normalize.h"

namespace nowag::bindings {

void bind_normalize(py::module_& module) {
    module.def("normalize", [](Address weight, int dtype, int64_t rows, int64_t cols,
                               int64_t row_stride, Address out, Address row_norms,
                               Address col_norms, int threads) {
        run("normalize", [&] {
            return cpu::normalize(pointer<const void>(weight), static_cast<DType>(dtype), rows,
                                  cols, row_stride, pointer<float>(out), pointer<float>(row_norms),
                                  pointer<float>(col_norms), threads);
        });
    });
}

}  // namespace nowag::bindings
