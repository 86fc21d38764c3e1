#include "cuda/base/dispatch.h"
#include "cuda/base/launch.h"
#include "cuda/prune/prune.cuh"
#include "cuda/prune/prune_parts.cuh"
#include "nowag/prune.h"

namespace nowag::cuda {

namespace {

// Which of four weights are kept: at least 4 - n of the others come before each, a smaller key or
// the same further left.
__device__ __forceinline__ unsigned kept_of_four(const unsigned (&keys)[4], int n) {
    int before[4] = {};
#pragma unroll
    for (int b = 1; b < 4; ++b) {
#pragma unroll
        for (int a = 0; a < b; ++a) {
            const bool first = keys[a] <= keys[b];
            before[b] += first;
            before[a] += !first;
        }
    }
    unsigned kept = 0;
#pragma unroll
    for (int c = 0; c < 4; ++c) kept |= static_cast<unsigned>(before[c] >= 4 - n) << c;
    return kept;
}

}  // namespace

template <bool kVector>
__global__ void __launch_bounds__(kPruneThreads, 4)
    prune_fours(PruneLayer layer, int n, unsigned* bitmap) {
    const int64_t words = padded_columns(layer.cols) / 32;
    const unsigned across = static_cast<unsigned>((layer.cols + kSplitColumns - 1) / kSplitColumns);
    const unsigned down = static_cast<unsigned>((layer.rows + kSplitRows - 1) / kSplitRows);
    for (int u = 0; u < kUnitsPerWarp; ++u) {
        const unsigned unit = unit_of_warp(u);
        if (unit >= across * down) break;
        const SplitPart part(layer, unit, across);
        const SplitWeights<kVector> weights(layer, part);
        unsigned kept = 0;
#pragma unroll
        for (int r = 0; r < kSplitRows; ++r) {
            unsigned keys[4];
            weights.keys(r, keys);
            kept |= kept_of_four(keys, n) << 4 * r;
        }
        write_part(part, kept & present_bits(part), words, bitmap);
    }
}

__global__ void prune_sum_rows(PruneLayer layer, const uint8_t* __restrict__ bitmap,
                               double* __restrict__ row_sums) {
    constexpr int kLanes = static_cast<int>(kObjectiveLanes);
    const int lane = threadIdx.x % kLanes;
    const int64_t row = (static_cast<int64_t>(blockIdx.x) * kPruneThreads + threadIdx.x) / kLanes;
    const int64_t i = row < layer.rows ? row : layer.rows - 1;
    const int64_t padded = padded_columns(layer.cols);
    const uint2* kept = reinterpret_cast<const uint2*>(bitmap + i * (padded / 8));
    double pruned = 0.0, all = 0.0;
    for (int64_t first = 0; first < layer.cols; first += kSumAhead * kLanes) {
        float w[kSumAhead], h[kSumAhead];
        uint2 bits[kSumAhead / 8];
#pragma unroll
        for (int s = 0; s < kSumAhead; ++s) {
            const int64_t j = first + s * kLanes + lane;
            w[s] = j < layer.cols ? layer.w[i * layer.cols + j] : 0.0f;
            h[s] = j < layer.cols ? layer.h[j] : 0.0f;
        }
#pragma unroll
        for (int u = 0; u < kSumAhead / 8; ++u) {
            const int64_t unit = first / kBitmapAlign + u;
            bits[u] = unit < padded / kBitmapAlign ? kept[unit] : make_uint2(0u, 0u);
        }
#pragma unroll
        for (int s = 0; s < kSumAhead; ++s) {
            const double square = static_cast<double>(w[s]) * w[s];
            const double saliency = h[s] * square;
            const unsigned word = s % 8 < 4 ? bits[s / 8].x : bits[s / 8].y;
            all += saliency;
            if (!((word >> (8 * (s % 4) + lane)) & 1)) pruned += saliency;
        }
    }
    for (int half = kLanes / 2; half > 0; half /= 2) {
        all += __shfl_down_sync(kFullWarp, all, half, kLanes);
        pruned += __shfl_down_sync(kFullWarp, pruned, half, kLanes);
    }
    if (lane == 0 && row < layer.rows) {
        row_sums[2 * row] = pruned;
        row_sums[2 * row + 1] = all;
    }
}

__global__ void prune_add_rows(const double* __restrict__ row_sums, int64_t rows,
                               double* __restrict__ sums) {
    double* staged = reinterpret_cast<double*>(shared_memory());
    double sum = 0.0;
    for (int64_t first = 0; first < rows; first += kAddRows) {
        const int count = static_cast<int>(rows - first < kAddRows ? rows - first : kAddRows);
        constexpr int kEach = 2 * kAddRows / kPruneThreads;
        double mine[kEach];  // so that many are on their way at once
#pragma unroll
        for (int k = 0; k < kEach; ++k) {
            const int e = k * kPruneThreads + static_cast<int>(threadIdx.x);
            mine[k] = e < 2 * count ? row_sums[2 * first + e] : 0.0;
        }
#pragma unroll
        for (int k = 0; k < kEach; ++k) staged[k * kPruneThreads + threadIdx.x] = mine[k];
        __syncthreads();
        if (threadIdx.x < 2) {
#pragma unroll 16
            for (int i = 0; i < count; ++i) sum += staged[2 * i + threadIdx.x];
        }
        __syncthreads();
    }
    if (threadIdx.x < 2) sums[threadIdx.x] = sum;
}

int64_t prune_select_nm_workspace(const float*, const float*, int64_t, int64_t, int, int,
                                  uint8_t*) {
    return 0;
}

Status prune_select_nm(const float* w, const float* h, int64_t rows, int64_t cols, int n, int m,
                       uint8_t* bitmap, void*, Stream stream) {
    const dim3 grid(static_cast<unsigned>(rows),
                    blocks_for(8 * bitmap_row_bytes(cols), kPruneThreads));
    if (!valid_layer(rows, cols) || grid.y > kMaxGridY || n < 1 || n > m || m > kMaxGroup ||
        cols % m != 0) {
        return Status::invalid_argument;
    }
    const PruneLayer layer{w, h, rows, cols};
    if (m == 4) {
        const auto fours = read_in_fours(layer) ? prune_fours<true> : prune_fours<false>;
        return launch(fours, blocks_for(units_of(layer), kUnitsPerWarp * kPruneWarps),
                      kPruneThreads, 0, stream, layer, n, reinterpret_cast<unsigned*>(bitmap));
    }
    const auto kernel = kWarpSize % m == 0 ? prune_nm<true> : prune_nm<false>;
    return launch(kernel, grid, kPruneThreads, 0, stream, layer, n, m, bitmap);
}

int64_t prune_objective_workspace(const float*, const float*, const uint8_t*, int64_t rows, int64_t,
                                  double*) {
    return 2 * rows * static_cast<int64_t>(sizeof(double));
}

Status prune_objective(const float* w, const float* h, const uint8_t* bitmap, int64_t rows,
                       int64_t cols, double* sums, void* workspace, Stream stream) {
    if (rows < 1 || cols < 1) return Status::invalid_argument;
    double* row_sums = static_cast<double*>(workspace);
    return in_order(
        [&] {
            return launch(prune_sum_rows, blocks_for(rows * kObjectiveLanes, kPruneThreads),
                          kPruneThreads, 0, stream, PruneLayer{w, h, rows, cols}, bitmap, row_sums);
        },
        [&] {
            return launch(prune_add_rows, 1, kPruneThreads, 2 * sizeof(double) * kAddRows, stream,
                          row_sums, rows, sums);
        });
}

}  // namespace nowag::cuda
