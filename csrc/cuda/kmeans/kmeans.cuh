// Everything of kmeans.h that is cheap beside an assignment: update, errors, spread, merge costs,
// energy.
#pragma once

#include "cuda/kmeans/kmeans_points.cuh"

namespace nowag::cuda {

constexpr int kKmeansThreads = 256;
constexpr int kEnergyTile = 32;  // rows and columns of a tile of kmeans_row_energies

// Moves entries to the mean of their points.
//   sums      [K, 2 d + 1] (kmeans.h)
//   codebook  in and out, [K, d]
//   empty     out, [K]: 1 where an entry has no point
//   terms     out, [K * d]: each coordinate's share of the objective's drop
// A thread: one entry. 3.5 us on an H100 at K = 4096, d = 6.
__global__ void kmeans_move(const int64_t* __restrict__ sums, int64_t entries, int d, double scale,
                            float* __restrict__ codebook, uint8_t* __restrict__ empty,
                            double* __restrict__ terms) {
    const int64_t k = static_cast<int64_t>(blockIdx.x) * kKmeansThreads + threadIdx.x;
    if (k >= entries) return;
    const int64_t* sum = sums + k * (2 * d + 1);
    empty[k] = sum[2 * d] == 0;
    for (int j = 0; j < d; ++j) {
        const double numerator = static_cast<double>(sum[j]);
        const double denominator = static_cast<double>(sum[d + j]);
        float& c = codebook[k * d + j];
        if (sum[d + j] > 0) c = static_cast<float>(numerator / denominator);
        const double value = c;
        terms[k * d + j] = (2.0 * value * numerator - value * value * denominator) / scale;
    }
}

// *total = the sum of terms [count] in runs of kKmeansTermRun.
// One block: a thread adds up one run after another, and thread 0 the runs. Predicted for an H100,
// 24576 terms (K = 4096, d = 6): 7 us, in two rounds of a chain of 64 additions that wait for 16
// loads at a time; one thread that added them all took 136.
__global__ void kmeans_add_terms(const double* __restrict__ terms, int64_t count,
                                 double* __restrict__ total) {
    double* runs = reinterpret_cast<double*>(shared_memory());  // [kKmeansThreads]
    const int64_t all = (count + kKmeansTermRun - 1) / kKmeansTermRun;
    double sum = 0.0;
    for (int64_t first = 0; first < all; first += kKmeansThreads) {
        const int64_t begin = (first + threadIdx.x) * kKmeansTermRun;
        const int64_t left = count - begin;
        double run = 0.0;
        if (left >= kKmeansTermRun) {
#pragma unroll 16
            for (int i = 0; i < kKmeansTermRun; ++i) run += terms[begin + i];
        } else {
            for (int64_t i = 0; i < left; ++i) run += terms[begin + i];
        }
        runs[threadIdx.x] = run;
        __syncthreads();
        if (threadIdx.x == 0) {
            const int64_t here = all - first < kKmeansThreads ? all - first : kKmeansThreads;
            for (int64_t r = 0; r < here; ++r) sum += runs[r];
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) *total = sum;
}

// The weighted squared error of every point.
//   kD      d
//   errors  out, [rows, positions]
// Block (x, y): kKmeansThreads positions of row x; a thread: one point.
template <int kD>
__global__ void kmeans_point_errors(KmeansProblem problem, float* __restrict__ errors) {
    const int64_t positions = positions_of(problem, kD);
    const int64_t position = static_cast<int64_t>(blockIdx.y) * kKmeansThreads + threadIdx.x;
    const int64_t row = blockIdx.x;
    if (position >= positions) return;
    float x[kD];
    read_point<kD>(problem, row, position, x);
    const int64_t point = row * positions + position;
    const float* c = problem.codebook + static_cast<int64_t>(problem.codes[point]) * kD;
    double error = 0.0;
#pragma unroll
    for (int j = 0; j < kD; ++j) {
        const double distance = static_cast<double>(x[j]) - static_cast<double>(c[j]);
        error += problem.h[position * kD + j] * distance * distance;
    }
    errors[point] = static_cast<float>(error);
}

// Adds every point to the spread of its entry.
//   kD      d
//   scale   of the integers, as for sums
//   spread  in and out, [K, kD], zero at the start
// Block (x, y): kKmeansThreads positions of row x; a thread: one point.
template <int kD>
__global__ void kmeans_add_spread(KmeansProblem problem, double scale,
                                  int64_t* __restrict__ spread) {
    const int64_t positions = positions_of(problem, kD);
    const int64_t position = static_cast<int64_t>(blockIdx.y) * kKmeansThreads + threadIdx.x;
    const int64_t row = blockIdx.x;
    if (position >= positions) return;
    float x[kD];
    read_point<kD>(problem, row, position, x);
    const int64_t k = problem.codes[row * positions + position];
#pragma unroll
    for (int j = 0; j < kD; ++j) {
        const double distance = static_cast<double>(x[j]) - problem.codebook[k * kD + j];
        const double error = problem.h[position * kD + j] * distance * distance;
        add_integer(spread + k * kD + j, round_to_integer(error * scale));
    }
}

// What moving all points of an entry to the entry that suits them best costs.
//   kD        d
//   sums      [K, 2 kD + 1]
//   codebook  [K, kD]
//   chosen    [blocks]: which entries
//   costs     out, [blocks]
// A block: one entry, of which its threads share out the others. The smallest does not depend on
// the order.
template <int kD>
__global__ void kmeans_merge_cost(const int64_t* __restrict__ sums,
                                  const float* __restrict__ codebook, int64_t entries, double scale,
                                  const int64_t* __restrict__ chosen, float* __restrict__ costs) {
    float* warps = reinterpret_cast<float*>(shared_memory());
    const int64_t k = chosen[blockIdx.x];
    float entry[kD], weights[kD];
#pragma unroll
    for (int j = 0; j < kD; ++j) {
        entry[j] = codebook[k * kD + j];
        weights[j] = static_cast<float>(sums[k * (2 * kD + 1) + kD + j] / scale);
    }
    float cost = INFINITY;
    for (int64_t m = threadIdx.x; m < entries; m += kKmeansThreads) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kD; ++j) {
            const float t = entry[j] - codebook[m * kD + j];
            sum = fused(weights[j] * t, t, sum);
        }
        if (m != k && sum < cost) cost = sum;
    }
    for (int flip = kWarpSize / 2; flip > 0; flip /= 2) {
        cost = fminf(cost, __shfl_xor_sync(kFullWarp, cost, flip));
    }
    if (threadIdx.x % kWarpSize == 0) warps[threadIdx.x / kWarpSize] = cost;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int warp = 1; warp < kKmeansThreads / kWarpSize; ++warp) cost = fminf(cost, warps[warp]);
    costs[blockIdx.x] = cost;
}

// energies[row] = the sum of h x^2 of the row, ascending; energies [rows].
// A block of one warp: 32 rows, a lane a row; tiles go through shared memory so that loads stay
// coalesced.
__global__ void kmeans_row_energies(KmeansProblem problem, double* __restrict__ energies) {
    float* tile = reinterpret_cast<float*>(shared_memory());
    const int lane = threadIdx.x;
    const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kEnergyTile;
    double energy = 0.0;
    for (int64_t first = 0; first < problem.cols; first += kEnergyTile) {
        __syncwarp();
        for (int i = 0; i < kEnergyTile; ++i) {
            const bool inside = first_row + i < problem.rows && first + lane < problem.cols;
            tile[i * (kEnergyTile + 1) + lane] =
                inside ? problem.w[(first_row + i) * problem.cols + first + lane] : 0.0f;
        }
        __syncwarp();
        for (int j = 0; j < kEnergyTile && first + j < problem.cols; ++j) {
            const double x = tile[lane * (kEnergyTile + 1) + j];
            energy += static_cast<double>(problem.h[first + j]) * x * x;
        }
    }
    if (first_row + lane < problem.rows) energies[first_row + lane] = energy;
}

}  // namespace nowag::cuda
