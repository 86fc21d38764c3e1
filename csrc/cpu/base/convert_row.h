// A row from one element type to another, exactly as dtype.h says. Plain loops that the compiler
// vectorises under the flags of the file that includes this; `static` so that no instruction set's
// copy is ever linked in place of another's.
#pragma once

#include "nowag/dtype.h"

namespace nowag::cpu {

template <DType From, DType To>
static void convert_elements(const void* from, int64_t count, void* to) {
    for (int64_t j = 0; j < count; ++j) store_float(to, j, To, load_float(from, j, From));
}

static void convert_row(const void* from, DType from_dtype, int64_t count, void* to,
                        DType to_dtype) {
    constexpr DType f32 = DType::float32, f16 = DType::float16, bf16 = DType::bfloat16;
    using Convert = void (*)(const void*, int64_t, void*);
    constexpr Convert table[3][3] = {
        {convert_elements<f32, f32>, convert_elements<f32, f16>, convert_elements<f32, bf16>},
        {convert_elements<f16, f32>, convert_elements<f16, f16>, convert_elements<f16, bf16>},
        {convert_elements<bf16, f32>, convert_elements<bf16, f16>, convert_elements<bf16, bf16>}};
    table[static_cast<int>(from_dtype)][static_cast<int>(to_dtype)](from, count, to);
}

}  // namespace nowag::cpu
