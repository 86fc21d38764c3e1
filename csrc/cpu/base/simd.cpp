#include "cpu/base/simd.h"

#include <cstdlib>
#include <cstring>

namespace nowag::cpu {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512vbmi"};

struct Choice {
    Simd level;
    const char* refused;
};

Choice choose() {
    const Simd best = simd_best();
    const char* wanted = std::getenv("NOWAG_SIMD");
    if (wanted == nullptr || *wanted == '\0') return {best, nullptr};
    for (int level = 0; level <= static_cast<int>(best); ++level) {
        if (std::strcmp(wanted, kNames[level]) == 0) return {static_cast<Simd>(level), nullptr};
    }
    return {best, wanted};
}

const Choice& choice() {
    static const Choice chosen = choose();
    return chosen;
}

}  // namespace

Simd simd_best() {
#ifdef NOWAG_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    const bool vbmi =
        avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
    return vbmi ? Simd::avx512vbmi : avx512 ? Simd::avx512 : avx2 ? Simd::avx2 : Simd::scalar;
#else
    return Simd::scalar;
#endif
}

Simd simd_level() { return choice().level; }
const char* simd_refused() { return choice().refused; }
const char* simd_name(Simd level) { return kNames[static_cast<int>(level)]; }

}  // namespace nowag::cpu
