// Assignment by scanning the whole codebook: every d and K. Predicted for an H100 at 4096 x 4096,
// d = 4, K = 256: 0.30 ms, bound by issue (232 M instructions, 0.22 ms). It took 0.38 with L1 at
// 87 %: 1700 wavefronts a warp, 1200 of them of find(), whose lanes met in 4 banks, five times a
// try; they are 480 now.
//
// A block takes one position of kScanRows rows, kScanPoints a thread, so that an entry read from
// shared memory (a broadcast) serves kScanPoints * d multiply-adds. The minimum costs one
// instruction a score: which entry it was is worked out for the best group of 8 only.
#pragma once

#include "cuda/kmeans/kmeans_points.cuh"

namespace nowag::cuda {

constexpr int kScanThreads = 128;
constexpr int kScanPoints = 4;
constexpr int kScanRows = kScanThreads * kScanPoints;
constexpr int kScanGroup = 8;
constexpr int kScanSlab = 512;  // entries in shared memory at a time

// 16-byte parts of one entry: its coordinates, its bias, padding.
template <int kD>
constexpr int kScanParts = (kD + 1 + 3) / 4;

// Floats from one entry to the next in shared memory: an odd number of parts, so that entries lie
// in all banks when lanes read different ones (find).
template <int kD>
constexpr int kScanStride = (kScanParts<kD> | 1) * 4;

template <int kD>
constexpr size_t kScanShared = sizeof(float) * kScanSlab * kScanStride<kD>;

// An entry past the codebook's end gets a bias that never wins.
template <int kD>
__device__ __forceinline__ void scan_load_slab(const KmeansProblem& problem, const float (&h)[kD],
                                               int64_t first, int count, int64_t entries,
                                               float* slab) {
    for (int k = threadIdx.x; k < count; k += kScanThreads) {
        float c[kD];
        const bool real = first + k < entries;
#pragma unroll
        for (int j = 0; j < kD; ++j) c[j] = real ? problem.codebook[(first + k) * kD + j] : 0.0f;
#pragma unroll
        for (int j = 0; j < kD; ++j) slab[k * kScanStride<kD> + j] = c[j];
        slab[k * kScanStride<kD> + kD] = real ? bias_of<kD>(h, c) : INFINITY;
    }
}

template <int kD>
__device__ __forceinline__ float scan_score(const float (&a)[kD],
                                            const float (&entry)[4 * kScanParts<kD>]) {
    float score = entry[kD];
#pragma unroll
    for (int j = 0; j < kD; ++j) score = fused(a[j], entry[j], score);
    return score;
}

// An entry's coordinates and bias from shared memory, in 16-byte loads.
template <int kD>
__device__ __forceinline__ void scan_read_entry(const float* slab, int k,
                                                float (&entry)[4 * kScanParts<kD>]) {
#pragma unroll
    for (int j = 0; j < 4 * kScanParts<kD>; j += 4) {
        const float4 four = *reinterpret_cast<const float4*>(slab + k * kScanStride<kD> + j);
        entry[j] = four.x, entry[j + 1] = four.y;
        entry[j + 2] = four.z, entry[j + 3] = four.w;
    }
}

// The points of a thread: rows kScanThreads apart.
template <int kD>
struct ScanPoints {
    float a[kScanPoints][kD];  // -2 h x
    float lowest[kScanPoints];
    unsigned best[kScanPoints];

    // Rows from first_row on; those past the last row are points at the origin.
    __device__ __forceinline__ void read(const KmeansProblem& problem, const float (&h)[kD],
                                         int64_t first_row, int64_t position) {
#pragma unroll
        for (int r = 0; r < kScanPoints; ++r) {
            const int64_t row = first_row + r * kScanThreads;
            float x[kD] = {};
            if (row < problem.rows) read_point<kD>(problem, row, position, x);
#pragma unroll
            for (int j = 0; j < kD; ++j) a[r][j] = -2.0f * h[j] * x[j];
            lowest[r] = INFINITY;
            best[r] = 0;
        }
    }

    // Lowers `lowest` to the scores of the slab's first `count` entries, a multiple of kScanGroup;
    // group_of: the first entry of the group in which it was last lowered, or -1.
    __device__ __forceinline__ void lower(const float* slab, int count,
                                          int (&group_of)[kScanPoints]) {
#pragma unroll
        for (int r = 0; r < kScanPoints; ++r) group_of[r] = -1;
        for (int group = 0; group < count; group += kScanGroup) {
            float least[kScanPoints];
#pragma unroll
            for (int r = 0; r < kScanPoints; ++r) least[r] = INFINITY;
#pragma unroll
            for (int k = 0; k < kScanGroup; ++k) {
                float entry[4 * kScanParts<kD>];
                scan_read_entry<kD>(slab, group + k, entry);
#pragma unroll
                for (int r = 0; r < kScanPoints; ++r) {
                    least[r] = fminf(least[r], scan_score<kD>(a[r], entry));
                }
            }
#pragma unroll
            for (int r = 0; r < kScanPoints; ++r) {
                if (least[r] < lowest[r]) {
                    lowest[r] = least[r];
                    group_of[r] = group;
                }
            }
        }
    }

    // Which entries the lowest scores of the slab belong to; its first entry is number `first`.
    __device__ __forceinline__ void find(const float* slab, int64_t first,
                                         const int (&group_of)[kScanPoints]) {
#pragma unroll
        for (int r = 0; r < kScanPoints; ++r) {
            if (group_of[r] < 0) continue;
            int k = group_of[r];
            float entry[4 * kScanParts<kD>];
            while (scan_read_entry<kD>(slab, k, entry), scan_score<kD>(a[r], entry) != lowest[r]) {
                ++k;
            }
            best[r] = static_cast<unsigned>(first + k);
        }
    }
};

//   kD       d
//   entries  K
//   scale    of the sums' integers
//   warm     the codes hold the last assignment
//   changed  in and out: raised by how many codes differ from it (of all points if not warm)
// Block (x, y): position x of kScanRows rows; a thread: kScanPoints points, kScanThreads rows
// apart.
template <int kD>
__global__ void __launch_bounds__(kScanThreads, 4)
    kmeans_scan(KmeansProblem problem, int64_t entries, double scale, bool warm,
                unsigned long long* changed) {
    float* slab = reinterpret_cast<float*>(shared_memory());
    const int64_t position = blockIdx.x;
    const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kScanRows + threadIdx.x;
    float h[kD];
#pragma unroll
    for (int j = 0; j < kD; ++j) h[j] = problem.h[position * kD + j];
    ScanPoints<kD> points;
    points.read(problem, h, first_row, position);

    for (int64_t first = 0; first < entries; first += kScanSlab) {
        const int64_t left = (entries - first + kScanGroup - 1) / kScanGroup * kScanGroup;
        const int count = static_cast<int>(left < kScanSlab ? left : kScanSlab);
        __syncthreads();
        scan_load_slab<kD>(problem, h, first, count, entries, slab);
        __syncthreads();
        int group_of[kScanPoints];
        points.lower(slab, count, group_of);
        points.find(slab, first, group_of);
    }

    for (int r = 0; r < kScanPoints; ++r) {
        const int64_t row = first_row + r * kScanThreads;
        count_changed(settle_point<kD>(problem, row, position, points.best[r], scale, warm),
                      changed);
    }
}

}  // namespace nowag::cuda
