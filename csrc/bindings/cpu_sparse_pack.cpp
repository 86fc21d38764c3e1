#include "bindings/binding.h"
#include "nowag/sparse_pack.h"

namespace nowag::bindings {

void bind_sparse_pack(py::module_& module) {
    module.def("sparse_offsets",
               [](Address bitmap, int64_t rows, int64_t cols, Address row_offsets, int threads) {
                   run("sparse_offsets", [&] {
                       return cpu::sparse_offsets(pointer<const uint8_t>(bitmap), rows, cols,
                                                  pointer<int32_t>(row_offsets), threads);
                   });
               });
    module.def(
        "sparse_pack", [](Address weight, int dtype, int64_t rows, int64_t cols, int64_t row_stride,
                          Address bitmap, Address row_offsets, Address values, int threads) {
            run("sparse_pack", [&] {
                return cpu::sparse_pack(pointer<const void>(weight), static_cast<DType>(dtype),
                                        rows, cols, row_stride, pointer<const uint8_t>(bitmap),
                                        pointer<const int32_t>(row_offsets), pointer<void>(values),
                                        threads);
            });
        });
    module.def("sparse_dequantize",
               [](Address bitmap, Address values, int values_dtype, Address row_offsets,
                  int64_t rows, int64_t cols, int64_t row_begin, int64_t row_end, Address out,
                  int out_dtype, int64_t out_stride, int threads) {
                   run("sparse_dequantize", [&] {
                       return cpu::sparse_dequantize(
                           pointer<const uint8_t>(bitmap), pointer<const void>(values),
                           static_cast<DType>(values_dtype), pointer<const int32_t>(row_offsets),
                           rows, cols, row_begin, row_end, pointer<void>(out),
                           static_cast<DType>(out_dtype), out_stride, threads);
                   });
               });
}

}  // namespace nowag::bindings
