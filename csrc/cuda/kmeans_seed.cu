#include <algorithm>

#include "dispatch.h"
#include "kmeans_seed.cuh"
#include "launch.h"
#include "launchers.h"

namespace nowag::cuda {
namespace {

int64_t points_of(const KmeansProblem& problem, int d) {
    return problem.rows * code_positions(problem.cols, d);
}

int64_t all_points(const KmeansProblem* problems, int64_t count, int d) {
    int64_t total = 0;
    for (int64_t b = 0; b < count; ++b) total += points_of(problems[b], d);
    return total;
}

int64_t sample_size(int64_t points, int64_t entries) {
    return std::min(points, cpu::kmeans_sample_size(entries));
}

struct SeedCall {
    const KmeansProblem* problems;
    int64_t count;
    int64_t entries;
    SeedRandom random;
    float* codebook;
    Stream stream;
};

template <int kD>
Status draw(const SeedCall& call, int64_t wanted, const SeedTarget& target) {
    SeedRange range{0, 0, all_points(call.problems, call.count, kD)};
    Status status = Status::ok;
    for (int64_t b = 0; b < call.count && status == Status::ok; ++b) {
        range.count = points_of(call.problems[b], kD);
        status = launch(kmeans_draw_strata<kD>, blocks_for(wanted, kSeedThreads), kSeedThreads, 0,
                        call.stream, call.problems[b], range, wanted, call.random, target);
        range.first += range.count;
    }
    return status;
}

template <int kD>
Status plus_plus(const SeedCall& call, void* workspace) {
    const int64_t size = sample_size(all_points(call.problems, call.count, kD), call.entries);
    SeedBoard* board = static_cast<SeedBoard*>(workspace);
    float* x = reinterpret_cast<float*>(board + 1);
    const SeedSample sample{x, x + kD * size, x + 2 * kD * size, size};
    const int64_t blocks =
        std::min({static_cast<int64_t>(device_limits().multiprocessors),
                  ceil_div(size, kSeedPointsPerBlock), static_cast<int64_t>(kMaxSeedBlocks)});
    return in_order([&] { return draw<kD>(call, size, {sample.x, sample.h, 1, size}); },
                    [&] { return clear(board, sizeof(SeedBoard), call.stream); },
                    [&] {
                        return launch_together(
                            kmeans_plus_plus<kD>, static_cast<unsigned>(blocks), kSeedThreads,
                            sizeof(unsigned long long) * (kSeedWarps + 1), call.stream, sample,
                            call.entries, call.random, size, board, call.codebook);
                    });
}

}  // namespace

int64_t kmeans_seed_workspace(const KmeansProblem* problems, int64_t count, int64_t entries, int d,
                              int init, int64_t, float*) {
    if (init == static_cast<int>(cpu::KmeansInit::random)) return 0;
    const int64_t size = sample_size(all_points(problems, count, d), entries);
    return static_cast<int64_t>(sizeof(SeedBoard)) +
           static_cast<int64_t>(sizeof(float)) * (2 * d + 1) * size;
}

Status kmeans_seed(const KmeansProblem* problems, int64_t count, int64_t entries, int d, int init,
                   int64_t seed, float* codebook, void* workspace, Stream stream) {
    if (count < 1 || entries < 1 || entries > (int64_t{1} << kMaxCodeBits) || d < 1 ||
        d > kMaxSubvector || all_points(problems, count, d) < entries) {
        return Status::invalid_argument;
    }
    const SeedCall call{problems, count, entries, {SeedRandom::mix(static_cast<uint64_t>(seed))},
                        codebook, stream};
    return with_subvector(d, [&](auto subvector) {
        constexpr int kD = subvector.value;
        if (init == static_cast<int>(cpu::KmeansInit::plus_plus)) {
            return plus_plus<kD>(call, workspace);
        }
        return draw<kD>(call, entries, {codebook, nullptr, kD, 1});
    });
}

}  // namespace nowag::cuda
