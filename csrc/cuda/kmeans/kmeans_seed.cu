#include <algorithm>

#include "cuda/base/dispatch.h"
#include "cuda/base/launch.h"
#include "cuda/kmeans/kmeans_seed.cuh"
#include "nowag/kmeans.h"

namespace nowag::cuda {

__global__ void __launch_bounds__(kSeedThreads) kmeans_scan_energies(SampleEnergies energies) {
    unsigned long long* warp_sums = reinterpret_cast<unsigned long long*>(shared_memory());
    unsigned long long passed = 0;
    for (int64_t first = 0; first < energies.chunks; first += kSeedThreads) {
        const int64_t chunk = first + threadIdx.x;
        const unsigned long long sum = chunk < energies.chunks ? energies.before[chunk] : 0u;
        const auto scan = block_scan<kSeedThreads>(sum, warp_sums);
        if (chunk < energies.chunks) energies.before[chunk] = passed + scan.upto - sum;
        passed += scan.total;
    }
    if (threadIdx.x == 0) energies.before[energies.chunks] = passed;
}

namespace {

constexpr size_t kWarpSumsShared = sizeof(unsigned long long) * kSeedWarps;

int64_t points_of(const KmeansProblem& problem, int d) {
    return problem.rows * code_positions(problem.cols, d);
}

int64_t all_points(const KmeansProblem* problems, int64_t count, int d) {
    int64_t total = 0;
    for (int64_t b = 0; b < count; ++b) total += points_of(problems[b], d);
    return total;
}

int64_t all_chunks(const KmeansProblem* problems, int64_t count, int d) {
    int64_t total = 0;
    for (int64_t b = 0; b < count; ++b) total += ceil_div(points_of(problems[b], d), kSampleChunk);
    return total;
}

int64_t sample_size(int64_t points, int64_t entries) {
    return std::min(points, kmeans_sample_size(entries));
}

int bit_length(int64_t n) {
    int bits = 0;
    for (; n > 0; n >>= 1) ++bits;
    return bits;
}

struct SeedCall {
    const KmeansProblem* problems;
    int64_t count;
    int64_t entries;
    SeedRandom random;
    float* codebook;
    Stream stream;
};

// What the workspace of k-means++ begins with: what must be zero at the start.
struct SeedScratch {
    SeedBoard board;
    unsigned largest_energy;
};

// Calls each(problem, its points) for every problem, up to the first that fails.
template <int kD, typename Each>
Status for_problems(const SeedCall& call, Each&& each) {
    SeedRange range{0, 0, 0};
    Status status = Status::ok;
    for (int64_t b = 0; b < call.count && status == Status::ok; ++b) {
        range.count = points_of(call.problems[b], kD);
        status = each(call.problems[b], range);
        range.first += range.count;
        range.first_chunk += ceil_div(range.count, kSampleChunk);
    }
    return status;
}

template <int kD>
Status draw_strata(const SeedCall& call, int64_t points, int64_t wanted, const SeedTarget& target) {
    return for_problems<kD>(call, [&](const KmeansProblem& problem, const SeedRange& range) {
        return launch(kmeans_draw_strata<kD>, blocks_for(wanted, kSeedThreads), kSeedThreads, 0,
                      call.stream, problem, range, points, wanted, call.random, target);
    });
}

template <int kD>
Status draw_sample(const SeedCall& call, const SampleEnergies& energies, int64_t wanted,
                   const SeedTarget& target) {
    const auto pass = [&](size_t shared_bytes, auto kernel, auto... arguments) {
        return for_problems<kD>(call, [&](const KmeansProblem& problem, const SeedRange& range) {
            return launch(kernel, blocks_for(range.count, kSampleChunk), kSeedThreads, shared_bytes,
                          call.stream, problem, range, energies, arguments...);
        });
    };
    return in_order([&] { return pass(0, kmeans_largest_energy<kD>); },
                    [&] { return pass(kWarpSumsShared, kmeans_sum_energies<kD>); },
                    [&] {
                        return launch(kmeans_scan_energies, 1, kSeedThreads, kWarpSumsShared,
                                      call.stream, energies);
                    },
                    [&] {
                        return pass(kDrawSampleShared, kmeans_draw_sample<kD>, wanted, call.random,
                                    target);
                    });
}

template <int kD>
Status plus_plus(const SeedCall& call, void* workspace) {
    const int64_t points = all_points(call.problems, call.count, kD);
    const int64_t chunks = all_chunks(call.problems, call.count, kD);
    const int64_t size = sample_size(points, call.entries);
    SeedScratch* scratch = static_cast<SeedScratch*>(workspace);
    const SampleEnergies energies{points, chunks, kSampleEnergyBits - bit_length(points),
                                  &scratch->largest_energy,
                                  reinterpret_cast<unsigned long long*>(scratch + 1)};
    float* x = reinterpret_cast<float*>(energies.before + chunks + 1);
    const SeedSample sample{x, x + kD * size, x + 2 * kD * size, static_cast<int>(size)};
    const SeedTarget target{sample.x, sample.h, 1, size};
    const bool all = size == points;
    const int64_t blocks =
        std::min({static_cast<int64_t>(device_limits().multiprocessors),
                  ceil_div(size, kSeedPointsPerBlock), static_cast<int64_t>(kMaxSeedBlocks)});
    const int64_t warps = std::clamp(ceil_div(ceil_div(size, blocks), kWarpSize),
                                     int64_t{kCandidates}, int64_t{kMaxSeedWarps});
    return in_order([&] { return clear(scratch, sizeof(SeedScratch), call.stream); },
                    [&] {
                        return all ? draw_strata<kD>(call, points, size, target)
                                   : draw_sample<kD>(call, energies, size, target);
                    },
                    [&] {
                        return launch_together(kmeans_plus_plus<kD>, static_cast<unsigned>(blocks),
                                               static_cast<unsigned>(warps * kWarpSize),
                                               sizeof(SeedShared), call.stream, sample,
                                               call.entries, call.random, all ? 0 : size,
                                               &scratch->board, call.codebook);
                    });
}

}  // namespace

int64_t kmeans_seed_workspace(const KmeansProblem* problems, int64_t count, int64_t entries, int d,
                              KmeansInit init, int64_t, float*) {
    if (init == KmeansInit::random) return 0;
    const int64_t size = sample_size(all_points(problems, count, d), entries);
    return static_cast<int64_t>(sizeof(SeedScratch)) +
           static_cast<int64_t>(sizeof(unsigned long long)) * (all_chunks(problems, count, d) + 1) +
           static_cast<int64_t>(sizeof(float)) * (2 * d + 1 + kCandidates) * size;
}

Status kmeans_seed(const KmeansProblem* problems, int64_t count, int64_t entries, int d,
                   KmeansInit init, int64_t seed, float* codebook, void* workspace, Stream stream) {
    if (count < 1 || entries < 1 || entries > (int64_t{1} << kMaxCodeBits) || d < 1 ||
        d > kMaxSubvector || all_points(problems, count, d) < entries) {
        return Status::invalid_argument;
    }
    const SeedCall call{problems, count, entries, {SeedRandom::mix(static_cast<uint64_t>(seed))},
                        codebook, stream};
    return with_subvector(d, [&](auto subvector) {
        constexpr int kD = subvector.value;
        if (init == KmeansInit::plus_plus) return plus_plus<kD>(call, workspace);
        return draw_strata<kD>(call, all_points(problems, count, kD), entries,
                               {codebook, nullptr, kD, 1});
    });
}

}  // namespace nowag::cuda
