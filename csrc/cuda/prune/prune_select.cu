#include <algorithm>
#include <cmath>
#include <cstddef>

#include "cuda/base/launch.h"
#include "cuda/prune/prune_select.cuh"
#include "nowag/prune.h"

namespace nowag::cuda {

namespace {

__device__ __forceinline__ unsigned sampled_key(const PruneLayer& layer, uint64_t k, int bits) {
    const uint64_t numel = static_cast<uint64_t>(layer.rows * layer.cols);
    const uint64_t index = sample_index(k, numel, bits);
    return saliency_bits(layer.w[index], layer.h[index % static_cast<uint64_t>(layer.cols)]);
}

// How many of the sample's keys have a place in scratch->keys, each interval-th of them.
struct KeptKeys {
    unsigned count;
    unsigned interval;

    __device__ __forceinline__ explicit KeptKeys(int bits)
        : count(1u << bits < kSampledKeys ? 1u << bits : kSampledKeys),
          interval((1u << bits) / count) {}
};

// The key that most threads of the block, and not one alone, find first of those inside the bracket
// among the few kept keys that each looks at. Every thread calls it; whether there is one.
__device__ __forceinline__ bool find_crowd(const PruneScratch* scratch, int bits,
                                           const PruneBracket& bracket, SampleShared& shared,
                                           unsigned* crowd) {
    constexpr unsigned kNone = ~0u;  // no key is as large
    const unsigned count = KeptKeys(bits).count;
    unsigned mine = kNone;
    for (unsigned i = threadIdx.x; i < count; i += kPruneThreads) {
        const unsigned key = scratch->keys[i];
        const bool inside = key - bracket.before - 1 < bracket.last - bracket.before;
        if (mine == kNone && inside) mine = key;
    }
    shared.keys[threadIdx.x] = mine;
    __syncthreads();
    unsigned votes = 0;
    for (int t = 0; t < kPruneThreads; ++t) votes += shared.keys[t] == mine;
    if (mine == kNone || votes == 1) votes = 0;
    // The most votes, and among equals the first thread.
    unsigned best = (kPruneThreads - votes) * kPruneThreads + threadIdx.x;
    best = __reduce_min_sync(kFullWarp, best);
    if (lane_of_thread() == 0) shared.find_bin[warp_of_thread()] = best;
    __syncthreads();
    for (int warp = 0; warp < kPruneWarps; ++warp) best = min(best, shared.find_bin[warp]);
    *crowd = shared.keys[best % kPruneThreads];
    return best < kPruneThreads * kPruneThreads;
}

}  // namespace

__global__ void prune_sample(PruneLayer layer, PruneSample sample, PruneScratch* scratch,
                             PruneCrowd crowd) {
    SampleShared& shared = *reinterpret_cast<SampleShared*>(shared_memory());
    const unsigned size = 1u << sample.bits;
    const KeptKeys kept(sample.bits);
    const unsigned first = blockIdx.x * (kPruneThreads * kSampleEach) + threadIdx.x;
    unsigned keys[kSampleEach] = {};
#pragma unroll
    for (int s = 0; s < kSampleEach; ++s) {
        const unsigned k = first + s * kPruneThreads;
        if (k < size) keys[s] = sampled_key(layer, k, sample.bits);
    }
    for (int bin = threadIdx.x; bin < kBins; bin += kPruneThreads) shared.histogram[bin] = 0;
    const int64_t threads = static_cast<int64_t>(gridDim.x) * kPruneThreads;
    for (int64_t i = blockIdx.x * static_cast<int64_t>(kPruneThreads) + threadIdx.x; i < layer.rows;
         i += threads) {
        crowd.of_rows[i] = 0;
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < kSampleEach; ++s) {
        const unsigned k = first + s * kPruneThreads;
        if (k >= size) continue;
        atomicAdd(&shared.histogram[keys[s] >> kSampleShift & (kBins - 1)], 1u);
        if (k % kept.interval == 0) scratch->keys[k / kept.interval] = keys[s];
    }
    __syncthreads();
    for (int bin = threadIdx.x; bin < kBins; bin += kPruneThreads) {
        if (shared.histogram[bin] > 0) atomicAdd(&scratch->sampled[bin], shared.histogram[bin]);
    }
    if (!last_block(&scratch->counts.sampled_blocks, shared.find_bin)) return;

    PruneBracket bracket{~0u, ~0u >> 1, 0, false, 0u};
    if (sample.low >= 1) {
        const auto rank = static_cast<unsigned>(sample.low);
        const unsigned bin = find_bin<kBins>(scratch->sampled, rank, shared.find_bin).bin;
        bracket.before = (bin << kSampleShift) - 1;
    }
    if (sample.high <= size) {
        const auto rank = static_cast<unsigned>(sample.high);
        const unsigned bin = find_bin<kBins>(scratch->sampled, rank, shared.find_bin).bin;
        bracket.last = ((bin + 1) << kSampleShift) - 1;
    }
    while ((bracket.last - bracket.before - 1) >> bracket.shift >= kBins) ++bracket.shift;
    bracket.crowded = find_crowd(scratch, sample.bits, bracket, shared, &bracket.crowd);
    if (threadIdx.x == 0) scratch->bracket = bracket;
}

namespace {

__device__ __forceinline__ PruneCandidate make_candidate(unsigned key, unsigned index) {
    return static_cast<PruneCandidate>(key) << 32 | index;
}

__device__ __forceinline__ unsigned bin_of(const PruneBracket& bracket, PruneCandidate candidate) {
    const unsigned key = static_cast<unsigned>(candidate >> 32);
    // The mask is for negative importances only: they give no order, but must not write elsewhere.
    return (key - bracket.before - 1) >> bracket.shift & (kBins - 1);
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
__device__ void find_among_candidates(const PruneLayer& layer, unsigned n_prune,
                                      const PruneCandidates& candidates, PruneScratch* scratch,
                                      unsigned* shared) {
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

}  // namespace

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

namespace {

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

}  // namespace

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

__global__ void prune_keep_all(int64_t rows, int64_t cols, uint8_t* bitmap) {
    const int64_t row_bytes = padded_columns(cols) / 8;
    const int64_t byte = static_cast<int64_t>(blockIdx.x) * kPruneThreads + threadIdx.x;
    if (byte >= rows * row_bytes) return;
    const int64_t left = cols - byte % row_bytes * 8;
    bitmap[byte] = static_cast<uint8_t>(left >= 8 ? 0xff : left <= 0 ? 0 : (1 << left) - 1);
}

namespace {

unsigned finish_blocks() {
    return static_cast<unsigned>(kFinishBlocks * device_limits().multiprocessors);
}

int64_t most_candidates(int64_t numel) {
    return std::min(numel, numel / kWeightsPerCandidate + kLeastCandidates);
}

int64_t bitmap_words(int64_t cols) {
    return bitmap_row_bytes(cols) / static_cast<int64_t>(sizeof(unsigned));
}

PruneSample make_sample(int64_t numel, int64_t n_prune) {
    int bits = 0;
    while (bits < kMostSampleBits && int64_t{2} << bits <= numel) ++bits;
    const double size = static_cast<double>(int64_t{1} << bits);
    const double share = static_cast<double>(n_prune) / static_cast<double>(numel);
    const double spread = 1 + kSampleDeviations * std::sqrt(size * share * (1 - share));
    return {bits, static_cast<int64_t>(std::floor(size * share - spread)),
            static_cast<int64_t>(std::ceil(size * share + spread))};
}

}  // namespace

int64_t prune_select_workspace(const float*, const float*, int64_t rows, int64_t cols, int64_t,
                               uint8_t*) {
    return static_cast<int64_t>(sizeof(PruneScratch)) +
           most_candidates(rows * cols) * static_cast<int64_t>(sizeof(PruneCandidate)) +
           static_cast<int64_t>(sizeof(unsigned)) *
               (finish_blocks() + rows + rows * bitmap_words(cols));
}

Status prune_select(const float* w, const float* h, int64_t rows, int64_t cols, int64_t n_prune,
                    uint8_t* bitmap, void* workspace, Stream stream) {
    if (!valid_layer(rows, cols) || n_prune < 0 || n_prune > rows * cols) {
        return Status::invalid_argument;
    }
    if (n_prune == 0) {
        return launch(prune_keep_all, blocks_for(rows * bitmap_row_bytes(cols), kPruneThreads),
                      kPruneThreads, 0, stream, rows, cols, bitmap);
    }
    const int64_t numel = rows * cols;
    const PruneLayer layer{w, h, rows, cols};
    const unsigned count = static_cast<unsigned>(n_prune);
    const PruneSample sample = make_sample(numel, n_prune);
    PruneScratch* scratch = static_cast<PruneScratch*>(workspace);
    const PruneCandidates candidates{reinterpret_cast<PruneCandidate*>(scratch + 1),
                                     static_cast<unsigned>(most_candidates(numel))};
    unsigned* ties = reinterpret_cast<unsigned*>(candidates.list + candidates.capacity);
    unsigned* const of_rows = ties + finish_blocks();
    const PruneCrowd crowd{of_rows + rows, of_rows};
    unsigned* words = reinterpret_cast<unsigned*>(bitmap);
    const auto split = read_in_fours(layer) ? prune_split<true> : prune_split<false>;
    return in_order(
        [&] { return clear(scratch, offsetof(PruneScratch, bracket), stream); },
        [&] {
            return launch(
                prune_sample, blocks_for(int64_t{1} << sample.bits, kPruneThreads * kSampleEach),
                kPruneThreads, sizeof(SampleShared), stream, layer, sample, scratch, crowd);
        },
        [&] {
            return launch(split, blocks_for(units_of(layer), kUnitsPerWarp * kPruneWarps),
                          kPruneThreads, sizeof(SplitShared), stream, layer, count, scratch,
                          candidates, words, crowd);
        },
        [&] {
            return launch_together(prune_finish, finish_blocks(), kPruneThreads,
                                   sizeof(FinishShared), stream, layer, count, scratch, candidates,
                                   ties, words, crowd);
        });
}

}  // namespace nowag::cuda
