#include "dispatch.h"
#include "launch.h"
#include "launchers.h"
#include "prune.cuh"

namespace nowag::cuda {

__global__ void prune_histogram(PruneLayer layer, int digit, unsigned n_prune,
                                PruneScratch* scratch) {
    unsigned* histogram = reinterpret_cast<unsigned*>(shared_memory());
    const unsigned prefix = find_threshold(*scratch, digit, n_prune, histogram + kBins).prefix;
    // Bits above this digit; shifting by 32 is undefined, hence the two steps.
    const int above = digit == 0 ? 31 : digit_shift(digit - 1);
    for (int bin = threadIdx.x; bin < kBins; bin += kPruneThreads) histogram[bin] = 0;
    __syncthreads();
    const int64_t begin = blockIdx.x * layer.rows_a_block;
    const int64_t end =
        begin + layer.rows_a_block < layer.rows ? begin + layer.rows_a_block : layer.rows;
    for (int64_t i = begin; i < end; ++i) {
#pragma unroll 4
        for (int64_t j = threadIdx.x; j < layer.cols; j += kPruneThreads) {
            const unsigned bits = saliency_bits(layer, i, j);
            if ((bits ^ prefix) >> above == 0) {
                atomicAdd(&histogram[bits >> digit_shift(digit) & digit_mask(digit)], 1u);
            }
        }
    }
    __syncthreads();
    for (int bin = threadIdx.x; bin < kBins; bin += kPruneThreads) {
        if (histogram[bin] > 0) atomicAdd(&scratch->histogram[digit][bin], histogram[bin]);
    }
}

__global__ void prune_count_ties(PruneLayer layer, unsigned n_prune, PruneScratch* scratch) {
    unsigned* shared = reinterpret_cast<unsigned*>(shared_memory());
    const PruneThreshold threshold = find_threshold(*scratch, kDigits, n_prune, shared);
    if (threshold.rank == threshold.equal) return;
    const int64_t begin = blockIdx.x * layer.rows_a_block;
    const int64_t end =
        begin + layer.rows_a_block < layer.rows ? begin + layer.rows_a_block : layer.rows;
    unsigned ties = 0;
    for (int64_t i = begin; i < end; ++i) {
        for (int64_t j = threadIdx.x; j < layer.cols; j += kPruneThreads) {
            ties += saliency_bits(layer, i, j) == threshold.prefix;
        }
    }
    const unsigned total = block_scan(ties, shared);
    if (threadIdx.x == kPruneThreads - 1) scratch->ties[blockIdx.x] = total;
}

namespace {

// Ties with a lower flat index in the blocks before this one. Every thread gets the result.
__device__ unsigned ties_before(const PruneScratch& scratch, unsigned* shared) {
    unsigned mine = 0;
    for (unsigned block = threadIdx.x; block < blockIdx.x; block += kPruneThreads) {
        mine += scratch.ties[block];
    }
    const unsigned sum = block_scan(mine, shared);
    if (threadIdx.x == kPruneThreads - 1) shared[kPruneWarps] = sum;
    __syncthreads();
    const unsigned before = shared[kPruneWarps];
    __syncthreads();
    return before;
}

}  // namespace

__global__ void prune_write(PruneLayer layer, unsigned n_prune, const PruneScratch* scratch,
                            uint8_t* bitmap) {
    unsigned* shared = reinterpret_cast<unsigned*>(shared_memory());
    const PruneThreshold threshold = find_threshold(*scratch, kDigits, n_prune, shared);
    const bool ranked = threshold.rank != threshold.equal;
    unsigned seen = ranked ? ties_before(*scratch, shared) : 0u;
    const int64_t padded = padded_columns(layer.cols);
    const int64_t begin = blockIdx.x * layer.rows_a_block;
    const int64_t end =
        begin + layer.rows_a_block < layer.rows ? begin + layer.rows_a_block : layer.rows;
    for (int64_t i = begin; i < end; ++i) {
        for (int64_t segment = 0; segment < padded; segment += kPruneThreads) {
            const int64_t j = segment + threadIdx.x;
            const unsigned bits = j < layer.cols ? saliency_bits(layer, i, j) : 0u;
            const bool tie = j < layer.cols && bits == threshold.prefix;
            bool pruned = bits < threshold.prefix || tie;
            if (ranked) {
                const unsigned rank = seen + block_scan(tie, shared);
                pruned = bits < threshold.prefix || (tie && rank <= threshold.rank);
                seen += static_cast<unsigned>(__syncthreads_count(tie));
            }
            const unsigned kept = __ballot_sync(kFullWarp, j < layer.cols && !pruned);
            if (threadIdx.x % kWarpSize == 0 && j < padded) {
                reinterpret_cast<unsigned*>(bitmap)[(i * padded + j) / kWarpSize] = kept;
            }
        }
    }
}

__global__ void prune_keep_all(int64_t rows, int64_t cols, uint8_t* bitmap) {
    const int64_t row_bytes = padded_columns(cols) / 8;
    const int64_t byte = static_cast<int64_t>(blockIdx.x) * kPruneThreads + threadIdx.x;
    if (byte >= rows * row_bytes) return;
    const int64_t left = cols - byte % row_bytes * 8;
    bitmap[byte] = static_cast<uint8_t>(left >= 8 ? 0xff : left <= 0 ? 0 : (1 << left) - 1);
}

__global__ void prune_sum_rows(PruneLayer layer, const uint8_t* __restrict__ bitmap,
                               double* __restrict__ row_sums) {
    constexpr int kLanes = static_cast<int>(kObjectiveLanes);
    const int lane = threadIdx.x % kLanes;
    const int64_t row = (static_cast<int64_t>(blockIdx.x) * kPruneThreads + threadIdx.x) / kLanes;
    const int64_t i = row < layer.rows ? row : layer.rows - 1;
    const uint8_t* kept = bitmap + i * (padded_columns(layer.cols) / 8);
    double pruned = 0.0, all = 0.0;
    for (int64_t j = lane; j < layer.cols; j += kLanes) {
        const double w = layer.w[i * layer.cols + j];
        const double saliency = layer.h[j] * (w * w);
        all += saliency;
        if (!((kept[j / 8] >> (j % 8)) & 1)) pruned += saliency;
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
    double sum = 0.0;
#pragma unroll 8
    for (int64_t i = 0; i < rows; ++i) sum += row_sums[2 * i + threadIdx.x];
    sums[threadIdx.x] = sum;
}

namespace {

constexpr int kBlocksPerMultiprocessor = 8;

int64_t prune_blocks(int64_t rows) {
    const int64_t wanted = kBlocksPerMultiprocessor * device_limits().multiprocessors;
    return rows < wanted ? rows : wanted;
}

bool valid_layer(int64_t rows, int64_t cols) {
    return rows >= 1 && cols >= 1 && rows <= kMaxPruneWeights / cols;
}

}  // namespace

int64_t prune_select_workspace(const float*, const float*, int64_t rows, int64_t, int64_t,
                               uint8_t*) {
    return static_cast<int64_t>(sizeof(PruneScratch)) +
           prune_blocks(rows) * static_cast<int64_t>(sizeof(unsigned));
}

Status prune_select(const float* w, const float* h, int64_t rows, int64_t cols, int64_t n_prune,
                    uint8_t* bitmap, void* workspace, Stream stream) {
    if (!valid_layer(rows, cols) || n_prune < 0 || n_prune > rows * cols) {
        return Status::invalid_argument;
    }
    if (n_prune == 0) {
        return launch(prune_keep_all, blocks_for(rows * bitmap_row_bytes(cols), kPruneThreads),
                      kPruneThreads, 0, stream, rows, cols, bitmap);
    }
    const int64_t rows_a_block = ceil_div(rows, prune_blocks(rows));
    const unsigned blocks = blocks_for(rows, rows_a_block);
    const PruneLayer layer{w, h, rows, cols, rows_a_block};
    const unsigned count = static_cast<unsigned>(n_prune);
    PruneScratch* scratch = static_cast<PruneScratch*>(workspace);
    const auto histogram = [&](int digit) {
        return launch(prune_histogram, blocks, kPruneThreads, kPruneHistogramShared, stream, layer,
                      digit, count, scratch);
    };
    constexpr size_t kShared = sizeof(unsigned) * (kPruneWarps + 3);
    return in_order([&] { return clear(scratch, sizeof(PruneScratch), stream); },
                    [&] { return histogram(0); }, [&] { return histogram(1); },
                    [&] { return histogram(2); },
                    [&] {
                        return launch(prune_count_ties, blocks, kPruneThreads, kShared, stream,
                                      layer, count, scratch);
                    },
                    [&] {
                        return launch(prune_write, blocks, kPruneThreads, kShared, stream, layer,
                                      count, static_cast<const PruneScratch*>(scratch), bitmap);
                    });
}

int64_t prune_select_nm_workspace(const float*, const float*, int64_t, int64_t, int, int,
                                  uint8_t*) {
    return 0;
}

Status prune_select_nm(const float* w, const float* h, int64_t rows, int64_t cols, int n, int m,
                       uint8_t* bitmap, void*, Stream stream) {
    const dim3 grid(static_cast<unsigned>(rows),
                    blocks_for(8 * bitmap_row_bytes(cols), kPruneThreads));
    if (!valid_layer(rows, cols) || grid.y > kMaxGridY || n < 1 || n > m || m > kWarpSize ||
        cols % m != 0) {
        return Status::invalid_argument;
    }
    const PruneLayer layer{w, h, rows, cols, 1};
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
                          kPruneThreads, 0, stream, PruneLayer{w, h, rows, cols, 1}, bitmap,
                          row_sums);
        },
        [&] { return launch(prune_add_rows, 1, 2, 0, stream, row_sums, rows, sums); });
}

}  // namespace nowag::cuda
