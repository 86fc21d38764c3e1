// The third kernel of prune_select.cuh: decides the rest.
#pragma once

#include "cuda/prune/prune_select.cuh"

namespace nowag::cuda {

constexpr int kFinishBlocks = 4;  // a multiprocessor, for its registers

struct FinishShared {
    unsigned histogram[kDigitBins];
    unsigned find_bin[kFindBinShared];
};

// What prune_finish works on.
struct Finish {
    const PruneLayer& layer;
    PruneScratch* scratch;
    unsigned* bitmap;
    PruneCrowd crowd;
    FinishShared& shared;
    unsigned generation = 0;  // of the barriers

    __device__ void barrier() { grid_barrier(&scratch->counts.arrived, ++generation); }

    __device__ void keep(PruneCandidate candidate) {
        const unsigned index = static_cast<unsigned>(candidate);
        const unsigned cols = static_cast<unsigned>(layer.cols);
        const int64_t words = padded_columns(layer.cols) / 32;
        const unsigned j = index % cols;
        atomicOr(&bitmap[index / cols * words + j / 32], 1u << j % 32);
    }

    // Keeps the crowd but its first `pruned`. Blocks have the rows to themselves.
    __device__ void keep_crowd(unsigned pruned) {
        const int64_t words = padded_columns(layer.cols) / 32;
        unsigned before = 0;  // of the crowd, in the rows before
        const int64_t first = first_row(blockIdx.x);
        for (int64_t i = threadIdx.x; i < first; i += kPruneThreads) before += crowd.of_rows[i];
        before = block_sum<kPruneThreads>(before, shared.find_bin);
        for_rows([&](int64_t i) {
            const unsigned of_row = crowd.of_rows[i];
            unsigned gone = pruned > before ? pruned - before : 0u;  // from here on
            before += of_row;
            if (of_row == 0 || gone >= of_row) return;
            for (int64_t segment = 0; segment < words; segment += kPruneThreads) {
                const int64_t j = segment + threadIdx.x;
                unsigned word = j < words ? crowd.bitmap[i * words + j] : 0u;
                if (gone > 0) {
                    const auto scan = block_scan<kPruneThreads>(static_cast<unsigned>(__popc(word)),
                                                                shared.find_bin);
                    const unsigned own = static_cast<unsigned>(__popc(word));
                    unsigned skipped = scan.upto - own;
                    for (; word != 0 && skipped < gone; ++skipped) word &= word - 1;
                    gone -= gone < scan.total ? gone : scan.total;
                }
                if (word != 0) bitmap[i * words + j] |= word;
            }
        });
    }

    // Decides the candidates and the crowd, given that the threshold is one of them.
    __device__ void from_candidates(const PruneCandidate* list) {
        const PruneBracket bracket = scratch->bracket;
        const PruneThreshold decided = scratch->threshold;
        const PruneBin threshold = decided.bin;
        if (bracket.crowded) {
            keep_crowd(decided.of_crowd);
            barrier();
        }
        const unsigned count = scratch->counts.candidates;
        const unsigned thread = blockIdx.x * kPruneThreads + threadIdx.x;
        const unsigned threads = gridDim.x * kPruneThreads;
        for (int64_t c = thread; c < count; c += threads) {
            const PruneCandidate candidate = list[c];
            if (decided.in_crowd) {
                if (candidate >> 32 > bracket.crowd) keep(candidate);
                continue;
            }
            const unsigned bin = bin_of(bracket, candidate);
            if (bin > threshold.bin) keep(candidate);
            if (bin == threshold.bin) {
                scratch->tied[atomicAdd(&scratch->counts.tied, 1u)] = candidate;
            }
        }
        if (decided.in_crowd) return;
        barrier();
        // A warp ranks one of the tied.
        const unsigned lane = threadIdx.x % kWarpSize;
        for (unsigned t = thread / kWarpSize; t < threshold.count; t += threads / kWarpSize) {
            const PruneCandidate mine = scratch->tied[t];
            unsigned before = 0;
            for (unsigned other = lane; other < threshold.count; other += kWarpSize) {
                before += scratch->tied[other] < mine;
            }
            before = __reduce_add_sync(kFullWarp, before);
            if (lane == 0 && before >= threshold.rank) keep(mine);
        }
    }

    // A block takes consecutive rows: flat indices ascend with blocks.
    __device__ int64_t first_row(unsigned block) {
        const int64_t row = block * ((layer.rows + gridDim.x - 1) / gridDim.x);
        return row < layer.rows ? row : layer.rows;
    }

    template <typename Body>
    __device__ void for_rows(Body&& body) {
        const int64_t end = first_row(blockIdx.x + 1);
        for (int64_t i = first_row(blockIdx.x); i < end; ++i) body(i);
    }

    // Counts a digit of the keys whose higher digits are the prefix's.
    __device__ void count_digit(int digit, unsigned prefix) {
        // Bits above this digit; shifting by 32 is undefined, hence the two steps.
        const int above = digit == 0 ? 31 : digit_shift(digit - 1);
        for (int bin = threadIdx.x; bin < kDigitBins; bin += kPruneThreads) {
            shared.histogram[bin] = 0;
        }
        __syncthreads();
        for_rows([&](int64_t i) {
#pragma unroll 8
            for (int64_t j = threadIdx.x; j < layer.cols; j += kPruneThreads) {
                const unsigned key = saliency_bits(layer, i, j);
                if ((key ^ prefix) >> above == 0) {
                    const unsigned bin = key >> digit_shift(digit) & digit_mask(digit);
                    atomicAdd(&shared.histogram[bin], 1u);
                }
            }
        });
        __syncthreads();
        for (int bin = threadIdx.x; bin < kDigitBins; bin += kPruneThreads) {
            if (shared.histogram[bin] > 0) {
                atomicAdd(&scratch->digits[digit][bin], shared.histogram[bin]);
            }
        }
    }

    // Weights of a row whose key is the threshold's, in this thread's share of the row.
    __device__ unsigned ties_in_row(int64_t i, unsigned threshold) {
        unsigned ties = 0;
#pragma unroll 8
        for (int64_t j = threadIdx.x; j < layer.cols; j += kPruneThreads) {
            ties += saliency_bits(layer, i, j) == threshold;
        }
        return ties;
    }

    // Writes a row's bits: below the threshold no weight is kept, and of those at the threshold
    // all but the first `pruned`. kRanked: that is neither none nor all of them.
    template <bool kRanked>
    __device__ void write_row(int64_t i, unsigned threshold, unsigned pruned) {
        const int64_t padded = padded_columns(layer.cols);
        unsigned seen = 0;
#pragma unroll 4
        for (int64_t segment = 0; segment < padded; segment += kPruneThreads) {
            const int64_t j = segment + threadIdx.x;
            const bool inside = j < layer.cols;
            const unsigned key = inside ? saliency_bits(layer, i, j) : 0u;
            const bool tie = inside && key == threshold;
            unsigned rank = 1;
            if (kRanked) {
                const auto scan =
                    block_scan<kPruneThreads>(static_cast<unsigned>(tie), shared.find_bin);
                rank = seen + scan.upto;
                seen += scan.total;
            }
            const bool kept = inside && (key > threshold || (tie && rank > pruned));
            const unsigned word = __ballot_sync(kFullWarp, kept);
            if (threadIdx.x % kWarpSize == 0 && j < padded) {
                bitmap[(i * padded + j) / kWarpSize] = word;
            }
        }
    }

    // Everything again by a radix select over the whole layer.
    __device__ void from_digits(unsigned n_prune, unsigned* ties) {
        unsigned threshold = 0;
        PruneBin found{0u, n_prune, 0u};
        for (int digit = 0; digit < kDigits; ++digit) {
            count_digit(digit, threshold);
            barrier();
            found = find_bin<kDigitBins>(scratch->digits[digit], found.rank, shared.find_bin);
            threshold |= found.bin << digit_shift(digit);
        }
        // Ties that this block has, and how many of them are pruned.
        unsigned own = found.count, pruned = found.count;
        if (found.rank < found.count) {
            unsigned mine = 0;
            for_rows([&](int64_t i) { mine += ties_in_row(i, threshold); });
            own = block_sum<kPruneThreads>(mine, shared.find_bin);
            if (threadIdx.x == 0) ties[blockIdx.x] = own;
            barrier();
            mine = 0;
            for (unsigned block = threadIdx.x; block < blockIdx.x; block += kPruneThreads) {
                mine += ties[block];
            }
            const unsigned before = block_sum<kPruneThreads>(mine, shared.find_bin);
            pruned = found.rank > before ? found.rank - before : 0u;
        }
        for_rows([&](int64_t i) {
            if (pruned == 0 || pruned >= own) return write_row<false>(i, threshold, pruned);
            const unsigned row =
                block_sum<kPruneThreads>(ties_in_row(i, threshold), shared.find_bin);
            if (pruned >= row) {
                write_row<false>(i, threshold, row);
            } else {
                write_row<true>(i, threshold, pruned);
            }
            own -= row;
            pruned -= pruned < row ? pruned : row;
        });
    }
};

// Decides the candidates, or everything again where the list is of no use.
//   n_prune     how many weights are to be pruned
//   scratch     what prune_split left; digits, tied and the barrier's count are worked with
//   candidates  the undecided weights
//   ties        [blocks]: of the radix select, how many weights of a block are at the threshold
//   bitmap      in and out: bits are set, or all words written again
//   crowd       what prune_split left
// Launched cooperatively: blocks meet at grid barriers. Of the list a thread takes one candidate
// after another, and of the tied a warp; of the radix select a block takes consecutive rows. 7 us
// from a list, a chain of dependent reads from the second-level cache.
__global__ void __launch_bounds__(kPruneThreads, kFinishBlocks)
    prune_finish(PruneLayer layer, unsigned n_prune, PruneScratch* scratch,
                 PruneCandidates candidates, unsigned* ties, unsigned* bitmap, PruneCrowd crowd) {
    Finish finish{layer, scratch, bitmap, crowd, *reinterpret_cast<FinishShared*>(shared_memory())};
    if (scratch->threshold.found) {
        finish.from_candidates(candidates.list);
    } else {
        finish.from_digits(n_prune, ties);
    }
}

}  // namespace nowag::cuda
