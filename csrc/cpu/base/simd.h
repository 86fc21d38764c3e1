// Which instruction set the kernels use: found once, at first use, or forced by NOWAG_SIMD.
#pragma once

namespace nowag::cpu {

enum class Simd : int { scalar = 0, avx2 = 1, avx512 = 2, avx512vbmi = 3 };

// The best level that this build and this machine have.
Simd simd_best();

// The level in use: NOWAG_SIMD (scalar, avx2, avx512 or avx512vbmi) if set, else simd_best(). A
// level that is unknown or that the machine lacks leaves simd_best() in use, and simd_refused()
// set.
Simd simd_level();

// The value of NOWAG_SIMD that could not be honoured, or null. Importing the module raises on it.
const char* simd_refused();

const char* simd_name(Simd level);

// Picks the implementation for the level in use: the best one at or below it.
template <typename Function>
Function simd_pick(Function scalar, Function avx2, Function avx512, Function avx512vbmi) {
    const Function by_level[] = {scalar, avx2, avx512, avx512vbmi};
    int level = static_cast<int>(simd_level());
    while (level > 0 && by_level[level] == nullptr) --level;
    return by_level[level];
}

}  // namespace nowag::cpu
