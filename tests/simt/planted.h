// Small kernels for the test of the executor itself: each fault that it must catch, and each
// operation in correct use.
#pragma once

#include <functional>
#include <map>
#include <string>

namespace simt {

// By name; each runs one kernel, which writes its results to `out`.
std::map<std::string, std::function<void(int* out)>> planted_kernels();

}  // namespace simt
