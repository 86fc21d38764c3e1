#include "bindings/binding.h"
#include "nowag/vq_pack.h"

namespace nowag::bindings {

void bind_vq_pack(py::module_& module) {
    module.def("pack_codes", [](Address codes, int64_t rows, int64_t positions, int code_bits,
                                Address packed, int threads) {
        run("pack_codes", [&] {
            return cpu::pack_codes(pointer<const uint16_t>(codes), rows, positions, code_bits,
                                   pointer<uint8_t>(packed), threads);
        });
    });
    module.def("unpack_codes", [](Address packed, int64_t rows, int64_t positions, int code_bits,
                                  Address codes, int threads) {
        run("unpack_codes", [&] {
            return cpu::unpack_codes(pointer<const uint8_t>(packed), rows, positions, code_bits,
                                     pointer<uint16_t>(codes), threads);
        });
    });
    module.def("vq_dequantize",
               [](Address packed, Address codebook, Address row_norms, Address col_norms,
                  int64_t rows, int64_t cols, int d, int code_bits, int64_t row_begin,
                  int64_t row_end, Address out, int dtype, int64_t out_stride, int threads) {
                   run("vq_dequantize", [&] {
                       return cpu::vq_dequantize(
                           pointer<const uint8_t>(packed), pointer<const uint16_t>(codebook),
                           pointer<const uint16_t>(row_norms), pointer<const uint16_t>(col_norms),
                           rows, cols, d, code_bits, row_begin, row_end, pointer<void>(out),
                           static_cast<DType>(dtype), out_stride, threads);
                   });
               });
}

}  // namespace nowag::bindings
