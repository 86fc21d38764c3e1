// How a contract header declares an operation: once, for both backends.
//
//   NOWAG_DECLARE(name, parameters...);
//
// On the CPU it is  cpu::name(parameters..., int threads),  with the host's pointers. On a GPU it
// is cuda::name(parameters..., void* workspace, Stream stream)  with the same meaning: pointers are
// the device's, except an array of problems itself, and in place of the number of threads stand
// scratch memory, of cuda::name_workspace(parameters...) bytes, aligned to 256, and the stream.
// Packed codes and bitmaps are read in words there: they lie where slices of an aligned tensor
// along its first dimension do. Where a backend differs in anything else, the contract says so.
//
// name_parameters is the list of parameters as written, from which bindings/ names them in Python.
// Every name that is declared stands in operations.h too.
#pragma once

#include <cstdint>

#include "nowag/status.h"

namespace nowag::cuda {
using Stream = void*;  // a cudaStream_t, without the headers of CUDA
}

#define NOWAG_DECLARE(name, ...)                              \
    namespace cuda {                                          \
    int64_t name##_workspace(__VA_ARGS__);                    \
    Status name(__VA_ARGS__, void* workspace, Stream stream); \
    }                                                         \
    NOWAG_DECLARE_CPU(name, __VA_ARGS__)

// An operation that the CPU alone has: bindings/cpu_module.cpp binds it by hand.
#define NOWAG_DECLARE_CPU(name, ...)       \
    namespace cpu {                        \
    Status name(__VA_ARGS__, int threads); \
    }                                      \
    constexpr char name##_parameters[] = #__VA_ARGS__
