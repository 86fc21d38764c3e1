#include <vector>

#include "bindings/binding.h"
#include "nowag/kmeans.h"

namespace nowag::bindings {
namespace {

// A problem comes as (w, h, codebook, codes, sums, rows, cols, previous, gaps): addresses and
// sizes.
KmeansProblem problem(const py::handle& item) {
    const auto fields = py::cast<py::tuple>(item);
    const auto address = [&](size_t index) { return py::cast<Address>(fields[index]); };
    return {pointer<const float>(address(0)), pointer<const float>(address(1)),
            pointer<const float>(address(2)), pointer<uint16_t>(address(3)),
            pointer<int64_t>(address(4)),     py::cast<int64_t>(fields[5]),
            py::cast<int64_t>(fields[6]),     pointer<const float>(address(7)),
            pointer<float>(address(8))};
}

std::vector<KmeansProblem> problems(const py::sequence& items) {
    std::vector<KmeansProblem> all;
    for (const py::handle& item : items) all.push_back(problem(item));
    return all;
}

void assign(const py::sequence& items, int64_t entries, int d, double scale, bool warm,
            Address changed, int threads, bool exhaustive) {
    const std::vector<KmeansProblem> all = problems(items);
    run("kmeans_assign", [&] {
        return cpu::kmeans_assign(all.data(), static_cast<int64_t>(all.size()), entries, d, scale,
                                  warm, pointer<int64_t>(changed), threads, exhaustive);
    });
}

void update(Address sums, int64_t entries, int d, double scale, Address codebook, Address drop,
            Address empty, int /*threads*/) {
    run("kmeans_update", [&] {
        return cpu::kmeans_update(pointer<const int64_t>(sums), entries, d, scale,
                                  pointer<float>(codebook), pointer<double>(drop),
                                  pointer<uint8_t>(empty));
    });
}

void errors(const py::sequence& items, int64_t entries, int d, Address out, int threads) {
    const std::vector<KmeansProblem> all = problems(items);
    run("kmeans_errors",
        [&] { return cpu::kmeans_errors(all.at(0), entries, d, pointer<float>(out), threads); });
}

void spread(const py::sequence& items, int64_t entries, int d, double scale, Address out,
            int threads) {
    const std::vector<KmeansProblem> all = problems(items);
    run("kmeans_spread", [&] {
        return cpu::kmeans_spread(all.at(0), entries, d, scale, pointer<int64_t>(out), threads);
    });
}

void merge_costs(Address sums, Address codebook, int64_t entries, int d, double scale,
                 Address chosen, int64_t count, Address costs, int threads) {
    run("kmeans_merge_costs", [&] {
        return cpu::kmeans_merge_costs(pointer<const int64_t>(sums), pointer<const float>(codebook),
                                       entries, d, scale, pointer<const int64_t>(chosen), count,
                                       pointer<float>(costs), threads);
    });
}

void energy(const py::sequence& items, int d, Address out, int threads) {
    const std::vector<KmeansProblem> all = problems(items);
    run("kmeans_energy",
        [&] { return cpu::kmeans_energy(all.at(0), d, pointer<double>(out), threads); });
}

void seed(const py::sequence& items, int64_t entries, int d, int init, int64_t seed_value,
          Address codebook, int threads) {
    const std::vector<KmeansProblem> all = problems(items);
    run("kmeans_seed", [&] {
        return cpu::kmeans_seed(all.data(), static_cast<int64_t>(all.size()), entries, d,
                                static_cast<cpu::KmeansInit>(init),
                                static_cast<uint64_t>(seed_value), pointer<float>(codebook),
                                threads);
    });
}

}  // namespace

void bind_kmeans(py::module_& module) {
    module.def("kmeans_assign", assign, py::arg("items"), py::arg("entries"), py::arg("d"),
               py::arg("scale"), py::arg("warm"), py::arg("changed"), py::arg("threads"),
               py::arg("exhaustive") = false);
    module.def("kmeans_update", update);
    module.def("kmeans_errors", errors);
    module.def("kmeans_spread", spread);
    module.def("kmeans_merge_costs", merge_costs);
    module.def("kmeans_energy", energy);
    module.def("kmeans_seed", seed);
}

}  // namespace nowag::bindings
