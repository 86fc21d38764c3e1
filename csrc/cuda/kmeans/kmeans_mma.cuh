// Assignment with tensor cores, exactly: d from 4 to 6 and large codebooks.
//
// The scores of 64 points against 8 entries are one step of tf32 matrix products: the inner
// dimension of 8 holds the point's -2 h x (6), and two ones against the entry's bias in two parts.
// The sum starts at minus what an entry has to score to matter: the score of the point's best entry
// so far and E (below), how far tf32 scores can be off. So a sign bit says which entries to score
// again in the pinned float32 arithmetic of kmeans.h, and a 3-input OR gathers two of them. With
// the last assignment to start from these are 1.02 to 1.15 entries a point at d = 6, K = 4096, one
// of them the last assignment itself; without, 6.3 (simulated).
//
//   block: 16 warps, 1024 rows of one position; a slab of entries in shared memory
//   warp:  64 points = 4 fragments of 16 rows; lane 4 g + t owns rows g and g + 8 of fragment t.
//          It looks at 256 entries, 32 tiles, then scores those that are near again
//
// Predicted for an H100 at n = 2.8 M, K = 4096, d = 6: 0.85 ms an iteration, the first 1.8. A tile
// is 4 mma, which bound it: 7 clocks a multiprocessor, 0.60 ms in all. ORs and shifts take 5.3,
// issue 4.2 (17 instructions). Scoring again adds 2300 instructions to a warp's 8500: 27 rounds,
// whose latencies, 12 k clocks, the other three warps of a scheduler fill. Loading a block's slab
// and points and adding up what moved is not hidden: 0.1 ms. It took 2.26 ms when minima were
// searched for (0.73 of FMNMX) and the whole warp scored, for one point after another, the 64
// entries again that a minimum stood for; half of the wavefronts of those loads were conflicts.
#pragma once

#include "cuda/kmeans/kmeans_points.cuh"

namespace nowag::cuda {

constexpr int kMmaThreads = 512;
constexpr int kMmaWarps = kMmaThreads / kWarpSize;
constexpr int kMmaFragments = 4;
constexpr int kMmaWarpPoints = 16 * kMmaFragments;
constexpr int kMmaRows = kMmaWarps * kMmaWarpPoints;
// Shorter sub-vectors are scanned: the search costs as much as they do.
constexpr int kMmaMinD = 4;
constexpr int kMmaMaxD = 6;
constexpr int kMmaTile = 8;                // entries of a product
constexpr int kMmaGroup = 32 * kMmaTile;   // a bit of a mask for each tile
constexpr int kMmaFirst = 64;              // entries that start a search without a last assignment
constexpr float kMmaNeverWins = 0x1p126f;  // bias of an entry past the codebook's end

// An entry in shared memory, in the order of mma's second operand, row 0, 4, 1, 5, 2, 6, 3, 7: rows
// 0 to 5 are its coordinates, 6 and 7 its bias: the part that tf32 holds exactly, and the rest.
struct MmaEntry {
    float4 low;   // c0 c4 c1 c5
    float4 high;  // c2 bias c3 rest

    template <int kD>
    __device__ __forceinline__ void get(float (&c)[kD], float& bias) const {
        const float4 first = low, second = high;
        const float all[kMmaMaxD] = {first.x, first.z, second.x, second.z, first.y, first.w};
#pragma unroll
        for (int j = 0; j < kD; ++j) c[j] = all[j];
        bias = second.y + second.w;  // exact: the rest is what the other part lacks
    }

    template <int kD>
    __device__ __forceinline__ void set(const float (&c)[kD], float bias) {
        float all[kMmaMaxD] = {};
#pragma unroll
        for (int j = 0; j < kD; ++j) all[j] = c[j];
        const float top = __uint_as_float(__float_as_uint(bias) & 0xffffe000u);
        low = make_float4(all[0], all[4], all[1], all[5]);
        high = make_float4(all[2], top, all[3], bias - top);
    }
};

// A point in shared memory.
struct alignas(16) MmaPoint {
    float a[kMmaMaxD];  // -2 h x, then zeros
    // Its best entry so far, below what that scores as an integer of the same order: the smaller of
    // two is the better entry, the lowest among equals.
    unsigned long long best;
};

constexpr size_t kMmaPointsShared = sizeof(MmaPoint) * kMmaRows;

// Read again where it is needed: the search has no registers to spare.
template <int kD>
__device__ __forceinline__ void read_metric(const KmeansProblem& problem, int64_t position,
                                            float (&h)[kD]) {
#pragma unroll
    for (int j = 0; j < kD; ++j) h[j] = problem.h[position * kD + j];
}

template <int kD>
__device__ __forceinline__ float exact_score(const float* a, const float (&c)[kD], float bias) {
    float score = bias;
#pragma unroll
    for (int j = 0; j < kD; ++j) score = fused(a[j], c[j], score);
    return score;
}

// Equal scores give equal integers (-0 as 0). No score that is not a number is to come here.
__device__ __forceinline__ unsigned long long ranked(float score, unsigned entry) {
    const unsigned bits = __float_as_uint(score + 0.0f);
    const unsigned ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
    return static_cast<unsigned long long>(ordered) << 32 | entry;
}

__device__ __forceinline__ float score_of(unsigned long long best) {
    const unsigned ordered = static_cast<unsigned>(best >> 32);
    return __uint_as_float(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}

// What an entry must score in tf32 to be at least as good as one that scores `score` exactly.
// energy: X = sum h x^2 of the point.
// E: how far the tf32 score of such an entry can be from its exact one. With D = score + X, the
// weighted squared distance, sum |a_j c_j| is at most 2 X + 2 sqrt(X D). a is rounded to tf32 and c
// truncated, with a scaled by 1 + 2^-11 to centre that: 2^-10 of the sum, taken 1/8 larger. All
// sums are float32, the longest of 9 terms of at most 3 X + 2 D: off by 2^-18 of X + D, and the
// bias in its two parts by 2^-19, and 2^-16 is allowed.
__device__ __forceinline__ float score_to_beat(float score, float energy) {
    const float distance = fmaxf(score + energy, 0.0f) * (1.0f + 0x1p-14f) + 0x1p-14f * energy;
    const float products = 2.0f * energy + 2.0f * sqrtf(energy * distance);
    const float error = 0x1.2p-10f * products + 0x1p-16f * (energy + distance) + 0x1p-100f;
    return score + error;
}

template <int kD>
__device__ __forceinline__ void mma_load_slab(const KmeansProblem& problem, int64_t position,
                                              int first, int count, int entries, MmaEntry* slab) {
    float h[kD];
    read_metric<kD>(problem, position, h);
    for (int k = threadIdx.x; k < count; k += kMmaThreads) {
        float c[kD] = {};
        const bool real = first + k < entries;
#pragma unroll
        for (int j = 0; j < kD; ++j) {
            if (real) c[j] = problem.codebook[(first + k) * kD + j];
        }
        slab[k].set<kD>(c, real ? bias_of<kD>(h, c) : kMmaNeverWins);
    }
}

// The point of `row`, with its last assignment if warm. Returns its energy; -1 past the last row.
template <int kD>
__device__ __forceinline__ float mma_start_point(const KmeansProblem& problem, int64_t row,
                                                 int64_t position, bool warm, MmaPoint& point) {
    float h[kD];
    read_metric<kD>(problem, position, h);
    float x[kD] = {}, a[kMmaMaxD] = {}, energy = 0.0f, score = INFINITY;
    unsigned best = 0;
    if (row < problem.rows) read_point<kD>(problem, row, position, x);
#pragma unroll
    for (int j = 0; j < kD; ++j) {
        a[j] = -2.0f * h[j] * x[j];
        energy = fused(h[j] * x[j], x[j], energy);
    }
    if (warm && row < problem.rows) {
        best = problem.codes[row * positions_of(problem, kD) + position];
        float c[kD];
#pragma unroll
        for (int j = 0; j < kD; ++j) c[j] = problem.codebook[best * kD + j];
        score = fminf(exact_score<kD>(a, c, bias_of<kD>(h, c)), INFINITY);
    }
#pragma unroll
    for (int j = 0; j < kMmaMaxD; ++j) point.a[j] = a[j];
    point.best = ranked(score, best);
    return row < problem.rows ? energy : -1.0f;
}

// The best of the slab's first entries, for a point without a last assignment.
template <int kD>
__device__ __forceinline__ void mma_try_first(const MmaEntry* slab, MmaPoint& point) {
    unsigned long long best = point.best;
#pragma unroll 2
    for (int k = 0; k < kMmaFirst; ++k) {
        float c[kD], bias;
        slab[k].get<kD>(c, bias);
        const float score = exact_score<kD>(point.a, c, bias);
        if (score < score_of(best)) best = ranked(score, static_cast<unsigned>(k));
    }
    point.best = best;
}

// A warp's points as the operands of products.
struct MmaOperands {
    MmaA a[kMmaFragments];
    MmaC beaten_by[kMmaFragments];  // minus the scores to beat

    __device__ __forceinline__ void load(const MmaPoint* points) {
        const int g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;
        const auto centred = [](float value) { return to_tf32(value * (1.0f + 0x1p-11f)); };
#pragma unroll
        for (int m = 0; m < kMmaFragments; ++m) {
            const float* low = points[16 * m + g].a;
            const float* high = points[16 * m + g + 8].a;
            a[m].x[0] = centred(low[t]);
            a[m].x[1] = centred(high[t]);
            // Columns 6 and 7 meet the two parts of the bias.
            a[m].x[2] = t < 2 ? centred(low[t + 4]) : __float_as_uint(1.0f);
            a[m].x[3] = t < 2 ? centred(high[t + 4]) : __float_as_uint(1.0f);
        }
    }

    // to_beat: the scores to beat of this lane's own points.
    __device__ __forceinline__ void set_scores(const float (&to_beat)[2]) {
#pragma unroll
        for (int m = 0; m < kMmaFragments; ++m) {
            const int owner = threadIdx.x % kWarpSize / 4 * 4 + m;
            const float low = -__shfl_sync(kFullWarp, to_beat[0], owner);
            const float high = -__shfl_sync(kFullWarp, to_beat[1], owner);
            beaten_by[m] = {{low, low, high, high}};
        }
    }

    // Of each tile of a group, the first in the highest bit, whether this lane's two entries may
    // beat what its points of fragments 2 i and 2 i + 1 have.
    __device__ __forceinline__ void search(const MmaEntry* group, unsigned (&near)[2]) const {
        const float2* operand = reinterpret_cast<const float2*>(group) + threadIdx.x % kWarpSize;
        near[0] = near[1] = 0;
#pragma unroll 16
        for (int tile = 0; tile < kMmaGroup / kMmaTile; ++tile) {
            const float2 b = operand[tile * kWarpSize];
            unsigned signs[2] = {};
#pragma unroll
            for (int m = 0; m < kMmaFragments; ++m) {
                const MmaC left = mma_tf32(a[m], b.x, b.y, beaten_by[m]);
#pragma unroll
                for (int i = 0; i < 4; ++i) signs[m / 2] |= __float_as_uint(left.x[i]);
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) near[i] = __funnelshift_l(signs[i], near[i], 1);
        }
    }
};

// Scores again what search() found in a group, whose first entry is number `first`: four tiles of
// lanes at a time, by 8 lanes each, one for each of the lane's 4 points and 2 entries. Whether any
// point has a better entry now.
template <int kD>
__device__ __forceinline__ bool mma_settle(const MmaEntry* group, unsigned first, MmaPoint* points,
                                           unsigned (&near)[2]) {
    const unsigned lane = threadIdx.x % kWarpSize;
    bool better = false;
    while (true) {
        const bool mine = (near[0] | near[1]) != 0;
        const unsigned found = __ballot_sync(kFullWarp, mine);
        if (found == 0) break;
        unsigned left = found;
#pragma unroll
        for (unsigned before = 0; before < 3; ++before) {
            if (before < lane / 8) left &= left - 1;
        }
        const unsigned source = left == 0 ? lane : __ffs(static_cast<int>(left)) - 1;
        const unsigned low = __shfl_sync(kFullWarp, near[0], static_cast<int>(source));
        const unsigned high = __shfl_sync(kFullWarp, near[1], static_cast<int>(source));
        if (left != 0) {
            const unsigned tile = 32 - __ffs(static_cast<int>(low != 0 ? low : high));
            const unsigned k = tile * kMmaTile + source % 4 * 2 + lane / 4 % 2;
            const unsigned fragment = (low != 0 ? 0 : 2) + lane / 2 % 2;
            MmaPoint& point = points[16 * fragment + lane % 2 * 8 + source / 4];
            float c[kD], bias;
            group[k].get<kD>(c, bias);
            const float score = exact_score<kD>(point.a, c, bias);
            const unsigned long long candidate = ranked(score, first + k);
            if (score < kMmaNeverWins && candidate < atomicMin(&point.best, candidate))
                better = true;
        }
        const bool taken = mine && __popc(found & ((1u << lane) - 1)) < 4;
        if (taken && near[0] == 0) near[1] &= near[1] - 1;
        if (taken) near[0] &= near[0] - 1;
    }
    return __any_sync(kFullWarp, better) != 0;
}

//   kD            d, kMmaMinD to kMmaMaxD
//   entries       K
//   slab_entries  entries in shared memory at a time, a multiple of kMmaGroup
//   scale         of the sums' integers
//   warm          the codes hold the last assignment
//   changed       in and out: raised by how many codes differ from it (of all points if not warm)
// Block (x, y): position x of kMmaRows rows; a warp: kMmaWarpPoints of them; a lane: two points as
// their owner, and its part of all fragments. Shared memory: the slab, kMmaPointsShared bytes.
template <int kD>
__global__ void __launch_bounds__(kMmaThreads, 1)
    kmeans_mma(KmeansProblem problem, int entries, int slab_entries, double scale, bool warm,
               unsigned long long* changed) {
    MmaEntry* slab = reinterpret_cast<MmaEntry*>(shared_memory());
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    MmaPoint* points = reinterpret_cast<MmaPoint*>(slab + slab_entries) + warp * kMmaWarpPoints;
    const int position = blockIdx.x;
    const int place = lane % 4 * 16 + lane / 4;  // of the first of the lane's points in the warp
    const int warp_row = static_cast<int>(blockIdx.y) * kMmaRows + warp * kMmaWarpPoints;
    float energy[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        energy[i] = mma_start_point<kD>(problem, warp_row + place + 8 * i, position, warm,
                                        points[place + 8 * i]);
    }
    __syncwarp();
    MmaOperands operands;
    operands.load(points);

    for (int first = 0; first < entries; first += slab_entries) {
        const int left = (entries - first + kMmaGroup - 1) / kMmaGroup * kMmaGroup;
        const int count = left < slab_entries ? left : slab_entries;
        __syncthreads();
        mma_load_slab<kD>(problem, position, first, count, entries, slab);
        __syncthreads();
        if (first == 0 && !warm) {
#pragma unroll
            for (int i = 0; i < 2; ++i) mma_try_first<kD>(slab, points[place + 8 * i]);
        }
        bool better = first == 0;
        for (int begin = 0; begin < count; begin += kMmaGroup) {
            if (better) {
                __syncwarp();
                float to_beat[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float score = score_of(points[place + 8 * i].best);
                    to_beat[i] =
                        energy[i] < 0.0f ? -kMmaNeverWins : score_to_beat(score, energy[i]);
                }
                operands.set_scores(to_beat);
            }
            unsigned near[2];
            operands.search(slab + begin, near);
            better =
                mma_settle<kD>(slab + begin, static_cast<unsigned>(first + begin), points, near);
        }
    }

    __syncwarp();
#pragma unroll
    for (int i = 0; i < kMmaWarpPoints; i += kWarpSize) {
        const unsigned best = static_cast<unsigned>(points[i + lane].best);
        const int row = warp_row + i + lane;
        count_changed(settle_point<kD>(problem, row, position, best, scale, warm), changed);
    }
}

}  // namespace nowag::cuda
