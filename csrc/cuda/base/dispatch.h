// From a value known when a launcher runs to a template argument of its kernel.
#pragma once

#include <type_traits>

#include "nowag/dtype.h"
#include "nowag/status.h"

namespace nowag::cuda {

// Blocks along y; along x there may be 2^31 - 1: rows go there where there is one block each.
constexpr int64_t kMaxGridY = 65535;

// body(constant) with the element type as a compile-time constant.
template <typename Body>
Status with_dtype(DType dtype, Body&& body) {
    switch (dtype) {
        case DType::float32:
            return body(std::integral_constant<DType, DType::float32>{});
        case DType::float16:
            return body(std::integral_constant<DType, DType::float16>{});
        case DType::bfloat16:
            return body(std::integral_constant<DType, DType::bfloat16>{});
    }
    return Status::invalid_argument;
}

// body(constant) with d, 1 to 8, as a compile-time constant.
template <typename Body>
Status with_subvector(int d, Body&& body) {
    switch (d) {
        case 1:
            return body(std::integral_constant<int, 1>{});
        case 2:
            return body(std::integral_constant<int, 2>{});
        case 3:
            return body(std::integral_constant<int, 3>{});
        case 4:
            return body(std::integral_constant<int, 4>{});
        case 5:
            return body(std::integral_constant<int, 5>{});
        case 6:
            return body(std::integral_constant<int, 6>{});
        case 7:
            return body(std::integral_constant<int, 7>{});
        case 8:
            return body(std::integral_constant<int, 8>{});
        default:
            return Status::invalid_argument;
    }
}

}  // namespace nowag::cuda
