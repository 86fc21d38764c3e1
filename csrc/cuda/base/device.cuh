// The one door between the kernels and what runs them: CUDA, or the host SIMT executor of
// tests/simt, which compiles the same files with NOWAG_SIMT. Inline PTX and everything else that
// differs between the two stands here, each with its host meaning beside it.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef NOWAG_SIMT
#include "simt.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include "nowag/dtype.h"
#include "nowag/format.h"

namespace nowag::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// Columns of a bitmap row with its padding (format.h).
__device__ __forceinline__ int64_t padded_columns(int64_t cols) {
    return (cols + kBitmapAlign - 1) / kBitmapAlign * kBitmapAlign;
}

// The block's dynamic shared memory; kernels lay it out themselves.
__device__ __forceinline__ unsigned char* shared_memory() {
#ifdef NOWAG_SIMT
    return simt::dynamic_shared();
#else
    extern __shared__ __align__(16) unsigned char nowag_shared[];
    return nowag_shared;
#endif
}

// One fused multiply-add, rounded once. The compiler fuses nothing on its own (--fmad=false).
__device__ __forceinline__ float fused(float a, float b, float c) {
#ifdef NOWAG_SIMT
    return __builtin_fmaf(a, b, c);
#else
    return __fmaf_rn(a, b, c);
#endif
}

__device__ __forceinline__ float half_to_float(uint16_t bits) {
#ifdef NOWAG_SIMT
    return float16_to_float(bits);
#else
    return __half2float(__ushort_as_half(bits));
#endif
}

__device__ __forceinline__ uint16_t float_to_half(float value) {
#ifdef NOWAG_SIMT
    return float_to_float16(value);
#else
    return __half_as_ushort(__float2half_rn(value));
#endif
}

__device__ __forceinline__ float brain_to_float(uint16_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

__device__ __forceinline__ uint16_t float_to_brain(float value) {
#ifdef NOWAG_SIMT
    return float_to_bfloat16(value);
#else
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#endif
}

// round(value) to nearest even.
__device__ __forceinline__ long long round_to_integer(double value) {
#ifdef NOWAG_SIMT
    return static_cast<long long>(__builtin_nearbyint(value));
#else
    return __double2ll_rn(value);
#endif
}

// The number of the lowest set bit of a mask that is not 0.
__device__ __forceinline__ int lowest_bit(uint64_t mask) {
#ifdef NOWAG_SIMT
    return __builtin_ctzll(mask);
#else
    return __ffsll(static_cast<long long>(mask)) - 1;
#endif
}

// Between two looks at memory that another block is to change.
__device__ __forceinline__ void spin_pause() {
#ifdef NOWAG_SIMT
    simt::yield();
#else
    __nanosleep(20);
#endif
}

// A word that blocks tell each other, written and read whole where all blocks see it. The order of
// no other access follows from it (relaxed): all that is told must be in the word.
__device__ __forceinline__ void tell(unsigned long long* word, unsigned long long value) {
#ifdef NOWAG_SIMT
    *word = value;
#else
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
#endif
}

__device__ __forceinline__ unsigned long long hear(const unsigned long long* word) {
#ifdef NOWAG_SIMT
    return *word;
#else
    unsigned long long value;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
    return value;
#endif
}

// A barrier of all threads of a cluster's blocks (launch_in_clusters in launch.h): what they wrote
// before it, to shared memory too, all of them see behind it. A block must not end while others
// read its shared memory.
#ifdef NOWAG_SIMT
inline void cluster_barrier(SIMT_SITE) { simt::cluster_barrier(SIMT_HERE); }
#else
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
#endif

// What lies at the same place in the shared memory of another block of the cluster.
__device__ __forceinline__ float load_from_block(const float* shared, int rank) {
#ifdef NOWAG_SIMT
    return *static_cast<const float*>(simt::in_block(shared, rank));
#else
    float value = 0.0f;
#if __CUDA_ARCH__ >= 900
    const auto here = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(there) : "memory");
#endif
    return value;
#endif
}

// Waits until every block of the grid has come here `generation` times. Blocks must all be
// resident.
__device__ __forceinline__ void grid_barrier(unsigned* arrived, unsigned generation) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(arrived, 1u);
        const volatile unsigned* count = arrived;
        while (*count < generation * gridDim.x) spin_pause();
        __threadfence();
    }
    __syncthreads();
}

// The high word of a 64-bit product.
__device__ __forceinline__ uint64_t product_high(uint64_t a, uint64_t b) {
#ifdef NOWAG_SIMT
    return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
#else
    return __umul64hi(a, b);
#endif
}

// Rounds to tf32: 10 bits of mantissa, to nearest, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float value) {
#ifdef NOWAG_SIMT
    return (__float_as_uint(value) + 0x1000u) & 0xffffe000u;
#else
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return bits;
#endif
}

struct MmaA {
    uint32_t x[4];
};
struct MmaC {
    float x[4];
};

// d = a b + c by one warp, a [16, 8] and b [8, 8] in tf32 (the low 13 bits of their floats are not
// read), c and d [16, 8] in float32. With g = lane / 4 and t = lane % 4 a lane holds
//   a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)     b: (t, g), (t + 4, g)
//   c, d: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
// How the sum of the eight products and c is rounded is not specified.
__device__ __forceinline__ MmaC mma_tf32(const MmaA& a, float b0, float b1, const MmaC& c) {
    MmaC d = c;
#ifdef NOWAG_SIMT
    struct Mine {
        MmaA a;
        float b[2];
    };
    const auto top = [](float value) {
        return __uint_as_float(__float_as_uint(value) & 0xffffe000u);
    };
    const Mine mine{a, {top(b0), top(b1)}};
    const auto& lanes = simt::collect(kFullWarp, &mine, sizeof mine, {__FILE__, __LINE__, "mma"});
    const int g = simt::lane() / 4, t = simt::lane() % 4;
    for (int k = 0; k < 8; ++k) {
        const MmaA left = simt::from_lane<Mine>(lanes, 4 * g + k % 4).a;
        for (int i = 0; i < 4; ++i) {
            const Mine right = simt::from_lane<Mine>(lanes, 4 * (2 * t + i % 2) + k % 4);
            d.x[i] += top(__uint_as_float(left.x[i / 2 + 2 * (k / 4)])) * right.b[k / 4];
        }
    }
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d.x[0]), "=f"(d.x[1]), "=f"(d.x[2]), "=f"(d.x[3])
        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(__float_as_uint(b0)),
          "r"(__float_as_uint(b1)), "f"(c.x[0]), "f"(c.x[1]), "f"(c.x[2]), "f"(c.x[3]));
#endif
    return d;
}

#ifdef NOWAG_SIMT
// Every term loses what lies more than one bit below float32's last of the largest, and the sum
// what lies below its own last: what tests of tensor cores have found (Fasi et al., Numerical
// behavior of NVIDIA tensor cores, 2021), later ones keeping a bit more.
inline float truncated_sum(const double (&terms)[9]) {
    double largest = 0.0, exact = 0.0;
    for (const double term : terms) {
        largest = std::fmax(largest, std::fabs(term));
        exact += term;
    }
    if (largest == 0.0 || !std::isfinite(exact)) return static_cast<float>(exact);
    const double unit = std::ldexp(1.0, std::ilogb(largest) - 24);
    double sum = 0.0;
    for (const double term : terms) sum += std::trunc(term / unit) * unit;
    const auto nearest = static_cast<float>(sum);
    return std::fabs(nearest) > std::fabs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
}
#endif

// c += a b by one warp, a [16, 16] and b [16, 8] of a 16-bit type, c in float32. With g = lane / 4
// and t = lane % 4 a lane holds pairs of columns of a and of rows of b, the lower in the low half:
//   a: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)     b: (2t, g), (2t + 8, g)
//   c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
// Products are exact. How their sum is rounded is not specified: the host does the worst that
// tensor cores are believed to do (truncated_sum), to eight products and then to the others.
template <DType kType>
__device__ __forceinline__ void mma_16(const MmaA& a, uint32_t b0, uint32_t b1, MmaC& c) {
    static_assert(kType == DType::float16 || kType == DType::bfloat16, "16 bits");
#ifdef NOWAG_SIMT
    struct Mine {
        MmaA a;
        uint32_t b[2];
    };
    const auto half = [](uint32_t pair, int i) {
        const auto bits = static_cast<uint16_t>(pair >> (16 * i));
        return kType == DType::float16 ? half_to_float(bits) : brain_to_float(bits);
    };
    const Mine mine{a, {b0, b1}};
    const auto& lanes = simt::collect(kFullWarp, &mine, sizeof mine, {__FILE__, __LINE__, "mma"});
    const int g = simt::lane() / 4, t = simt::lane() % 4;
    for (int first = 0; first < 16; first += 8) {
        double terms[4][9];
        for (int k = first; k < first + 8; ++k) {
            const int owner = k % 8 / 2;
            const MmaA left = simt::from_lane<Mine>(lanes, 4 * g + owner).a;
            for (int i = 0; i < 4; ++i) {
                const Mine right = simt::from_lane<Mine>(lanes, 4 * (2 * t + i % 2) + owner);
                terms[i][k - first] =
                    static_cast<double>(half(left.x[i / 2 + 2 * (k / 8)], k % 2)) *
                    half(right.b[k / 8], k % 2);
            }
        }
        for (int i = 0; i < 4; ++i) {
            terms[i][8] = c.x[i];
            c.x[i] = truncated_sum(terms[i]);
        }
    }
#else
    if constexpr (kType == DType::float16) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])
            : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])
            : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b0), "r"(b1));
    }
#endif
}

// A place in shared memory, to step through byte by byte: one register. Where control flow is not
// known to be the same for a warp the compiler computes the memory's base anew for each access by
// pointer.
#ifdef NOWAG_SIMT
using SharedPlace = const unsigned char*;
#else
using SharedPlace = uint32_t;
#endif

__device__ __forceinline__ SharedPlace shared_place(const void* memory) {
#ifdef NOWAG_SIMT
    return static_cast<const unsigned char*>(memory);
#else
    return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
#endif
}

__device__ __forceinline__ uint16_t load_16(SharedPlace place) {
#ifdef NOWAG_SIMT
    return *reinterpret_cast<const uint16_t*>(place);
#else
    uint16_t value;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(place) : "memory");
    return value;
#endif
}

// Starts copying kBytes, 4, 8 or 16, from global to shared memory, past the registers; both
// addresses are multiples of that. The thread's copies since its last commit_copies() are a group;
// once it has waited for the group it sees them, and other threads do behind the next barrier.
template <int kBytes = 16>
__device__ __forceinline__ void start_copy(void* shared, const void* global) {
#ifdef NOWAG_SIMT
    simt::start_copy(shared, global, kBytes);
#else
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(global),
                 "n"(kBytes)
                 : "memory");
#endif
}

__device__ __forceinline__ void commit_copies() {
#ifdef NOWAG_SIMT
    simt::commit_copies();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for the thread's groups of copies but the last kPending.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
#ifdef NOWAG_SIMT
    simt::wait_for_copies(kPending);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// A kernel that launch_after (launch.h) starts may run beside the one before it: waits for that to
// end and for what it wrote to be seen. What is read behind this is no `const __restrict__`: the
// compiler could read that earlier. Without such a launch, and on the executor, it ended before.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Once every block has said so, or ended, the kernel that launch_after starts next may begin.
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Elements of the three types as floats.
template <DType kType>
struct Element {
    using Stored = uint16_t;
    static __device__ __forceinline__ float load(const void* data, int64_t index) {
        const uint16_t bits = static_cast<const uint16_t*>(data)[index];
        return kType == DType::float16 ? half_to_float(bits) : brain_to_float(bits);
    }
    static __device__ __forceinline__ void store(void* data, int64_t index, float value) {
        static_cast<uint16_t*>(data)[index] =
            kType == DType::float16 ? float_to_half(value) : float_to_brain(value);
    }
    // Two values as they are stored side by side.
    static __device__ __forceinline__ uint32_t pair(float low, float high) {
#ifdef NOWAG_SIMT
        const uint32_t lower = kType == DType::float16 ? float_to_half(low) : float_to_brain(low);
        const uint32_t upper = kType == DType::float16 ? float_to_half(high) : float_to_brain(high);
        return lower | upper << 16;
#else
        uint32_t words;
        if constexpr (kType == DType::float16) {
            asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(words) : "f"(high), "f"(low));
        } else {
            asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(words) : "f"(high), "f"(low));
        }
        return words;
#endif
    }
};

template <>
struct Element<DType::float32> {
    using Stored = float;
    static __device__ __forceinline__ float load(const void* data, int64_t index) {
        return static_cast<const float*>(data)[index];
    }
    static __device__ __forceinline__ void store(void* data, int64_t index, float value) {
        static_cast<float*>(data)[index] = value;
    }
};

}  // namespace nowag::cuda
