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
    static void store_int(int32_t* to, Int a) { *to = a; }
    static Int nearest_int(Float a) { return static_cast<Int>(std::lrint(a)); }
    static Int add(Int a, Int b) { return a + b; }
    static Float gather(const float* from, Int index) { return from[index]; }

    static Mask at_most(Int a, Int b) { return a <= b; }

    // Pairs of 16-bit numbers in an Int.
    static int32_t low(Int a) { return static_cast<int16_t>(a); }
    static int32_t high(Int a) { return a >> 16; }
    static Int pair(Int low, Int high) {
        return static_cast<Int>((static_cast<uint32_t>(low) & 0xffffu) | static_cast<uint32_t>(high)
                                                                             << 16);
    }
    static Int pair_sub(Int a, Int b) { return pair(low(a) - low(b), high(a) - high(b)); }
    // How far x is outside [below, above], none of them negative.
    static Int pair_outside(Int x, Int below, Int above) {
        const auto outside = [](int32_t at, int32_t from, int32_t to) {
            return at < from ? from - at : at > to ? at - to : 0;
        };
        return pair(outside(low(x), low(below), low(above)),
                    outside(high(x), high(below), high(above)));
    }
    static Int pair_squares(Int a) { return low(a) * low(a) + high(a) * high(a); }

    // out[j] = from[rows[0] * stride + j] for four j.
    static void columns(const float* from, int64_t stride, const int32_t* rows, Float (&out)[4]) {
        for (int j = 0; j < 4; ++j) out[j] = from[rows[0] * stride + j];
    }

    // Appends `first` to a list if `chosen`.
    static int64_t append(int32_t* list, int64_t count, Mask chosen, int32_t first) {
        list[count] = first;
        return count + chosen;
    }
};

}  // namespace
}  // namespace nowag::cpu
