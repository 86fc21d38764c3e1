// Assignment with tensor cores, exactly: d from 4 to 6 and large codebooks.
//
// The scores of 64 points against 8 entries are one step of tf32 matrix products: the inner
// dimension of 8 holds the point's -2 h x (6), and two ones against the entry's bias in two parts.
// tf32 scores are off by at most E (below), so they only say which chunks of 64 entries can hold
// the nearest: those are scored again in the pinned float32 arithmetic of kmeans.h. With the last
// assignment as the first candidate that is 1.1 chunks a point at d = 6, K = 4096 (simulated).
//
//   block: 16 warps, 1024 rows of one position; a slab of up to 4096 entries in shared memory
//   warp:  64 points = 4 fragments of 16 rows; lane 4 g + t owns rows g and g + 8 of fragment t
//
// Measured on an H100 at n = 2.8 M, K = 4096, d = 6: 2.26 ms an iteration. The minima, 4 FMNMX at
// half rate beside each mma, take 0.73 ms of it; half of all instructions score chunks again, one
// point after another, in chains of latencies that one block of 16 warps a multiprocessor does not
// hide.
#pragma once

#include "cuda/kmeans/kmeans_points.cuh"

namespace nowag::cuda {

constexpr int kMmaThreads = 512;
constexpr int kMmaWarps = kMmaThreads / kWarpSize;
constexpr int kMmaFragments = 4;
constexpr int kMmaWarpPoints = 16 * kMmaFragments;
constexpr int kMmaRows = kMmaWarps * kMmaWarpPoints;
// Shorter sub-vectors are scanned: the minimum costs as much as they do.
constexpr int kMmaMinD = 4;
constexpr int kMmaMaxD = 6;
constexpr int kMmaChunk = 64;             // entries that are scored again together
constexpr int kMmaSlab = 64 * kMmaChunk;  // entries in shared memory: a 64-bit mask of chunks
constexpr int kMmaEntry = 8;              // floats of an entry in shared memory
constexpr size_t kMmaPointsShared = sizeof(float) * kMmaRows * kMmaEntry;
// Bias of an entry past the codebook's end: only lower scores count.
constexpr float kMmaNeverWins = 0x1p126f;

// An entry in shared memory, in the order of mma's second operand, row 0, 4, 1, 5, 2, 6, 3, 7: rows
// 0 to 5 are its coordinates, 6 and 7 its bias: the part that tf32 holds exactly, and the rest.
struct MmaEntry {
    float4 low;   // c0 c4 c1 c5
    float4 high;  // c2 bias c3 rest

    template <int kD>
    __device__ __forceinline__ void get(float (&c)[kD], float& bias) const {
        const float all[kMmaMaxD] = {low.x, low.z, high.x, high.z, low.y, low.w};
#pragma unroll
        for (int j = 0; j < kD; ++j) c[j] = all[j];
        bias = high.y + high.w;  // exact: the rest is what the other part lacks
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

template <int kD>
__device__ __forceinline__ float exact_score(const float (&a)[kD], const float (&c)[kD],
                                             float bias) {
    float score = bias;
#pragma unroll
    for (int j = 0; j < kD; ++j) score = fused(a[j], c[j], score);
    return score;
}

// A point as its owner sees it.
struct MmaPoint {
    float energy;  // X = sum h x^2
    float score;   // of the best entry so far, exact
    unsigned best;
    float lowest;     // tf32 score so far
    uint64_t chunks;  // of the slab that may hold a better entry
    bool real;

    // E: how far the tf32 score of any entry at least as good as `best` can be from its exact one.
    // With D = score + X, the weighted squared distance, sum |a_j c_j| is at most
    // 2 X + 2 sqrt(X D). a is rounded to tf32 and c truncated, with a scaled by 1 + 2^-11 to centre
    // that: 2^-10 of the sum, taken 1/8 larger. All sums are float32, in 8 steps: 2^-18 is more
    // than enough.
    __device__ __forceinline__ float error() const {
        const float distance = fmaxf(score + energy, 0.0f) * (1.0f + 0x1p-14f) + 0x1p-14f * energy;
        const float products = 2.0f * energy + 2.0f * sqrtf(energy * distance);
        return 0x1.2p-10f * products + 0x1p-16f * (energy + distance) + 0x1p-100f;
    }
};

// Floats as integers of the same order; equal floats give equal integers (-0 as 0).
__device__ __forceinline__ unsigned ordered_bits(float value) {
    const unsigned bits = __float_as_uint(value + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float from_ordered_bits(unsigned bits) {
    return __uint_as_float(bits >> 31 ? bits & 0x7fffffffu : ~bits);
}

// Scores the entries of the marked chunks for one point, the whole warp together, two entries a
// lane and chunk. Returns the best, lowest k first, as (ordered score, k).
template <int kD>
__device__ __forceinline__ uint2 rescan(const MmaEntry* slab, uint64_t chunks,
                                        const float (&a)[kD]) {
    const int lane = threadIdx.x % kWarpSize;
    float lowest = kMmaNeverWins;
    unsigned best = 0xffffffffu;
    for (; chunks != 0; chunks &= chunks - 1) {
        const int first = lowest_bit(chunks) * kMmaChunk + lane;
#pragma unroll
        for (int k = first; k < first + kMmaChunk; k += kWarpSize) {
            float c[kD], bias;
            slab[k].get<kD>(c, bias);
            const float score = exact_score<kD>(a, c, bias);
            if (score < lowest) {
                lowest = score;
                best = static_cast<unsigned>(k);
            }
        }
    }
    const unsigned mine = ordered_bits(lowest);
    const unsigned least = __reduce_min_sync(kFullWarp, mine);
    return make_uint2(least, __reduce_min_sync(kFullWarp, mine == least ? best : 0xffffffffu));
}

// The minimum over the 4 lanes of a group, of 4 fragments' values: lane t gets that of fragment t.
__device__ __forceinline__ float transpose_min(const float (&values)[kMmaFragments]) {
    const int t = threadIdx.x % 4;
    float half[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float keep = t & 2 ? values[2 + i] : values[i];
        const float give = t & 2 ? values[i] : values[2 + i];
        half[i] = fminf(keep, __shfl_xor_sync(kFullWarp, give, 2));
    }
    const float keep = t & 1 ? half[1] : half[0];
    const float give = t & 1 ? half[0] : half[1];
    return fminf(keep, __shfl_xor_sync(kFullWarp, give, 1));
}

// The lowest tf32 score of one chunk for each of the lane's two points.
__device__ __forceinline__ float2 chunk_minimum(const MmaEntry* slab, int chunk,
                                                const MmaA (&a)[kMmaFragments]) {
    const float2* operand = reinterpret_cast<const float2*>(slab + chunk * kMmaChunk);
    float low[kMmaFragments], high[kMmaFragments];
#pragma unroll
    for (int m = 0; m < kMmaFragments; ++m) low[m] = high[m] = INFINITY;
#pragma unroll
    for (int tile = 0; tile < kMmaChunk / 8; ++tile) {
        const float2 b = operand[tile * kWarpSize + threadIdx.x % kWarpSize];
#pragma unroll
        for (int m = 0; m < kMmaFragments; ++m) {
            const MmaC scores = mma_tf32(a[m], b.x, b.y);
            low[m] = fminf(low[m], fminf(scores.x[0], scores.x[1]));
            high[m] = fminf(high[m], fminf(scores.x[2], scores.x[3]));
        }
    }
    const float first = transpose_min(low);
    return make_float2(first, transpose_min(high));
}

// Marks the chunks of the slab that may hold an entry at least as good as the best so far.
__device__ __forceinline__ void mark_chunks(const MmaEntry* slab, int chunks,
                                            const MmaA (&a)[kMmaFragments], MmaPoint (&points)[2]) {
    float error[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        error[i] = points[i].error();
        points[i].chunks = 0;
    }
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const float2 least = chunk_minimum(slab, chunk, a);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            MmaPoint& point = points[i];
            const float minimum = i == 0 ? least.x : least.y;
            point.lowest = fminf(point.lowest, minimum);
            const float limit = fminf(point.score + error[i], point.lowest + 2.0f * error[i]);
            // Not "<=": whatever is not finite is scored again.
            if (point.real && !(minimum > limit)) point.chunks |= uint64_t{1} << chunk;
        }
    }
}

template <int kD>
__device__ __forceinline__ void mma_load_slab(const KmeansProblem& problem, const float (&h)[kD],
                                              int64_t first, int count, int64_t entries,
                                              MmaEntry* slab) {
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

// The point of `row` with its previous entry, if warm; writes -2 h x to `staged`.
template <int kD>
__device__ __forceinline__ MmaPoint start_point(const KmeansProblem& problem, const float (&h)[kD],
                                                int64_t row, int64_t position, bool warm,
                                                float* staged) {
    MmaPoint point{0.0f, INFINITY, 0u, INFINITY, 0u, row < problem.rows};
    float x[kD] = {}, a[kD];
    if (point.real) read_point<kD>(problem, row, position, x);
#pragma unroll
    for (int j = 0; j < kMmaEntry; ++j) staged[j] = 0.0f;
#pragma unroll
    for (int j = 0; j < kD; ++j) {
        a[j] = -2.0f * h[j] * x[j];
        staged[j] = a[j];
        point.energy = fused(h[j] * x[j], x[j], point.energy);
    }
    if (warm && point.real) {
        point.best = problem.codes[row * positions_of(problem, kD) + position];
        float c[kD];
#pragma unroll
        for (int j = 0; j < kD; ++j) c[j] = problem.codebook[point.best * kD + j];
        point.score = exact_score<kD>(a, c, bias_of<kD>(h, c));
    }
    return point;
}

__device__ __forceinline__ void load_fragments(const float* staged, MmaA (&a)[kMmaFragments]) {
    const int g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;
    const auto centred = [](float value) { return to_tf32(value * (1.0f + 0x1p-11f)); };
#pragma unroll
    for (int m = 0; m < kMmaFragments; ++m) {
        const float* low = staged + (16 * m + g) * kMmaEntry;
        const float* high = low + 8 * kMmaEntry;
        a[m].x[0] = centred(low[t]);
        a[m].x[1] = centred(high[t]);
        // Columns 6 and 7 meet the two parts of the bias.
        a[m].x[2] = t < 2 ? centred(low[t + 4]) : __float_as_uint(1.0f);
        a[m].x[3] = t < 2 ? centred(high[t + 4]) : __float_as_uint(1.0f);
    }
}

// Scores the marked chunks of all 64 points of the warp again, one point after another.
template <int kD>
__device__ __forceinline__ void settle_chunks(const MmaEntry* slab, unsigned first,
                                              const float* staged, MmaPoint (&points)[2]) {
    const int lane = threadIdx.x % kWarpSize;
    for (int i = 0; i < kMmaWarpPoints; ++i) {
        const int owner = i % 8 * 4 + i / 16, which = i / 8 % 2;
        const uint64_t chunks =
            __shfl_sync(kFullWarp, which ? points[1].chunks : points[0].chunks, owner);
        if (chunks == 0) continue;
        float a[kD];
#pragma unroll
        for (int j = 0; j < kD; ++j) a[j] = staged[i * kMmaEntry + j];
        const uint2 found = rescan<kD>(slab, chunks, a);
        if (lane != owner) continue;
        MmaPoint& point = points[0];
        MmaPoint& other = points[1];
        const float score = from_ordered_bits(found.x);
        const unsigned best = first + found.y;
        const float current = which ? other.score : point.score;
        const unsigned current_best = which ? other.best : point.best;
        if (found.y != 0xffffffffu &&
            (score < current || (score == current && best < current_best))) {
            (which ? other.score : point.score) = score;
            (which ? other.best : point.best) = best;
        }
    }
}

//   kD            d, kMmaMinD to kMmaMaxD
//   entries       K
//   slab_entries  entries in shared memory at a time, a multiple of kMmaChunk
//   scale         of the sums' integers
//   warm          the codes hold the last assignment
//   changed       in and out: raised by how many codes differ from it (of all points if not warm)
// Block (x, y): position x of kMmaRows rows; a warp: kMmaWarpPoints of them; a lane: two points as
// their owner, and its part of all fragments.
template <int kD>
__global__ void __launch_bounds__(kMmaThreads, 1)
    kmeans_mma(KmeansProblem problem, int64_t entries, int slab_entries, double scale, bool warm,
               unsigned long long* changed) {
    MmaEntry* slab = reinterpret_cast<MmaEntry*>(shared_memory());
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    float* staged =
        reinterpret_cast<float*>(slab + slab_entries) + warp * kMmaWarpPoints * kMmaEntry;
    const int64_t position = blockIdx.x;
    float h[kD];
#pragma unroll
    for (int j = 0; j < kD; ++j) h[j] = problem.h[position * kD + j];

    MmaPoint points[2];
    const int place = lane % 4 * 16 + lane / 4;  // of the first of the lane's points in the warp
    const int64_t first_row =
        static_cast<int64_t>(blockIdx.y) * kMmaRows + warp * kMmaWarpPoints + place;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        points[i] = start_point<kD>(problem, h, first_row + 8 * i, position, warm,
                                    staged + (place + 8 * i) * kMmaEntry);
    }
    __syncwarp();
    MmaA a[kMmaFragments];
    load_fragments(staged, a);

    bool started = warm;
    for (int64_t first = 0; first < entries;) {
        const int64_t left = (entries - first + kMmaChunk - 1) / kMmaChunk * kMmaChunk;
        const int count = static_cast<int>(left < slab_entries ? left : slab_entries);
        __syncthreads();
        mma_load_slab<kD>(problem, h, first, count, entries, slab);
        __syncthreads();
        if (started) {
            mark_chunks(slab, count / kMmaChunk, a, points);
        } else {
            // Without a last assignment the best of the first chunk is the first candidate.
            points[0].chunks = points[0].real, points[1].chunks = points[1].real;
        }
        settle_chunks<kD>(slab, static_cast<unsigned>(first), staged, points);
        if (started) first += slab_entries;
        started = true;
    }

#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const bool moved = points[i].real && settle_point<kD>(problem, first_row + 8 * i, position,
                                                              h, points[i].best, scale, warm);
        count_changed(moved, changed);
    }
}

}  // namespace nowag::cuda
