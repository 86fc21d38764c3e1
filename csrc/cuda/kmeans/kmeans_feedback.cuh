// kmeans_feedback.h on a GPU. Rows do not depend on each other, so a block takes a few through all
// positions; every position is settled by looking at all entries, in its metric, whatever d and K.
//
//   entries     a thread: kOwn of them for each chunk of the codebook. Where one chunk is all
//   +---+---+   (K = 4096 up to d = 6) they stay in its registers, and are only turned into the
//   |   |   |   next position's metric.
//   +---+---+   Few entries: a group of fewer threads looks at them, and the groups of a block
//   groups      share its rows.
//
// Predicted for an H100, 4096 x 4096, d = 6, K = 4096, blocks of 32 rows: 5.5 ms for the 683
// positions, in 33 calls. Of a position's 13 k cycles 10.5 k go to scores and their minimum, bound
// by issue (163 instructions for a thread's 16 entries of a row), 1.3 k to turning the entries, 0.6
// k to what earlier errors carry. Every entry is looked at: the targets leave room for twenty times
// as much.
#pragma once

#include "cuda/kmeans/kmeans_points.cuh"
#include "nowag/kmeans_feedback.h"

namespace nowag::cuda {

constexpr int kFeedbackThreads = 256;
constexpr int kFeedbackWarps = kFeedbackThreads / kWarpSize;
constexpr int kMostFeedbackRows = 32;  // of a block

// Entries of a thread at once: as many as registers have room for.
template <int kD>
constexpr int kFeedbackOwn = kD <= 6 ? 16 : 8;

// The operands of kmeans_feedback.h, but for K and d.
struct FeedbackOperands {
    float* x;
    int64_t x_stride;
    float* carried;
    const float* factor;
    int64_t factor_stride;
    const float* codebook;
    int64_t rows;
    int64_t positions;
    uint16_t* codes;
    double scale;
    int64_t* sums;
};

// The smallest score that was found, as an integer of the same order, and the lowest entry that has
// it.
struct FeedbackLeast {
    unsigned key;
    unsigned entry;

    __device__ __forceinline__ bool before(const FeedbackLeast& other) const {
        return key < other.key || (key == other.key && entry < other.entry);
    }
};

template <int kD>
struct FeedbackShared {
    float y[kMostFeedbackRows][(kD + 3) / 4 * 4];
    float v[kD * kD];  // of the position
    FeedbackLeast least[kFeedbackWarps][kMostFeedbackRows];
    unsigned best[kMostFeedbackRows];
};

// A score's place in the order of scores; those that are equal have the same.
__device__ __forceinline__ unsigned key_of_score(float score) {
    const unsigned bits = __float_as_uint(score + 0.0f);  // there is no -0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// An entry in a position's metric.
template <int kD>
__device__ __forceinline__ void turn_entry(const float (&c)[kD], const float* v, float (&e)[kD]) {
#pragma unroll
    for (int j = 0; j < kD; ++j) {
        e[j] = 0.0f;
#pragma unroll
        for (int a = 0; a < kD; ++a) e[j] = fused(c[a], v[a * kD + j], e[j]);
    }
}

// What one point of a position adds to column q of its entry's sums.
template <int kD>
__device__ __forceinline__ int64_t feedback_summand(const float* y, const float* v, int q,
                                                    double scale) {
    if (q == kD + kD * (kD + 1) / 2) return 1;
    double sum = 0.0;
    if (q < kD) {
        for (int j = q; j < kD; ++j) {
            sum += static_cast<double>(y[j]) * static_cast<double>(v[q * kD + j]);
        }
    } else {
        int a = 0, b = q - kD;  // of the triangle's rows, whose lengths fall from kD
        while (b >= kD - a) b -= kD - a++;
        b += a;
        for (int j = b; j < kD; ++j) {
            sum += static_cast<double>(v[a * kD + j]) * static_cast<double>(v[b * kD + j]);
        }
    }
    return round_to_integer(sum * scale);
}

//   kD             d
//   entries        K
//   rows_of_block  up to kMostFeedbackRows
//   group_threads  that look at all entries of a row together: whole warps, a divisor of the
//                  block's
// Block x: rows x rows_of_block on; a group: every n-th of them; a thread: entries.
template <int kD>
__global__ void __launch_bounds__(kFeedbackThreads, 1)
    kmeans_feedback_rows(FeedbackOperands operands, int entries, int rows_of_block,
                         int group_threads) {
    constexpr int kOwn = kFeedbackOwn<kD>, kSums = kD + kD * (kD + 1) / 2 + 1;
    auto& shared = *reinterpret_cast<FeedbackShared<kD>*>(shared_memory());
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int groups = kFeedbackThreads / group_threads, group_warps = group_threads / kWarpSize;
    const int group = static_cast<int>(threadIdx.x) / group_threads;
    const int member = static_cast<int>(threadIdx.x) % group_threads;
    const int64_t first_row = static_cast<int64_t>(blockIdx.x) * rows_of_block;
    const int64_t left = operands.rows - first_row;
    const int rows = static_cast<int>(left < rows_of_block ? left : rows_of_block);
    const int64_t columns = operands.positions * kD;
    float* const x = operands.x + first_row * operands.x_stride;
    float* const carried = operands.carried + first_row * columns;

    const int chunk = group_threads * kOwn;
    float c[kOwn][kD];
    const auto read_entries = [&](int first) {
#pragma unroll
        for (int e = 0; e < kOwn; ++e) {
            const int k = first + e * group_threads + member;
#pragma unroll
            for (int j = 0; j < kD; ++j)
                c[e][j] = k < entries ? operands.codebook[k * kD + j] : 0.0f;
        }
    };

    for (int64_t p = 0; p < operands.positions; ++p) {
        const float* v = operands.factor + p * kD;  // column p kD
        for (int i = threadIdx.x; i < rows * kD; i += kFeedbackThreads) {
            const int r = i / kD, j = i % kD;
            const float* row = x + r * operands.x_stride;
            float y = carried[r * columns + p * kD + j];
#pragma unroll 4
            for (int64_t at = 0; at < (p + 1) * kD; ++at) {
                y = fused(row[at], v[at * operands.factor_stride + j], y);
            }
            shared.y[r][j] = y;
        }
        for (int i = threadIdx.x; i < kD * kD; i += kFeedbackThreads) {
            shared.v[i] = v[(p * kD + i / kD) * operands.factor_stride + i % kD];
        }
        __syncthreads();

        for (int first = 0; first < entries; first += chunk) {
            if (p == 0 || entries > chunk) read_entries(first);
            float turned[kOwn][kD], bias[kOwn];
#pragma unroll
            for (int e = 0; e < kOwn; ++e) {
                turn_entry<kD>(c[e], shared.v, turned[e]);
                bias[e] = 0.0f;
#pragma unroll
                for (int j = 0; j < kD; ++j) bias[e] = fused(turned[e][j], turned[e][j], bias[e]);
                if (first + e * group_threads + member >= entries) bias[e] = INFINITY;
            }
            for (int r = group; r < rows; r += groups) {
                float lowest = INFINITY;
                unsigned entry = static_cast<unsigned>(first + member);
#pragma unroll
                for (int e = 0; e < kOwn; ++e) {
                    float score = bias[e];
#pragma unroll
                    for (int j = 0; j < kD; ++j) {
                        score = fused(-2.0f * shared.y[r][j], turned[e][j], score);
                    }
                    if (score < lowest) {
                        lowest = score;
                        entry = static_cast<unsigned>(first + e * group_threads + member);
                    }
                }
                FeedbackLeast least{};
                const unsigned own = key_of_score(lowest);
                least.key = __reduce_min_sync(kFullWarp, own);
                least.entry = __reduce_min_sync(kFullWarp, own == least.key ? entry : ~0u);
                if (lane == 0 && (first == 0 || least.before(shared.least[warp][r]))) {
                    shared.least[warp][r] = least;
                }
            }
        }
        __syncthreads();

        for (int r = threadIdx.x; r < rows; r += kFeedbackThreads) {
            const int first_warp = r % groups * group_warps;
            FeedbackLeast least = shared.least[first_warp][r];
            for (int w = 1; w < group_warps; ++w) {
                const FeedbackLeast other = shared.least[first_warp + w][r];
                if (other.before(least)) least = other;
            }
            shared.best[r] = least.entry;
            operands.codes[(first_row + r) * operands.positions + p] =
                static_cast<uint16_t>(least.entry);
        }
        __syncthreads();

        for (int i = threadIdx.x; i < rows * kD; i += kFeedbackThreads) {
            const int r = i / kD, j = i % kD;
            const float* entry = operands.codebook + static_cast<int64_t>(shared.best[r]) * kD;
            float e = 0.0f;
#pragma unroll
            for (int a = 0; a < kD; ++a) e = fused(entry[a], shared.v[a * kD + j], e);
            carried[r * columns + p * kD + j] = shared.y[r][j] - e;
            x[r * operands.x_stride + p * kD + j] -= entry[j];
        }
        for (int i = threadIdx.x; operands.sums != nullptr && i < rows * kSums;
             i += kFeedbackThreads) {
            const int r = i / kSums, q = i % kSums;
            add_integer(operands.sums + static_cast<int64_t>(shared.best[r]) * kSums + q,
                        feedback_summand<kD>(shared.y[r], shared.v, q, operands.scale));
        }
        __syncthreads();
    }
}

}  // namespace nowag::cuda
