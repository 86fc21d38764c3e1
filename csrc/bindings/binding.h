// Shared by the bindings: entry points as functions of Python. Addresses come from torch as
// integers, statuses leave as exceptions.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "bindings/signature.h"
#include "nowag/operation.h"
#include "nowag/operations.h"

namespace nowag::bindings {

namespace py = pybind11;

// What Python passes for a parameter of an entry point: an address from Tensor.data_ptr() (0 for
// none) and the number of an enumerator as integers.
template <typename T>
using FromPython = std::conditional_t<std::is_pointer_v<T>, std::uintptr_t,
                                      std::conditional_t<std::is_enum_v<T>, int, T>>;

template <typename T>
T convert(FromPython<T> value) {
    if constexpr (std::is_pointer_v<T>) {
        return reinterpret_cast<T>(value);
    } else {
        return static_cast<T>(value);
    }
}

// A problem comes as a tuple of its fields.
inline KmeansProblem problem_of(const py::handle& item) {
    const auto values = py::cast<py::tuple>(item);
    KmeansProblem problem{};
    const auto read = [&](auto&... field) {
        if (values.size() != sizeof...(field)) {
            throw py::value_error("a problem has " + std::to_string(sizeof...(field)) +
                                  " fields, not " + std::to_string(values.size()));
        }
        size_t index = 0;
        ((field = convert<std::decay_t<decltype(field)>>(
              py::cast<FromPython<std::decay_t<decltype(field)>>>(values[index++]))),
         ...);
    };
    std::apply(read, fields(problem));
    return problem;
}

inline std::vector<KmeansProblem> problems_of(const py::sequence& items) {
    std::vector<KmeansProblem> all;
    all.reserve(items.size());
    for (const py::handle& item : items) all.push_back(problem_of(item));
    return all;
}

struct Operation {
    const char* name;
    const char* (*reason)();  // what the backend says of a call that it just failed, or ""
};

// Raises what `status` stands for; nowag_ext/ops has already checked what a user can get wrong, so
// these sentences speak to whoever calls the compiled module directly.
inline void check(Status status, const Operation& operation) {
    const std::string name(operation.name), reason(operation.reason());
    switch (status) {
        case Status::ok:
            return;
        case Status::invalid_argument:
            throw py::value_error(name + ": an argument is outside the contract of nowag/*.h");
        case Status::unsupported:
            throw std::runtime_error(name + (reason.empty()
                                                 ? ": not supported by this build or this machine"
                                                 : ": CUDA says: " + reason));
        case Status::out_of_memory:
            PyErr_Format(PyExc_MemoryError, "%s: out of memory", operation.name);
            throw py::error_already_set();
        case Status::interrupted:  // whoever asked for it has set the exception
            throw py::error_already_set();
    }
}

// Calls an entry point, without the GIL, and raises on a bad status.
template <typename... Ts>
void call(const Operation& operation, Status (*entry)(Ts...), Ts... values) {
    Status status;
    {
        py::gil_scoped_release released;
        status = entry(values...);
    }
    check(status, operation);
}

// Calls a query, which answers at once.
template <typename... Ts>
int64_t call(const Operation&, int64_t (*query)(Ts...), Ts... values) {
    return query(values...);
}

// Makes an entry point, whose list of parameters in C++ is `parameters`, a function of the module.
template <typename Result, typename... Ts>
void bind(py::module_& module, const Operation& operation, const std::string& parameters,
          Result (*entry)(Ts...)) {
    module.def(
        operation.name,
        [=](FromPython<Ts>... values) { return call(operation, entry, convert<Ts>(values)...); },
        signature_of<Result, Ts...>(operation.name, parameters).c_str());
}

// An array of problems and its length come as one sequence.
template <typename Result, typename... Ts>
void bind(py::module_& module, const Operation& operation, const std::string& parameters,
          Result (*entry)(const KmeansProblem*, int64_t, Ts...)) {
    module.def(
        operation.name,
        [=](const py::sequence& items, FromPython<Ts>... values) {
            const std::vector<KmeansProblem> problems = problems_of(items);
            return call(operation, entry, problems.data(), static_cast<int64_t>(problems.size()),
                        convert<Ts>(values)...);
        },
        signature_of<Result, const KmeansProblem*, int64_t, Ts...>(operation.name, parameters)
            .c_str());
}

}  // namespace nowag::bindings
