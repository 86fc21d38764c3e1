#include "planted.h"

#include "cuda/base/device.cuh"

namespace simt {
namespace {

using nowag::cuda::kFullWarp;
using nowag::cuda::shared_memory;

constexpr int kThreads = 64;

int* shared_integers() { return reinterpret_cast<int*>(shared_memory()); }
int thread() { return static_cast<int>(threadIdx.x); }

// out[t] = the value that thread 63 - t stored: right only with the barrier.
template <bool kBarrier>
void reversed(int* out) {
    int* shared = shared_integers();
    shared[thread()] = thread();
    if (kBarrier) __syncthreads();
    out[thread()] = shared[kThreads - 1 - thread()];
}

void divergent_barrier(int* out) {
    if (thread() % 2 == 0) __syncthreads();
    out[thread()] = 1;
}

void different_barriers(int* out) {
    if (thread() < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[thread()] = 1;
}

void missing_lane(int* out) {
    if (thread() == 5) return;
    out[thread()] = __shfl_xor_sync(kFullWarp, thread(), 1);
}

void outside_mask(int* out) { out[thread()] = __shfl_sync(0xffffu, thread(), 0); }

void shuffle_from_outside(int* out) {
    if (thread() < 16) out[thread()] = __shfl_sync(0xffffu, thread(), 20);
}

void shared_overrun(int* out) { out[thread()] = shared_integers()[thread() + 1]; }

void shared_unwritten(int* out) { out[thread()] = shared_integers()[thread()]; }

void wait_for_ever(int* out) {
    const volatile int* flag = out;
    while (*flag == 0) yield();
}

// out[0..15]: what each operation gives in thread 33, with values that are thread numbers.
void operations(int* out) {
    const int t = thread();
    const int results[] = {__shfl_sync(kFullWarp, t, 3),
                           __shfl_xor_sync(kFullWarp, t, 5),
                           __shfl_down_sync(kFullWarp, t, 2),
                           __shfl_up_sync(kFullWarp, t, 2),
                           __shfl_sync(kFullWarp, t, 1, 8),
                           static_cast<int>(__ballot_sync(kFullWarp, t % 32 < 2)),
                           __any_sync(kFullWarp, t == 40),
                           __all_sync(kFullWarp, t != 40),
                           static_cast<int>(__reduce_min_sync(kFullWarp, static_cast<unsigned>(t))),
                           static_cast<int>(__reduce_add_sync(kFullWarp, 1u)),
                           __syncthreads_count(t % 4 == 0),
                           __syncthreads_or(t == 9),
                           __syncthreads_and(t < 64)};
    if (t == 33) {
        for (int i = 0; i < 13; ++i) out[i] = results[i];
    }
    atomicAdd(out + 13, 1);
    atomicMax(out + 14, t);
    atomicOr(out + 15, t);
}

// Lanes 0..15 and 16..31 go separate ways with their own masks.
void two_masks(int* out) {
    const unsigned mask = thread() % 32 < 16 ? 0xffffu : 0xffff0000u;
    out[thread()] = __shfl_xor_sync(mask, thread(), 1);
    __syncwarp();
}

// out[t] = thread 63 - t's: each thread copies 16 bytes of out + 64 and hands them on.
template <bool kWait>
void copies(int* out) {
    int* shared = shared_integers();
    if (thread() < kThreads / 4) {
        nowag::cuda::start_copy(shared + 4 * thread(), out + kThreads + 4 * thread());
        nowag::cuda::commit_copies();
        nowag::cuda::commit_copies();
        nowag::cuda::wait_for_copies<kWait ? 1 : 2>();
    }
    __syncthreads();
    out[thread()] = shared[kThreads - 1 - thread()];
    nowag::cuda::wait_for_copies<0>();
}

void copy_never_waited_for(int* out) { nowag::cuda::start_copy(shared_integers(), out); }

void crooked_copy(int* out) { nowag::cuda::start_copy(shared_integers() + 1, out); }

// out[t] = the sum of what thread 63 - t of both blocks of a cluster stored.
template <bool kBarrier, bool kStay>
void across_blocks(int* out) {
    int* shared = shared_integers();
    const int block = static_cast<int>(blockIdx.x);
    shared[thread()] = thread() + 100 * block;
    if (kBarrier) nowag::cuda::cluster_barrier();
    if (!kStay && block == 1) return;
    if (!kStay && thread() == 0) {
        for (int i = 0; i < 1000; ++i) yield();
    }
    unsigned sum = 0;
    for (int rank = 0; rank < 2; ++rank) {
        sum += *static_cast<const unsigned*>(in_block(shared + kThreads - 1 - thread(), rank));
    }
    if (block == 0) out[thread()] = static_cast<int>(sum);
    if (kStay) nowag::cuda::cluster_barrier();
}

void block_that_skips_a_barrier(int* out) {
    if (blockIdx.x == 0) nowag::cuda::cluster_barrier();
    out[thread()] = 1;
}

void block_outside_the_cluster(int* out) {
    out[thread()] = *static_cast<const int*>(in_block(shared_integers(), 2));
}

template <void (*kKernel)(int*)>
void run_cluster(int* out) {
    run_grid_in_clusters(dim3(2), dim3(kThreads), 2, kThreads * sizeof(int),
                         [out] { kKernel(out); });
}

template <void (*kKernel)(int*), int kShared>
void run(int* out) {
    run_grid(dim3(1), dim3(kThreads), kShared, [out] { kKernel(out); });
}

}  // namespace

std::map<std::string, std::function<void(int*)>> planted_kernels() {
    constexpr int kBytes = kThreads * static_cast<int>(sizeof(int));
    return {{"barrier", run<reversed<true>, kBytes>},
            {"missing_barrier", run<reversed<false>, kBytes>},
            {"divergent_barrier", run<divergent_barrier, 0>},
            {"different_barriers", run<different_barriers, 0>},
            {"missing_lane", run<missing_lane, 0>},
            {"outside_mask", run<outside_mask, 0>},
            {"shuffle_from_outside", run<shuffle_from_outside, 0>},
            {"shared_overrun", run<shared_overrun, kBytes>},
            {"shared_unwritten", run<shared_unwritten, kBytes>},
            {"wait_for_ever", run<wait_for_ever, 0>},
            {"copies", run<copies<true>, kBytes>},
            {"copies_not_waited_for", run<copies<false>, kBytes>},
            {"crooked_copy", run<crooked_copy, kBytes>},
            {"copy_never_waited_for", run<copy_never_waited_for, kBytes>},
            {"operations", run<operations, 0>},
            {"two_masks", run<two_masks, 0>},
            {"cluster", run_cluster<across_blocks<true, true>>},
            {"cluster_without_barrier", run_cluster<across_blocks<false, true>>},
            {"cluster_left_early", run_cluster<across_blocks<true, false>>},
            {"cluster_barrier_skipped", run_cluster<block_that_skips_a_barrier>},
            {"cluster_exceeded", run_cluster<block_outside_the_cluster>}};
}

}  // namespace simt
