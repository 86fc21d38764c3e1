// nowag_ext._cuda: every launcher of cuda/base/launchers.h under its name, with the arguments of
// _cpu's function, then scratch memory and the stream; and <name>_workspace, which says how much
// scratch memory the same arguments need, in bytes.
#include <type_traits>
#include <vector>

#include "bindings/binding.h"
#include "cuda/base/launchers.h"
#include "nowag/format.h"

namespace nowag::bindings {
namespace {

// What Python passes for an argument of a launcher: addresses and enumerations come as integers.
template <typename T>
using FromPython = std::conditional_t<std::is_pointer_v<T>, Address,
                                      std::conditional_t<std::is_enum_v<T>, int, T>>;

template <typename T>
T convert(FromPython<T> value) {
    if constexpr (std::is_pointer_v<T>) {
        return reinterpret_cast<T>(value);
    } else {
        return static_cast<T>(value);
    }
}

// run() of binding.h, with the sentence of the CUDA runtime where it has one.
template <typename Call>
void run_on_device(const char* name, Call&& call) {
    Status status = Status::ok;
    {
        py::gil_scoped_release released;
        status = call();
    }
    const std::string reason = cuda::take_error();
    if (status == Status::unsupported && !reason.empty()) {
        throw std::runtime_error(std::string(name) + ": CUDA says: " + reason);
    }
    check(status, name);
}

template <typename Launcher, typename... Ts>
void bind(py::module_& module, const char* name, int64_t (*workspace)(Ts...), Launcher* launcher) {
    module.def((std::string(name) + "_workspace").c_str(),
               [workspace](FromPython<Ts>... values) { return workspace(convert<Ts>(values)...); });
    module.def(name, [=](FromPython<Ts>... values, Address scratch, Address stream) {
        run_on_device(name, [&] {
            return launcher(convert<Ts>(values)..., pointer<void>(scratch), pointer<void>(stream));
        });
    });
}

// A problem comes as (w, h, codebook, codes, sums, rows, cols, ...): five addresses and two sizes;
// what follows is of use to the CPU only.
std::vector<KmeansProblem> problems_of(const py::sequence& items) {
    std::vector<KmeansProblem> all;
    for (const py::handle& item : items) {
        const auto fields = py::cast<py::tuple>(item);
        const auto address = [&](size_t index) { return py::cast<Address>(fields[index]); };
        all.push_back({pointer<const float>(address(0)), pointer<const float>(address(1)),
                       pointer<const float>(address(2)), pointer<uint16_t>(address(3)),
                       pointer<int64_t>(address(4)), py::cast<int64_t>(fields[5]),
                       py::cast<int64_t>(fields[6])});
    }
    return all;
}

// As bind, for launchers that begin with an array of problems and their number.
template <typename Launcher, typename... Ts>
void bind_problems(py::module_& module, const char* name,
                   int64_t (*workspace)(const KmeansProblem*, int64_t, Ts...), Launcher* launcher) {
    module.def((std::string(name) + "_workspace").c_str(), [workspace](const py::sequence& items,
                                                                       FromPython<Ts>... values) {
        const std::vector<KmeansProblem> all = problems_of(items);
        return workspace(all.data(), static_cast<int64_t>(all.size()), convert<Ts>(values)...);
    });
    module.def(name, [=](const py::sequence& items, FromPython<Ts>... values, Address scratch,
                         Address stream) {
        const std::vector<KmeansProblem> all = problems_of(items);
        run_on_device(name, [&] {
            return launcher(all.data(), static_cast<int64_t>(all.size()), convert<Ts>(values)...,
                            pointer<void>(scratch), pointer<void>(stream));
        });
    });
}

}  // namespace
}  // namespace nowag::bindings

#define NOWAG_BIND(how, name) \
    nowag::bindings::how(module, #name, nowag::cuda::name##_workspace, nowag::cuda::name)

PYBIND11_MODULE(_cuda, module) {
    module.attr("format_version") = nowag::kFormatVersion;
    NOWAG_BIND(bind, normalize);
    NOWAG_BIND(bind_problems, kmeans_assign);
    NOWAG_BIND(bind, kmeans_update);
    NOWAG_BIND(bind_problems, kmeans_errors);
    NOWAG_BIND(bind_problems, kmeans_spread);
    NOWAG_BIND(bind, kmeans_merge_costs);
    NOWAG_BIND(bind_problems, kmeans_energy);
    NOWAG_BIND(bind_problems, kmeans_seed);
    NOWAG_BIND(bind, prune_select);
    NOWAG_BIND(bind, prune_select_nm);
    NOWAG_BIND(bind, prune_objective);
    NOWAG_BIND(bind, pack_codes);
    NOWAG_BIND(bind, unpack_codes);
    NOWAG_BIND(bind, vq_dequantize);
    NOWAG_BIND(bind, sparse_offsets);
    NOWAG_BIND(bind, sparse_pack);
    NOWAG_BIND(bind, sparse_dequantize);
    NOWAG_BIND(bind, vq_gemv);
    NOWAG_BIND(bind, sparse_gemv);
}
