// The signature of an entry point as Python sees it, which is its docstring; nowag_ext/_cpu.pyi is
// made of these. pybind11's own know no names, and change from release to release.
#pragma once

#include <algorithm>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "nowag/kmeans.h"
#include "nowag/status.h"

namespace nowag::bindings {

// The names in a C++ list of parameters: each is what its declaration ends in.
inline std::vector<std::string> names_in(const std::string& parameters) {
    std::vector<std::string> names;
    for (size_t begin = 0; begin < parameters.size();) {
        const size_t end = std::min(parameters.find(',', begin), parameters.size());
        const size_t space = parameters.rfind(' ', end);
        names.push_back(parameters.substr(space + 1, end - space - 1));
        begin = end + 1;
    }
    return names;
}

// A problem is a tuple of its fields, which are addresses and sizes: integers.
inline std::string problem_type() {
    using Fields = decltype(fields(std::declval<KmeansProblem&>()));
    std::string type = "tuple[int";
    for (size_t i = 1; i < std::tuple_size_v<Fields>; ++i) type += ", int";
    return type + "]";
}

template <typename T>
std::string type_name() {
    if constexpr (std::is_same_v<T, Status>) {
        return "None";
    } else if constexpr (std::is_same_v<T, const KmeansProblem*>) {
        return "Sequence[" + problem_type() + "]";
    } else if constexpr (std::is_same_v<T, bool>) {
        return "bool";
    } else if constexpr (std::is_floating_point_v<T>) {
        return "float";
    } else {
        return "int";
    }
}

template <typename Result, typename... Ts>
std::string signature_of(const char* name, const std::string& parameters) {
    const std::vector<std::string> names = names_in(parameters), types = {type_name<Ts>()...};
    std::string list;
    for (size_t i = 0; i < types.size(); ++i) {
        list += (i > 0 ? ", " : "") + names.at(i) + ": " + types[i];
        if (types[i].rfind("Sequence", 0) == 0) ++i;  // whose length comes with it
    }
    return std::string(name) + "(" + list + ") -> " + type_name<Result>();
}

}  // namespace nowag::bindings
