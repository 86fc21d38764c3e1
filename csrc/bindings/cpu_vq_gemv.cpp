#include "bindings/binding.h"
#include "nowag/vq_gemv.h"

namespace nowag::bindings {

void bind_vq_gemv(py::module_& module) {
    module.attr("vq_gemv_max_tokens") = kVqGemvMaxTokens;
    module.def("vq_gemv", [](Address x, int dtype, int64_t tokens, Address packed, Address codebook,
                             Address row_norms, Address col_norms, Address bias, int64_t rows,
                             int64_t cols, int d, int code_bits, Address y, int threads) {
        run("vq_gemv", [&] {
            return cpu::vq_gemv(pointer<const void>(x), static_cast<DType>(dtype), tokens,
                                pointer<const uint8_t>(packed), pointer<const uint16_t>(codebook),
                                pointer<const uint16_t>(row_norms),
                                pointer<const uint16_t>(col_norms), pointer<const void>(bias), rows,
                                cols, d, code_bits, pointer<void>(y), threads);
        });
    });
}

}  // namespace nowag::bindings
