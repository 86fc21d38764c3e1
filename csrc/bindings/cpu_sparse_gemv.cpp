#include "bindings/binding.h"
#include "nowag/sparse_gemv.h"

namespace nowag::bindings {

void bind_sparse_gemv(py::module_& module) {
    module.def("sparse_gemv", [](Address x, int dtype, int64_t tokens, Address bitmap,
                                 Address values, int values_dtype, Address row_offsets,
                                 Address bias, int64_t rows, int64_t cols, Address y, int threads) {
        run("sparse_gemv", [&] {
            return cpu::sparse_gemv(pointer<const void>(x), static_cast<DType>(dtype), tokens,
                                    pointer<const uint8_t>(bitmap), pointer<const void>(values),
                                    static_cast<DType>(values_dtype),
                                    pointer<const int32_t>(row_offsets), pointer<const void>(bias),
                                    rows, cols, pointer<void>(y), threads);
        });
    });
}

}  // namespace nowag::bindings
