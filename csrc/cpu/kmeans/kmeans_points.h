// What the k-means drivers share: checks, and the padded sub-vectors of a problem.
#pragma once

#ifdef NOWAG_X86
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "nowag/format.h"
#include "nowag/kmeans.h"

namespace nowag::cpu {

// To nearest, ties to even, of a value within int64.
inline int64_t fixed_point(double value) {
#ifdef NOWAG_X86
    return _mm_cvtsd_si64(_mm_set_sd(value));
#else
    return static_cast<int64_t>(std::nearbyint(value));
#endif
}

// Adds to a sum of fixed points. Where values are not of the sane size that kmeans.h asks for it
// wraps around.
inline void add_to(int64_t& sum, int64_t value) {
    sum = static_cast<int64_t>(static_cast<uint64_t>(sum) + static_cast<uint64_t>(value));
}

inline int64_t positions_of(const KmeansProblem& problem, int d) {
    return code_positions(problem.cols, d);
}

inline int64_t points_of(const KmeansProblem& problem, int d) {
    return problem.rows * positions_of(problem, d);
}

inline bool valid_points(const KmeansProblem& problem, int d) {
    return d >= 1 && d <= kMaxSubvector && problem.rows >= 1 && problem.cols >= 1 &&
           problem.w != nullptr && problem.h != nullptr;
}

inline bool valid_entries(int64_t entries) {
    return entries >= 1 && entries <= (int64_t{1} << kMaxCodeBits);
}

// The point of `row` at `position`, its padding 0.
inline void read_point(const KmeansProblem& problem, int64_t row, int64_t position, int d,
                       float* point) {
    const int64_t first = position * d;
    const float* source = problem.w + row * problem.cols + first;
    const int64_t present = std::min<int64_t>(d, problem.cols - first);
    for (int64_t j = 0; j < present; ++j) point[j] = source[j];
    for (int64_t j = present; j < d; ++j) point[j] = 0.0f;
}

}  // namespace nowag::cpu
