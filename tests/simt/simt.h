// A host that runs CUDA kernels, so that they are tested where there is no GPU.
//
// The kernels of csrc/cuda compile with the host compiler against this header. A block runs as one
// fibre a CUDA thread, all on one OS thread; a fibre runs until it reaches a barrier or a warp
// collective, and then a scheduler picks another in an order drawn from the seed. Whatever a kernel
// reads that another thread has not yet been made to write by a barrier therefore differs between
// seeds. Blocks run one after another in random order. Shared memory is a heap block of exactly the
// launched size, filled with the seed's poison when a block starts, so that AddressSanitizer sees
// an access past its end and a read before a write changes the result from seed to seed.
//
// The blocks of a cluster are alive at once, clusters one after another.
//
// These end the process with a sentence on stderr: a barrier or a collective that some threads of
// the block, of its cluster or of its mask do not reach, two barriers of different source lines met
// by one block or cluster, a look into a block of the cluster that is not there or has ended, a
// lane outside the mask it passes, a shuffle from a lane outside the mask, a copy whose addresses
// are not multiples of its size.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3() = default;
    dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Of the fibre that is running.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace simt {

constexpr int kWarp = 32;
constexpr size_t kLaneBytes = 64;  // what a lane can hand to the others in one collective

// Where in the source a barrier or collective stands: its callers' line, by default arguments.
struct Site {
    const char* file;
    int line;
    const char* operation;
    bool operator==(const Site& other) const {
        return line == other.line && std::strcmp(file, other.file) == 0 &&
               std::strcmp(operation, other.operation) == 0;
    }
};

// How threads are ordered: seed 0 ascending, 1 descending, others at random.
void set_seed(uint64_t seed);

// Runs a grid to its end. `body` is the kernel bound to its arguments.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);

// As run_grid, with all blocks alive at once, so that they may wait for each other with yield().
void run_grid_together(dim3 grid, dim3 block, size_t shared_bytes,
                       const std::function<void()>& body);
void yield();

// As run_grid, in clusters of so many blocks that follow one another along x.
void run_grid_in_clusters(dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes,
                          const std::function<void()>& body);
void cluster_barrier(const Site& site);
// The same place in the shared memory of another block of the cluster.
const void* in_block(const void* shared, int rank);

unsigned char* dynamic_shared();
[[noreturn]] void fail(const char* what, const Site& site);

struct Votes {
    int count;  // threads whose predicate was not 0
    int threads;
};
Votes barrier(bool predicate, const Site& site);

// What every lane of `mask` contributed, by lane; the caller is one of them.
using Lanes = unsigned char[kWarp][kLaneBytes];
const Lanes& collect(unsigned mask, const void* mine, size_t bytes, const Site& site);
int lane();

// cp.async: the target holds the seed's poison from the start of a copy until its thread waits for
// it, so that it shows where something is read too early or overwritten while still in use.
void start_copy(void* target, const void* source, size_t bytes);
void commit_copies();
void wait_for_copies(size_t pending);

template <typename T>
T from_lane(const Lanes& lanes, int source) {
    T value;
    std::memcpy(&value, lanes[source], sizeof value);
    return value;
}

template <typename T>
T shuffle(unsigned mask, T value, int source, const Site& site) {
    static_assert(sizeof(T) <= kLaneBytes, "a lane's contribution");
    const Lanes& lanes = collect(mask, &value, sizeof value, site);
    if (!((mask >> source) & 1u)) fail("shuffle from a lane outside the mask", site);
    return from_lane<T>(lanes, source);
}

// Combines the contributions of the mask's lanes, lane ascending.
template <typename T, typename Combine>
T combine(unsigned mask, T value, const Site& site, Combine&& step) {
    const Lanes& lanes = collect(mask, &value, sizeof value, site);
    bool first = true;
    T result{};
    for (int source = 0; source < kWarp; ++source) {
        if (!((mask >> source) & 1u)) continue;
        const T other = from_lane<T>(lanes, source);
        result = first ? other : step(result, other);
        first = false;
    }
    return result;
}

}  // namespace simt

#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define SIMT_HERE \
    simt::Site { file, line, __func__ }

inline void __syncthreads(SIMT_SITE) { simt::barrier(false, SIMT_HERE); }
inline int __syncthreads_count(int predicate, SIMT_SITE) {
    return simt::barrier(predicate != 0, SIMT_HERE).count;
}
inline int __syncthreads_or(int predicate, SIMT_SITE) {
    return simt::barrier(predicate != 0, SIMT_HERE).count > 0;
}
inline int __syncthreads_and(int predicate, SIMT_SITE) {
    const simt::Votes votes = simt::barrier(predicate != 0, SIMT_HERE);
    return votes.count == votes.threads;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_SITE) {
    simt::collect(mask, nullptr, 0, SIMT_HERE);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_SITE) {
    const int base = simt::lane() / width * width;
    return simt::shuffle(mask, value, base + (source & (width - 1)), SIMT_HERE);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32, SIMT_SITE) {
    const int source = simt::lane() ^ flip;
    const bool inside = source / width == simt::lane() / width;
    return simt::shuffle(mask, value, inside ? source : simt::lane(), SIMT_HERE);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
    const int source = simt::lane() + static_cast<int>(delta);
    const bool inside = source / width == simt::lane() / width;
    return simt::shuffle(mask, value, inside ? source : simt::lane(), SIMT_HERE);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
    const int source = simt::lane() - static_cast<int>(delta);
    const bool inside = source >= simt::lane() / width * width;
    return simt::shuffle(mask, value, inside ? source : simt::lane(), SIMT_HERE);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_SITE) {
    const unsigned mine = predicate ? 1u << simt::lane() : 0u;
    return simt::combine(mask, mine, SIMT_HERE, [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate, SIMT_SITE) {
    return simt::combine(mask, predicate != 0, SIMT_HERE, [](bool a, bool b) { return a || b; });
}
inline int __all_sync(unsigned mask, int predicate, SIMT_SITE) {
    return simt::combine(mask, predicate != 0, SIMT_HERE, [](bool a, bool b) { return a && b; });
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, SIMT_SITE) {
    return simt::combine(mask, value, SIMT_HERE,
                         [](unsigned a, unsigned b) { return a < b ? a : b; });
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, SIMT_SITE) {
    return simt::combine(mask, value, SIMT_HERE, [](unsigned a, unsigned b) { return a + b; });
}

template <typename T>
T atomicAdd(T* address, T value) {
    const T before = *address;
    *address = before + value;
    return before;
}
template <typename T>
T atomicOr(T* address, T value) {
    const T before = *address;
    *address = before | value;
    return before;
}
template <typename T>
T atomicMin(T* address, T value) {
    const T before = *address;
    if (value < before) *address = value;
    return before;
}
template <typename T>
T atomicMax(T* address, T value) {
    const T before = *address;
    if (value > before) *address = value;
    return before;
}

inline void __threadfence() {}
inline int min(int a, int b) { return a < b ? a : b; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    const uint64_t both = (static_cast<uint64_t>(high) << 32) | low;
    return static_cast<unsigned>(both >> (shift & 31u));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    const uint64_t both = (static_cast<uint64_t>(high) << 32) | low;
    return static_cast<unsigned>(both << (shift & 31u) >> 32);
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t both = (static_cast<uint64_t>(high) << 32) | low;
    unsigned picked = 0;
    for (int byte = 0; byte < 4; ++byte) {
        picked |= static_cast<unsigned>(both >> 8 * (selector >> 4 * byte & 7) & 0xff) << 8 * byte;
    }
    return picked;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline long long __double_as_longlong(double value) {
    long long bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
template <typename T>
T __ldg(const T* address) {
    return *address;
}
