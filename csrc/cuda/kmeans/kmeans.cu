#include <algorithm>

#include "cuda/base/dispatch.h"
#include "cuda/base/launch.h"
#include "cuda/kmeans/kmeans.cuh"
#include "cuda/kmeans/kmeans_mma.cuh"
#include "cuda/kmeans/kmeans_scan.cuh"
#include "nowag/kmeans.h"

namespace nowag::cuda {
namespace {

bool valid_entries(int64_t entries) {
    return entries >= 1 && entries <= (int64_t{1} << kMaxCodeBits);
}

bool valid_problem(const KmeansProblem& problem, int d) {
    return d >= 1 && d <= kMaxSubvector && problem.rows >= 1 && problem.cols >= 1 &&
           problem.w != nullptr && problem.h != nullptr;
}

// Below, scanning costs no more than the mma kernel does beside its products.
constexpr int64_t kFewestMmaEntries = 1024;

// Entries of a slab of kmeans_mma on this device, 0 where it cannot run.
int mma_slab_entries(int64_t entries) {
    const int64_t bytes = device_limits().shared_bytes - static_cast<int64_t>(kMmaPointsShared);
    const int64_t room = bytes / static_cast<int64_t>(sizeof(MmaEntry)) / kMmaGroup * kMmaGroup;
    const int64_t wanted = ceil_div(entries, kMmaGroup) * kMmaGroup;
    return static_cast<int>(std::max<int64_t>(0, std::min(room, wanted)));
}

template <int kD>
Status assign_one(const KmeansProblem& problem, int64_t entries, double scale, bool warm,
                  unsigned long long* changed, Stream stream) {
    if constexpr (kD >= kMmaMinD && kD <= kMmaMaxD) {
        const int slab = mma_slab_entries(entries);
        if (entries >= kFewestMmaEntries && slab > 0) {
            const dim3 mma_grid(static_cast<unsigned>(code_positions(problem.cols, kD)),
                                blocks_for(problem.rows, kMmaRows));
            return launch(kmeans_mma<kD>, mma_grid, kMmaThreads,
                          kMmaPointsShared + sizeof(MmaEntry) * static_cast<size_t>(slab), stream,
                          problem, static_cast<int>(entries), slab, scale, warm, changed);
        }
    }
    const dim3 grid(static_cast<unsigned>(code_positions(problem.cols, kD)),
                    blocks_for(problem.rows, kScanRows));
    return launch(kmeans_scan<kD>, grid, kScanThreads, kScanShared<kD>, stream, problem, entries,
                  scale, warm, changed);
}

}  // namespace

int64_t kmeans_assign_workspace(const KmeansProblem*, int64_t, int64_t, int, double, bool,
                                int64_t*) {
    return 0;
}

Status kmeans_assign(const KmeansProblem* problems, int64_t count, int64_t entries, int d,
                     double scale, bool warm, int64_t* changed, void*, Stream stream) {
    if (count < 1 || !valid_entries(entries)) return Status::invalid_argument;
    for (int64_t b = 0; b < count; ++b) {
        if (!valid_problem(problems[b], d) || problems[b].codebook == nullptr ||
            problems[b].codes == nullptr || problems[b].rows > kMaxGridY * kScanRows) {
            return Status::invalid_argument;
        }
    }
    Status status = clear(changed, static_cast<size_t>(count) * sizeof(int64_t), stream);
    for (int64_t b = 0; b < count && status == Status::ok; ++b) {
        status = with_subvector(d, [&](auto subvector) {
            return assign_one<subvector.value>(problems[b], entries, scale, warm,
                                               reinterpret_cast<unsigned long long*>(changed + b),
                                               stream);
        });
    }
    return status;
}

int64_t kmeans_update_workspace(const int64_t*, int64_t entries, int d, double, float*, double*,
                                uint8_t*) {
    return entries * d * static_cast<int64_t>(sizeof(double));
}

Status kmeans_update(const int64_t* sums, int64_t entries, int d, double scale, float* codebook,
                     double* objective_drop, uint8_t* empty, void* workspace, Stream stream) {
    if (!valid_entries(entries) || d < 1 || d > kMaxSubvector) return Status::invalid_argument;
    double* terms = static_cast<double*>(workspace);
    return in_order(
        [&] {
            return launch(kmeans_move, blocks_for(entries, kKmeansThreads), kKmeansThreads, 0,
                          stream, sums, entries, d, scale, codebook, empty, terms);
        },
        [&] {
            return launch(kmeans_add_terms, 1, kKmeansThreads, kKmeansThreads * sizeof(double),
                          stream, terms, entries * d, objective_drop);
        });
}

int64_t kmeans_spread_workspace(const KmeansProblem*, int64_t, int64_t, int, double, int64_t*) {
    return 0;
}

Status kmeans_spread(const KmeansProblem* problems, int64_t count, int64_t entries, int d,
                     double scale, int64_t* spread, void*, Stream stream) {
    if (count != 1 || !valid_entries(entries) || !valid_problem(problems[0], d) ||
        problems[0].cols > kMaxGridY * kKmeansThreads) {
        return Status::invalid_argument;
    }
    return with_subvector(d, [&](auto subvector) {
        const int64_t positions = code_positions(problems[0].cols, d);
        const dim3 grid(static_cast<unsigned>(problems[0].rows),
                        blocks_for(positions, kKmeansThreads));
        const size_t bytes = static_cast<size_t>(entries * d) * sizeof(int64_t);
        return in_order([&] { return clear(spread, bytes, stream); },
                        [&] {
                            return launch(kmeans_add_spread<subvector.value>, grid, kKmeansThreads,
                                          0, stream, problems[0], scale, spread);
                        });
    });
}

int64_t kmeans_errors_workspace(const KmeansProblem*, int64_t, int64_t, int, float*) { return 0; }

Status kmeans_errors(const KmeansProblem* problems, int64_t count, int64_t entries, int d,
                     float* errors, void*, Stream stream) {
    if (count != 1 || !valid_entries(entries) || !valid_problem(problems[0], d) ||
        problems[0].cols > kMaxGridY * kKmeansThreads) {
        return Status::invalid_argument;
    }
    return with_subvector(d, [&](auto subvector) {
        const int64_t positions = code_positions(problems[0].cols, d);
        const dim3 grid(static_cast<unsigned>(problems[0].rows),
                        blocks_for(positions, kKmeansThreads));
        return launch(kmeans_point_errors<subvector.value>, grid, kKmeansThreads, 0, stream,
                      problems[0], errors);
    });
}

int64_t kmeans_merge_costs_workspace(const int64_t*, const float*, int64_t, int, double,
                                     const int64_t*, int64_t, float*) {
    return 0;
}

Status kmeans_merge_costs(const int64_t* sums, const float* codebook, int64_t entries, int d,
                          double scale, const int64_t* chosen, int64_t count, float* costs, void*,
                          Stream stream) {
    if (!valid_entries(entries) || count < 0) return Status::invalid_argument;
    if (count == 0) return Status::ok;
    return with_subvector(d, [&](auto subvector) {
        return launch(kmeans_merge_cost<subvector.value>, static_cast<unsigned>(count),
                      kKmeansThreads, sizeof(float) * kKmeansThreads / kWarpSize, stream, sums,
                      codebook, entries, scale, chosen, costs);
    });
}

int64_t kmeans_energy_workspace(const KmeansProblem* problems, int64_t, int, double*) {
    return problems[0].rows * static_cast<int64_t>(sizeof(double));
}

Status kmeans_energy(const KmeansProblem* problems, int64_t count, int d, double* energy,
                     void* workspace, Stream stream) {
    if (count != 1 || !valid_problem(problems[0], d)) return Status::invalid_argument;
    double* energies = static_cast<double*>(workspace);
    return in_order(
        [&] {
            return launch(kmeans_row_energies, blocks_for(problems[0].rows, kEnergyTile), kWarpSize,
                          sizeof(float) * kEnergyTile * (kEnergyTile + 1), stream, problems[0],
                          energies);
        },
        [&] {
            return launch(kmeans_add_terms, 1, kKmeansThreads, kKmeansThreads * sizeof(double),
                          stream, energies, problems[0].rows, energy);
        });
}

}  // namespace nowag::cuda
