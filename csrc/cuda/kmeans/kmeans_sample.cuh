// The points that seeding chooses from (kmeans.h), on a GPU: strata of equal length, or the sample
// of k-means++, drawn half uniformly and half in proportion to energy.
//
// The sample takes three passes over the weights, a launch a matrix each, with a block a chunk of
// points: the largest energy; the sum of energies of every chunk; then, from prefix sums over the
// chunks, the points. Energies are computed again in each pass: stored, those of a whole model
// would need gigabytes. Measured on an H100, 4096 x 4096, d = 6: 35, 28 and 91 us; reading W takes
// 31, which bounds the first two.
#pragma once

#include "cuda/kmeans/kmeans_block.cuh"
#include "cuda/kmeans/kmeans_points.cuh"

namespace nowag::cuda {

constexpr int64_t kSampleChunk = 4096;  // points of a block
constexpr float kMostEnergy = 0x1.fffffep127f;
constexpr int kSampleEnergyBits = 60;  // the sum of all energies is below 2^60

// splitmix64 as a function of how many numbers were drawn before.
struct SeedRandom {
    static constexpr uint64_t kIncrement = 0x9e3779b97f4a7c15u;
    uint64_t start;

    static __device__ __host__ uint64_t mix(uint64_t bits) {
        bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
        bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
        return bits ^ (bits >> 31);
    }

    __device__ uint64_t number(int64_t drawn) const {
        return mix(start + static_cast<uint64_t>(drawn + 1) * kIncrement);
    }

    __device__ uint64_t below(int64_t drawn, uint64_t n) const {
        return product_high(number(drawn), n);
    }
};

// The points of one problem among all, [first, first + count), and their first chunk.
struct SeedRange {
    int64_t first;
    int64_t count;
    int64_t first_chunk;
};

// Where the drawn points go: point s, coordinate j to x[s * point_stride + j * coordinate_stride],
// its metric likewise to h unless that is null.
struct SeedTarget {
    float* x;
    float* h;
    int64_t point_stride;
    int64_t coordinate_stride;

    template <int kD>
    __device__ void write(int64_t s, const KmeansProblem& problem, int64_t point,
                          float weight) const {
        const int64_t positions = positions_of(problem, kD), position = point % positions;
        float coordinates[kD];
        read_point<kD>(problem, point / positions, position, coordinates);
#pragma unroll
        for (int j = 0; j < kD; ++j) {
            const int64_t place = s * point_stride + j * coordinate_stride;
            x[place] = coordinates[j];
            if (h != nullptr) h[place] = problem.h[position * kD + j] * weight;
        }
    }
};

// Draws one of `points` from each of `wanted` strata of equal length, with weight 1: all points if
// there are as many strata.
//   kD      d
//   range   which of the points this problem has
//   random  its number s is for stratum s
// A thread: one stratum; it writes the point if this problem has it.
template <int kD>
__global__ void __launch_bounds__(kSeedThreads)
    kmeans_draw_strata(KmeansProblem problem, SeedRange range, int64_t points, int64_t wanted,
                       SeedRandom random, SeedTarget target) {
    const int64_t s = static_cast<int64_t>(blockIdx.x) * kSeedThreads + threadIdx.x;
    if (s >= wanted) return;
    const int64_t low = s * points / wanted, high = (s + 1) * points / wanted;
    const int64_t drawn =
        low + static_cast<int64_t>(random.below(s, static_cast<uint64_t>(high - low)));
    const int64_t point = drawn - range.first;
    if (point >= 0 && point < range.count) target.write<kD>(s, problem, point, 1.0f);
}

// What the three passes share.
struct SampleEnergies {
    int64_t points;  // of all problems
    int64_t chunks;
    int bits;                    // 2^bits times `points` is at most 2^kSampleEnergyBits
    unsigned* largest;           // bits of the largest energy, 0 at the start
    unsigned long long* before;  // [chunks + 1]: the sum of each chunk, then of all before it
};

// Never NaN, negative or infinite: where the sample is looked for follows from sums of these.
template <int kD>
__device__ __forceinline__ float energy_of(const KmeansProblem& problem, int64_t point) {
    const int64_t positions = positions_of(problem, kD), position = point % positions;
    const float* h = problem.h + position * kD;
    float x[kD], sum = 0.0f;
    read_point<kD>(problem, point / positions, position, x);
#pragma unroll
    for (int j = 0; j < kD; ++j) sum += h[j] * x[j] * x[j];
    return sum > 0.0f ? fminf(sum, kMostEnergy) : 0.0f;
}

__device__ __forceinline__ int64_t chunk_begin() {
    return static_cast<int64_t>(blockIdx.x) * kSampleChunk;
}

__device__ __forceinline__ int64_t chunk_end(const SeedRange& range) {
    const int64_t end = chunk_begin() + kSampleChunk;
    return end < range.count ? end : range.count;
}

// First pass: raises *energies.largest to the largest energy. kD: d. A block: one chunk of points.
template <int kD>
__global__ void __launch_bounds__(kSeedThreads)
    kmeans_largest_energy(KmeansProblem problem, SeedRange range, SampleEnergies energies) {
    float largest = 0.0f;
    for (int64_t i = chunk_begin() + threadIdx.x; i < chunk_end(range); i += kSeedThreads) {
        largest = fmaxf(largest, energy_of<kD>(problem, i));
    }
    raise_to_warp(energies.largest, largest);
}

// Second pass: energies.before[chunk] = the sum of the chunk's energies. kD: d. A block: one chunk.
// Shared memory: kSeedWarps numbers.
template <int kD>
__global__ void __launch_bounds__(kSeedThreads)
    kmeans_sum_energies(KmeansProblem problem, SeedRange range, SampleEnergies energies) {
    const double scale = scale_to_bits(energies.largest, energies.bits);
    unsigned long long sum = 0;
    for (int64_t i = chunk_begin() + threadIdx.x; i < chunk_end(range); i += kSeedThreads) {
        sum += quantized(energy_of<kD>(problem, i), scale);
    }
    auto* warp_sums = reinterpret_cast<unsigned long long*>(shared_memory());
    const unsigned long long total = block_scan<kSeedThreads>(sum, warp_sums).total;
    if (threadIdx.x == 0) energies.before[range.first_chunk + blockIdx.x] = total;
}

// One block turns the chunks' sums into those of the chunks before each. Shared memory: kSeedWarps
// numbers.
__global__ void __launch_bounds__(kSeedThreads) kmeans_scan_energies(SampleEnergies energies);

// The total mass cut into as many strata as points are wanted.
struct SampleStrata {
    uint64_t step;
    uint64_t longer;  // how many strata, the first ones, are longer by 1

    __device__ uint64_t border(int64_t s) const {
        const uint64_t stratum = static_cast<uint64_t>(s);
        return stratum * step + (stratum < longer ? stratum : longer);
    }

    __device__ uint64_t target(int64_t s, const SeedRandom& random) const {
        return border(s) + random.below(s, border(s + 1) - border(s));
    }

    // The stratum in which `mass` lies, less than the total.
    __device__ int64_t holding(uint64_t mass) const {
        const uint64_t in_longer = longer * (step + 1);
        return static_cast<int64_t>(mass < in_longer ? mass / (step + 1) : (mass - longer) / step);
    }
};

// The first of kSeedThreads ascending numbers that is more than `target`; the last one is.
__device__ __forceinline__ int first_above(const unsigned long long* numbers, uint64_t target) {
    int below = 0;
    for (int step = kSeedThreads / 2; step > 0; step /= 2) {
        if (numbers[below + step - 1] <= target) below += step;
    }
    return below;
}

constexpr size_t kDrawSampleShared = sizeof(unsigned long long) * (kSeedThreads + kSeedWarps);

// Third pass: writes the point of each stratum to target.
//   kD      d
//   wanted  how many strata
//   random  its number s is for stratum s
// A block: one chunk of points. It takes as many at a time as it has threads and knows their
// running mass; then its threads take the strata that these masses reach into, so that a point in
// which many strata lie does not keep one thread busy. Shared memory: kDrawSampleShared bytes.
template <int kD>
__global__ void __launch_bounds__(kSeedThreads, 2)
    kmeans_draw_sample(KmeansProblem problem, SeedRange range, SampleEnergies energies,
                       int64_t wanted, SeedRandom random, SeedTarget target) {
    unsigned long long* upto = reinterpret_cast<unsigned long long*>(shared_memory());
    const double scale = scale_to_bits(energies.largest, energies.bits);
    const uint64_t points = static_cast<uint64_t>(energies.points);
    const uint64_t strata_count = static_cast<uint64_t>(wanted);
    const uint64_t energy = energies.before[energies.chunks];
    const uint64_t even = energy < points ? 1u : energy / points;
    const uint64_t total = energy + points * even;
    const SampleStrata strata{total / strata_count, total % strata_count};
    const int64_t end = chunk_end(range);
    uint64_t passed = energies.before[range.first_chunk + blockIdx.x] +
                      static_cast<uint64_t>(range.first + chunk_begin()) * even;
    for (int64_t first = chunk_begin(); first < end; first += kSeedThreads) {
        const int64_t i = first + threadIdx.x;
        const unsigned long long mass =
            i < end ? even + quantized(energy_of<kD>(problem, i), scale) : 0u;
        const auto scan = block_scan<kSeedThreads>(mass, upto + kSeedThreads);
        upto[threadIdx.x] = passed + scan.upto;
        const uint64_t reached = passed + scan.total;
        __syncthreads();
        for (int64_t s = strata.holding(passed) + threadIdx.x;
             s < wanted && strata.border(s) < reached; s += kSeedThreads) {
            const uint64_t drawn = strata.target(s, random);
            if (drawn < passed || drawn >= reached) continue;
            const int point = first_above(upto, drawn);
            const uint64_t its_mass = upto[point] - (point > 0 ? upto[point - 1] : passed);
            const double share = static_cast<double>(its_mass) * static_cast<double>(wanted);
            target.write<kD>(s, problem, first + point,
                             static_cast<float>(static_cast<double>(total) / share));
        }
        passed = reached;
    }
}

}  // namespace nowag::cuda
