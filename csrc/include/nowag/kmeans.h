// Weighted k-means over the sub-vectors of normalised weight matrices (NoWag-VQ).
//
// A problem is one matrix w, float32 [rows, cols] contiguous, cut along its rows into
// P = ceil(cols / d) sub-vectors of d (the last one padded with zeros), with importances h, float32
// [P * d] (0 in the padding; h = act_norms^2 / mean(act_norms^2)) and a codebook, float32 [K, d].
// The point of row i at position p is x_j = w[i, p*d + j]; its metric is h_pj = h[p*d + j].
//
// Assignment returns, for every point, the k of the smallest score, the lowest k among equals:
//   bias_pk     = fma over j ascending from 0 of  (h_pj * c_kj) * c_kj
//   score(x, k) = fma over j ascending from bias_pk of  (-2 h_pj * x_j) * c_kj
// that is acc = bias_pk; acc = fma((-2 * h_pj) * x_j, c_kj, acc). All in float32, no other
// contraction or reassociation: every instruction set and device gives the same codes, bit for bit.
// Scores are never NaN or infinite for finite inputs of sane size; a NaN score never wins.
//
// Sums. For each codebook, int64 [K, 2 * d + 1]: for entry k and coordinate j
//   sums[k][j]         = sum of round(h_pj * x_j * scale)      over the points assigned to k
//   sums[k][d + j]     = sum of round(h_pj * scale)
//   sums[k][2 * d]     = number of points
// h * x is exact in float64, scale is a power of two, round is to nearest even: integer sums do not
// depend on the order of the points, so any thread count, device or incremental update gives the
// same bits. The caller picks scale so that rows * sum(h) * max(1, max|x|) * scale < 2^62
// (ops.kmeans_scale): with normalised weights |x| <= 1.
//
// Update: c_kj = float(sums[k][j] / sums[k][d + j]) (float64 division of the two converted
// integers), the old value where sums[k][d + j] <= 0.
//
// codes are uint16 [rows, P], row-major: the working form; vq_pack.h makes the packed one.
#pragma once

#include <cstdint>
#include <tuple>

#include "nowag/operation.h"

namespace nowag {

struct KmeansProblem {
    const float* w;         // [rows, cols]
    const float* h;         // [P * d]
    const float* codebook;  // [K, d]
    uint16_t* codes;        // [rows, P]
    int64_t* sums;          // [K, 2 * d + 1], or null; problems that share a codebook share sums
    int64_t rows;
    int64_t cols;
    // Optional working memory that spares later iterations most of their work, never changing a
    // result: gaps [rows, P] is written by every assignment, for the next (not among 1024 entries
    // or more, where gaps hardly ever hold). In a warm call `previous` [K, d] is the codebook of
    // the call that wrote codes and gaps, or null. On a GPU both are left alone.
    const float* previous = nullptr;
    float* gaps = nullptr;
};

// All fields, in the order in which callers from other languages pass them.
static inline auto fields(KmeansProblem& problem) {
    return std::tie(problem.w, problem.h, problem.codebook, problem.codes, problem.sums,
                    problem.rows, problem.cols, problem.previous, problem.gaps);
}

// Assigns every point of every problem. `codes` holds the previous assignment (any values < K) if
// `warm`, and is overwritten. Where a problem has sums: if `warm`, points that changed are taken
// out of their old entry and added to the new one (sums must be those of the previous assignment);
// otherwise every point is added (zero the sums before). changed[b] = number of points of problem b
// whose code differs from the previous one (all of them if not warm).
// If it is interrupted some points have been assigned: where `warm`, sums are again those of codes.
NOWAG_DECLARE(kmeans_assign, const KmeansProblem* problems, int64_t count, int64_t entries, int d,
              double scale, bool warm, int64_t* changed);

// The same by looking at every entry for every point: a yardstick.
NOWAG_DECLARE_CPU(kmeans_assign_exhaustive, const KmeansProblem* problems, int64_t count,
                  int64_t entries, int d, double scale, bool warm, int64_t* changed);

// Sums in float64 of many terms (objective_drop, kmeans_energy) are taken in runs of so many, the
// last shorter: the terms of a run in order, then the runs.
constexpr int kKmeansTermRun = 64;

// Moves each entry to the weighted mean of its points. objective_drop = sum over k and j of
// (2 c num - c^2 den) / scale in float64, with the new, float32-rounded c, k ascending then j: the
// weighted squared error of the assignment is sum(h x^2) - objective_drop. empty[k] = 1 where entry
// k has no point. codebook is float32 [K, d], updated in place.
NOWAG_DECLARE(kmeans_update, const int64_t* sums, int64_t entries, int d, double scale,
              float* codebook, double* objective_drop, uint8_t* empty);

// errors[i, p] = sum_j h_pj (x_j - c_j)^2 of the assigned entry, j ascending, in float64, rounded
// to float32. [rows, P]. Reads codes, which must be < K. Here and in kmeans_spread and
// kmeans_energy count must be 1.
NOWAG_DECLARE(kmeans_errors, const KmeansProblem* problems, int64_t count, int64_t entries, int d,
              float* errors);

// spread[k][j] = sum of round(h_pj (x_j - c_kj)^2 * scale) over the points assigned to k, int64
// [K, d]: float64 up to the rounding (to nearest even), then integers, as for sums. Reads codes,
// which must be < K.
NOWAG_DECLARE(kmeans_spread, const KmeansProblem* problems, int64_t count, int64_t entries, int d,
              double scale, int64_t* spread);

// costs[i] = what moving all points of entry k = chosen[i] to the entry that suits them best adds
// to the objective, since c_k is their mean: the smallest over m != k of
//   fma over j ascending from 0 of  (weight_kj * t) * t,  t = c_kj - c_mj,
//   weight_kj = float(sums[k][d + j] / scale)
// in float32, so that every instruction set and device gives the same bits; infinity if K is 1.
// sums as above, codebook float32 [K, d], chosen in [0, K).
NOWAG_DECLARE(kmeans_merge_costs, const int64_t* sums, const float* codebook, int64_t entries,
              int d, double scale, const int64_t* chosen, int64_t count, float* costs);

// sum of h x^2 over all points in float64: the denominator of the relative objective. Fixed order:
// one sum a row (j ascending), rows ascending, in runs.
NOWAG_DECLARE(kmeans_energy, const KmeansProblem* problems, int64_t count, int d, double* energy);

// Writes a starting codebook [K, d] for the points of all problems together (the codebook, codes
// and sums fields are ignored), which must be at least K. Points are numbered problem by problem,
// row by row, position by position. Random numbers are those of splitmix64 started in the state
// mix(seed), mix its output function; below(n) is the high word of the next one's product with n.
//   random:    K distinct points: entry k is point lo + below(hi - lo) of the k-th of K equal
//              strata, lo = k * n / K, hi = (k + 1) * n / K.
//   plus_plus: greedy weighted k-means++ on a sample: all points, with weight 1, if there are at
//              most kmeans_sample_size(K), else that many (below), the metric of each multiplied by
//              its weight. The first entry is uniform among the sample. Each next one is the best
//              of kKmeansCandidates, drawn with probability proportional to q = round(dist * 2^e),
//              dist being the squared distance to the nearest chosen entry, the fp32 fma chain of
//              (h_j * t_j) * t_j with t_j = x_j - c_j, and e such that the largest q after the
//              first entry is at most 2^40: integer sums, so that the choice is the same at any
//              thread count, instruction set and device. The best candidate leaves the smallest sum
//              of q, the first among equals. Once every q is 0 the remaining entries are drawn
//              uniformly, with one random number each.
// The sample is drawn half uniformly and half in proportion to energy (a lightweight coreset:
// Bachem, Lucic, Krause, 2018; without it the few points that carry most of the energy are missed).
// The energy of a point is the fp32 sum of (h_j * x_j) * x_j, j ascending, without fma, and
//   e_i    = round(energy_i * 2^(60 - exponent - bits)), exponent that of the largest energy
//            (frexp) and bits the bit length of the number n of points: sum e_i < 2^60
//   mass_i = e_i + max(1, floor(sum e_i / n))
// Running sums of masses, in the points' order, are cut into S = kmeans_sample_size(K) strata: the
// border of stratum s is s * floor(total / S) + min(s, total mod S). Number s of the sample is the
// point whose share of the running sum holds border(s) + below(border(s + 1) - border(s)); its
// weight, how many points it stands for, is float(total / (mass * S)), in float64.
enum class KmeansInit : int { random = 0, plus_plus = 1 };

// Few enough points that seeding costs no more than a few assignments of a large layer. What it
// costs grows with sample and entries: 2^18 points, 4 for each of 65536 entries, must do.
constexpr int64_t kmeans_sample_size(int64_t entries) {
    constexpr int64_t kMost = int64_t{1} << 18;
    return 4096 + 16 * entries < kMost ? 4096 + 16 * entries : kMost;
}

// On layers of SmolLM2 four candidates end 0.3 to 1 % lower than one, eight no lower than four.
constexpr int kKmeansCandidates = 4;

NOWAG_DECLARE(kmeans_seed, const KmeansProblem* problems, int64_t count, int64_t entries, int d,
              KmeansInit init, int64_t seed, float* codebook);

}  // namespace nowag
