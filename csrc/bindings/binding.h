// Shared by the bindings: addresses come from torch as integers, statuses leave as exceptions.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "nowag/status.h"

namespace nowag::bindings {

namespace py = pybind11;

// An address from Tensor.data_ptr(), or 0 for none.
using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// Raises what `status`, returned by `operation`, stands for; ops.py has already checked what a user
// can get wrong, so these sentences speak to whoever calls the compiled module directly.
inline void check(Status status, const char* operation) {
    const std::string name(operation);
    switch (status) {
        case Status::ok:
            return;
        case Status::invalid_argument:
            throw py::value_error(name + ": an argument is outside the contract of nowag/*.h");
        case Status::unsupported:
            throw std::runtime_error(name + ": not supported by this build or this machine");
        case Status::out_of_memory:
            PyErr_Format(PyExc_MemoryError, "%s: out of memory", operation);
            throw py::error_already_set();
    }
}

// Runs a kernel's entry point without the GIL and raises on a bad status.
template <typename Call>
void run(const char* operation, Call&& call) {
    Status status;
    {
        py::gil_scoped_release released;
        status = call();
    }
    check(status, operation);
}

}  // namespace nowag::bindings
