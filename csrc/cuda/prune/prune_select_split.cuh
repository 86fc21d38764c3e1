// The second kernel of prune_select.cuh: reads W once, and decides what it can.
#pragma once

#include "cuda/prune/prune_parts.cuh"
#include "cuda/prune/prune_select.cuh"

namespace nowag::cuda {

// Candidates that a block gathers before it appends them to the list; it expects 300.
constexpr unsigned kStaged = 1024;

struct SplitShared {
    PruneCandidate staged[kStaged];
    unsigned count;  // also of those that were not staged, for want of space
    unsigned kept;
    unsigned before_crowd;
    unsigned crowd;
    unsigned first;  // place of the staged candidates in the list
    unsigned find_bin[kFindBinShared];
};

__device__ __forceinline__ PruneCandidate make_candidate(unsigned key, unsigned index) {
    return static_cast<PruneCandidate>(key) << 32 | index;
}

// Puts a candidate at a place of the list, if it has that place.
__device__ __forceinline__ void list_candidate(PruneCandidate candidate, unsigned place,
                                               const PruneBracket& bracket,
                                               const PruneCandidates& candidates,
                                               PruneScratch* scratch) {
    atomicAdd(&scratch->bracketed[bin_of(bracket, candidate)], 1u);
    if (place < candidates.capacity) candidates.list[place] = candidate;
}

// Of a lane's weights those beyond the bracket, those of its crowd, and the others inside.
struct SplitBits {
    unsigned above;
    unsigned crowd;
    unsigned undecided;
};

// Reads a lane's weights, all rows before the first is looked at, and compares their keys. A
// comparison is the sign of a difference, shifted in from the right, the last weight first.
template <bool kVector, bool kCrowded>
__device__ __forceinline__ SplitBits compare_part(const PruneLayer& layer, const SplitPart& part,
                                                  const PruneBracket& bracket) {
    const SplitWeights<kVector> weights(layer, part);
    unsigned above = 0, reached = 0, crowd = 0;
#pragma unroll
    for (int r = kSplitRows - 1; r >= 0; --r) {
        unsigned keys[4];
        weights.keys(r, keys);
#pragma unroll
        for (int c = 3; c >= 0; --c) {
            above = __funnelshift_l(bracket.last - keys[c], above, 1);
            reached = __funnelshift_l(bracket.before - keys[c], reached, 1);
            if (kCrowded) crowd = __funnelshift_l((keys[c] ^ bracket.crowd) - 1, crowd, 1);
        }
    }
    const unsigned present = present_bits(part);
    above &= present;
    crowd &= present;
    return {above, crowd, reached & present & ~above & ~crowd};
}

// Marks the unit's part of the crowd, and counts it by row.
__device__ __forceinline__ void mark_crowd(const SplitPart& part, unsigned bits, int64_t words,
                                           const PruneCrowd& crowd) {
    unsigned count = write_part(part, bits, words, crowd.bitmap);
    // The lanes that have words of one row are kSplitRows apart.
#pragma unroll
    for (int apart = kSplitRows; apart < kWarpSize; apart *= 2) {
        count += __shfl_xor_sync(kFullWarp, count, apart);
    }
    const int row = lane_of_thread();
    if (row < part.rows && row < kSplitRows && count > 0) {
        atomicAdd(&crowd.of_rows[part.first + row], count);
    }
}

// Gathers a lane's undecided weights in shared memory, those beyond its room in the list. Returns
// how many of them are before the crowd.
__device__ __forceinline__ unsigned stage_part(const PruneLayer& layer, const SplitPart& part,
                                               unsigned undecided, const PruneBracket& bracket,
                                               const PruneCandidates& candidates,
                                               PruneScratch* scratch, SplitShared& shared) {
    const unsigned index = static_cast<unsigned>(part.first * layer.cols + part.j);
    unsigned slot = 0, before_crowd = 0;
    if (undecided != 0) {
        slot = atomicAdd(&shared.count, static_cast<unsigned>(__popc(undecided)));
    }
    for (; undecided != 0; undecided &= undecided - 1, ++slot) {
        const unsigned bit = static_cast<unsigned>(__ffs(static_cast<int>(undecided))) - 1;
        const unsigned offset = bit / 4 * static_cast<unsigned>(layer.cols) + bit % 4;
        const unsigned key = saliency_bits(part.corner[offset], layer.h[part.j + bit % 4]);
        const PruneCandidate candidate = make_candidate(key, index + offset);
        before_crowd += bracket.crowded && key < bracket.crowd;
        if (slot < kStaged) {
            shared.staged[slot] = candidate;
        } else {
            list_candidate(candidate, atomicAdd(&scratch->counts.candidates, 1u), bracket,
                           candidates, scratch);
        }
    }
    return before_crowd;
}

// What a thread of prune_split has counted.
struct SplitCounts {
    unsigned kept, before_crowd, crowd;
};

// Appends what the block has staged to the list, and adds what it has counted to the grid's counts.
__device__ __forceinline__ void append_staged(const SplitCounts& mine, const PruneBracket& bracket,
                                              const PruneCandidates& candidates,
                                              PruneScratch* scratch, SplitShared& shared) {
    const unsigned kept = __reduce_add_sync(kFullWarp, mine.kept);
    if (lane_of_thread() == 0) atomicAdd(&shared.kept, kept);
    if (bracket.crowded) {
        const unsigned before = __reduce_add_sync(kFullWarp, mine.before_crowd);
        const unsigned crowd = __reduce_add_sync(kFullWarp, mine.crowd);
        if (lane_of_thread() == 0) {
            atomicAdd(&shared.before_crowd, before);
            atomicAdd(&shared.crowd, crowd);
        }
    }
    __syncthreads();
    const unsigned staged = shared.count < kStaged ? shared.count : kStaged;
    if (threadIdx.x == 0) {
        shared.first = atomicAdd(&scratch->counts.candidates, staged);
        atomicAdd(&scratch->counts.kept, shared.kept);
        if (bracket.crowded) {
            atomicAdd(&scratch->counts.before_crowd, shared.before_crowd);
            atomicAdd(&scratch->counts.crowd, shared.crowd);
        }
    }
    __syncthreads();
    for (unsigned c = threadIdx.x; c < staged; c += kPruneThreads) {
        list_candidate(shared.staged[c], shared.first + c, bracket, candidates, scratch);
    }
}

// Looks for the threshold among the candidates and the crowd, if it is one of them and the
// candidates are all listed.
__device__ inline void find_among_candidates(const PruneLayer& layer, unsigned n_prune,
                                             const PruneCandidates& candidates,
                                             PruneScratch* scratch, unsigned* shared) {
    const PruneCounts& counts = scratch->counts;
    const unsigned count = counts.candidates, crowd = counts.crowd;
    const unsigned before_crowd = scratch->bracket.crowded ? counts.before_crowd : count;
    const unsigned below =
        static_cast<unsigned>(layer.rows * layer.cols) - counts.kept - count - crowd;
    PruneThreshold threshold{false, false, {0u, 0u, 0u}, 0u};
    if (below < n_prune && n_prune - below <= count + crowd && count <= candidates.capacity) {
        unsigned rank = n_prune - below;
        if (rank > before_crowd) {
            threshold.of_crowd = rank - before_crowd < crowd ? rank - before_crowd : crowd;
            rank -= threshold.of_crowd;
        }
        // Behind some of the crowd there is nobody, or all of it.
        threshold.in_crowd = threshold.of_crowd > 0 && rank == before_crowd;
        if (threshold.in_crowd) {
            threshold.found = true;
        } else {
            threshold.bin = find_bin<kBins>(scratch->bracketed, rank, shared);
            threshold.found = threshold.bin.count <= kMostTied;
        }
    }
    if (threadIdx.x == 0) scratch->threshold = threshold;
}

// Decides what lies outside the bracket, lists the rest; the block that ends last looks for the
// threshold in the list.
//   kVector     rows of W, and h, are read in aligned fours: cols % 4 = 0, both aligned to 16 bytes
//   n_prune     how many weights are to be pruned
//   scratch     bracket in; counts, bracketed and threshold out
//   candidates  out: the undecided weights, in any order, as many as fit
//   bitmap      out, [rows, padded columns / 32] words: set for keys above the bracket only
//   crowd       out, if the bracket is crowded; of_rows is added to
// A block: kPruneWarps * kUnitsPerWarp units; a warp: one unit after another, of kSplitRows rows
// and kSplitColumns columns; a lane: 4 columns of each row, all read before the first is looked at.
// Bound by memory: measured on an H100, 39 us.
template <bool kVector>
__global__ void __launch_bounds__(kPruneThreads, kVector ? 4 : 3)
    prune_split(PruneLayer layer, unsigned n_prune, PruneScratch* scratch,
                PruneCandidates candidates, unsigned* bitmap, PruneCrowd crowd) {
    SplitShared& shared = *reinterpret_cast<SplitShared*>(shared_memory());
    if (threadIdx.x == 0) shared.count = shared.kept = shared.before_crowd = shared.crowd = 0;
    __syncthreads();
    const PruneBracket bracket = scratch->bracket;
    const int64_t words = padded_columns(layer.cols) / 32;
    const unsigned across = static_cast<unsigned>((layer.cols + kSplitColumns - 1) / kSplitColumns);
    const unsigned down = static_cast<unsigned>((layer.rows + kSplitRows - 1) / kSplitRows);
    SplitCounts mine{};
    for (int u = 0; u < kUnitsPerWarp; ++u) {
        const unsigned unit = unit_of_warp(u);
        if (unit >= across * down) break;
        const SplitPart part(layer, unit, across);
        const SplitBits bits = bracket.crowded ? compare_part<kVector, true>(layer, part, bracket)
                                               : compare_part<kVector, false>(layer, part, bracket);
        mine.kept += write_part(part, bits.above, words, bitmap);
        if (bracket.crowded) {
            mine.crowd += static_cast<unsigned>(__popc(bits.crowd));
            mark_crowd(part, bits.crowd, words, crowd);
        }
        mine.before_crowd +=
            stage_part(layer, part, bits.undecided, bracket, candidates, scratch, shared);
    }
    append_staged(mine, bracket, candidates, scratch, shared);
    if (last_block(&scratch->counts.split_blocks, shared.find_bin)) {
        find_among_candidates(layer, n_prune, candidates, scratch, shared.find_bin);
    }
}

}  // namespace nowag::cuda
