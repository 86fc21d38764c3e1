// One float at a time, for kmeans_kernel.h: any machine.
#pragma once

#include <cmath>
#include <cstdint>

namespace nowag::cpu {
namespace {

struct Lanes {
    static constexpr int kWidth = 1;
    using Float = float;
    using Int = int32_t;
    using Mask = bool;

    static Float load(const float* from) { return *from; }
    static void store(float* to, Float a) { *to = a; }
    static Float all(float a) { return a; }
    static Float add(Float a, Float b) { return a + b; }
    static Float sub(Float a, Float b) { return a - b; }
    static Float mul(Float a, Float b) { return a * b; }
    static Float div(Float a, Float b) { return a / b; }
    static Float fma(Float a, Float b, Float c) { return std::fma(a, b, c); }
    static Float min(Float a, Float b) { return a < b ? a : b; }
    static Float max(Float a, Float b) { return a > b ? a : b; }
    static Float sqrt(Float a) { return std::sqrt(a); }
    static float lowest(Float a) { return a; }
    static float highest(Float a) { return a; }

    static Mask less(Float a, Float b) { return a < b; }
    static Mask equal(Float a, Float b) { return a == b; }
    static Mask not_greater(Float a, Float b) { return a <= b; }
    static uint32_t bits(Mask a) { return a; }
    static Float select(Mask a, Float yes, Float no) { return a ? yes : no; }
    static Int select(Mask a, Int yes, Int no) { return a ? yes : no; }

    static Int all_int(int32_t a) { return a; }
    static Int load_int(const int32_t* from) { return *from; }
    static Int load_codes(const uint16_t* from) { return *from; }
    static void store_codes(uint16_t* to, Int a) { *to = static_cast<uint16_t>(a); }
    static Int add(Int a, Int b) { return a + b; }
    static Int multiply(Int a, Int b) { return a * b; }
    static Float gather(const float* from, Int index) { return from[index]; }

    // Appends `first` to a list if `chosen`.
    static int64_t append(int32_t* list, int64_t count, Mask chosen, int32_t first) {
        list[count] = first;
        return count + chosen;
    }
};

}  // namespace
}  // namespace nowag::cpu
