#include <algorithm>
#include <cmath>
#include <cstddef>

#include "cuda/base/launch.h"
#include "cuda/base/launchers.h"
#include "cuda/prune/prune_select.cuh"

namespace nowag::cuda {

__global__ void prune_sample(PruneLayer layer, PruneSample sample, PruneScratch* scratch) {
    unsigned* shared = reinterpret_cast<unsigned*>(shared_memory());
    const uint64_t k = static_cast<uint64_t>(blockIdx.x) * kPruneThreads + threadIdx.x;
    if (k >> sample.bits == 0) {
        const uint64_t numel = static_cast<uint64_t>(layer.rows * layer.cols);
        const uint64_t index = sample_index(k, numel, sample.bits);
        const uint64_t j = index % static_cast<uint64_t>(layer.cols);
        const unsigned key = saliency_bits(layer.w[index], layer.h[j]);
        atomicAdd(&scratch->sampled[key >> kSampleShift & (kBins - 1)], 1u);
    }
    if (!last_block(&scratch->counts.sampled_blocks, shared)) return;
    PruneBracket bracket{~0u, ~0u >> 1, 0};
    if (sample.low >= 1) {
        const auto rank = static_cast<unsigned>(sample.low);
        const unsigned bin = find_bin<kBins>(scratch->sampled, rank, shared).bin;
        bracket.before = (bin << kSampleShift) - 1;
    }
    if (sample.high <= int64_t{1} << sample.bits) {
        const auto rank = static_cast<unsigned>(sample.high);
        const unsigned bin = find_bin<kBins>(scratch->sampled, rank, shared).bin;
        bracket.last = ((bin + 1) << kSampleShift) - 1;
    }
    while ((bracket.last - bracket.before - 1) >> bracket.shift >= kBins) ++bracket.shift;
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

// What a lane takes of a unit of prune_split: 4 columns of the unit's rows.
struct SplitPart {
    int64_t first;        // row of the layer
    int64_t strip;        // of kSplitColumns columns
    int64_t j;            // the lane's first column
    int rows;             // that the layer has here
    int columns;          // of the lane's 4, not positive past the row's end
    const float* corner;  // weight (first, j)

    // across: units side by side in a row of the layer.
    __device__ __forceinline__ SplitPart(const PruneLayer& layer, unsigned unit, unsigned across)
        : first(static_cast<int64_t>(unit / across) * kSplitRows),
          strip(unit % across),
          j(strip * kSplitColumns + 4 * lane_of_thread()),
          rows(at_most(layer.rows - first, kSplitRows)),
          columns(at_most(layer.cols - j, 4)),
          corner(layer.w + (first * layer.cols + j)) {}
};

// Of a lane's weights those beyond the bracket and those inside. Bit 4 r + c stands for row r and
// column c.
struct SplitBits {
    unsigned above;
    unsigned undecided;
};

// Reads a lane's weights, all rows before the first is looked at, and compares their keys. A
// comparison is the sign of a difference, shifted in from the right, the last weight first.
template <bool kVector>
__device__ __forceinline__ SplitBits compare_part(const PruneLayer& layer, const SplitPart& part,
                                                  const PruneBracket& bracket) {
    float4 w[kSplitRows];
    const float* row = part.corner;
#pragma unroll
    for (int r = 0; r < kSplitRows; ++r, row += layer.cols) {
        w[r] = load_four<kVector>(row, r < part.rows ? part.columns : 0);
    }
    const float4 h = load_four<kVector>(layer.h + part.j, part.columns);
    unsigned above = 0, reached = 0;
#pragma unroll
    for (int r = kSplitRows - 1; r >= 0; --r) {
        const unsigned keys[] = {saliency_bits(w[r].x, h.x), saliency_bits(w[r].y, h.y),
                                 saliency_bits(w[r].z, h.z), saliency_bits(w[r].w, h.w)};
#pragma unroll
        for (int c = 3; c >= 0; --c) {
            above = __funnelshift_l(bracket.last - keys[c], above, 1);
            reached = __funnelshift_l(bracket.before - keys[c], reached, 1);
        }
    }
    unsigned present = 0;
    if (part.columns > 0) {
        present = 0x11111111u * (0xfu >> (4 - part.columns)) & ~0u >> 4 * (kSplitRows - part.rows);
    }
    above &= present;
    return {above, reached & present & ~above};
}

// Writes the unit's bits of the bitmap, whose rows have `words` words; those of the undecided are
// 0. Returns how many a lane has set.
__device__ __forceinline__ unsigned write_part(const SplitPart& part, unsigned above, int64_t words,
                                               unsigned* bitmap) {
    const int lane = lane_of_thread();
    const unsigned word = transpose_nibbles(above);
    const int64_t place = part.strip * (kSplitColumns / 32) + lane / kSplitRows;
    if (lane % kSplitRows < part.rows && place < words) {
        bitmap[(part.first + lane % kSplitRows) * words + place] = word;
    }
    return static_cast<unsigned>(__popc(word));
}

// Gathers a lane's undecided weights in shared memory, those beyond its room in the list.
__device__ __forceinline__ void stage_part(const PruneLayer& layer, const SplitPart& part,
                                           unsigned undecided, const PruneBracket& bracket,
                                           const PruneCandidates& candidates, PruneScratch* scratch,
                                           SplitShared& shared) {
    const unsigned index = static_cast<unsigned>(part.first * layer.cols + part.j);
    unsigned slot = 0;
    if (undecided != 0) {
        slot = atomicAdd(&shared.count, static_cast<unsigned>(__popc(undecided)));
    }
    for (; undecided != 0; undecided &= undecided - 1, ++slot) {
        const unsigned bit = static_cast<unsigned>(__ffs(static_cast<int>(undecided))) - 1;
        const unsigned offset = bit / 4 * static_cast<unsigned>(layer.cols) + bit % 4;
        const unsigned key = saliency_bits(part.corner[offset], layer.h[part.j + bit % 4]);
        const PruneCandidate candidate = make_candidate(key, index + offset);
        if (slot < kStaged) {
            shared.staged[slot] = candidate;
        } else {
            list_candidate(candidate, atomicAdd(&scratch->counts.candidates, 1u), bracket,
                           candidates, scratch);
        }
    }
}

// Appends what the block has staged to the list, and adds what it has kept to the grid's count.
// kept: of this thread.
__device__ __forceinline__ void append_staged(unsigned kept, const PruneBracket& bracket,
                                              const PruneCandidates& candidates,
                                              PruneScratch* scratch, SplitShared& shared) {
    kept = __reduce_add_sync(kFullWarp, kept);
    if (lane_of_thread() == 0) atomicAdd(&shared.kept, kept);
    __syncthreads();
    const unsigned staged = shared.count < kStaged ? shared.count : kStaged;
    if (threadIdx.x == 0) {
        shared.first = atomicAdd(&scratch->counts.candidates, staged);
        atomicAdd(&scratch->counts.kept, shared.kept);
    }
    __syncthreads();
    for (unsigned c = threadIdx.x; c < staged; c += kPruneThreads) {
        list_candidate(shared.staged[c], shared.first + c, bracket, candidates, scratch);
    }
}

// Looks for the threshold among the candidates, if it is one of them and they are all listed.
__device__ void find_among_candidates(const PruneLayer& layer, unsigned n_prune,
                                      const PruneCandidates& candidates, PruneScratch* scratch,
                                      unsigned* shared) {
    const PruneCounts& counts = scratch->counts;
    const unsigned count = counts.candidates;
    const unsigned below = static_cast<unsigned>(layer.rows * layer.cols) - counts.kept - count;
    PruneBin threshold{0u, 0u, 0u};
    if (below < n_prune && n_prune - below <= count && count <= candidates.capacity) {
        threshold = find_bin<kBins>(scratch->bracketed, n_prune - below, shared);
        if (threshold.count > kMostTied) threshold.rank = 0;
    }
    if (threadIdx.x == 0) scratch->threshold = threshold;
}

}  // namespace

template <bool kVector>
__global__ void __launch_bounds__(kPruneThreads, 4)
    prune_split(PruneLayer layer, unsigned n_prune, PruneScratch* scratch,
                PruneCandidates candidates, unsigned* bitmap) {
    SplitShared& shared = *reinterpret_cast<SplitShared*>(shared_memory());
    if (threadIdx.x == 0) shared.count = shared.kept = 0;
    __syncthreads();
    const PruneBracket bracket = scratch->bracket;
    const int64_t words = padded_columns(layer.cols) / 32;
    const unsigned across = static_cast<unsigned>((layer.cols + kSplitColumns - 1) / kSplitColumns);
    const unsigned down = static_cast<unsigned>((layer.rows + kSplitRows - 1) / kSplitRows);
    unsigned kept = 0;
    for (int u = 0; u < kUnitsPerWarp; ++u) {
        const unsigned unit = (blockIdx.x * kUnitsPerWarp + u) * kPruneWarps + warp_of_thread();
        if (unit >= across * down) break;
        const SplitPart part(layer, unit, across);
        const SplitBits bits = compare_part<kVector>(layer, part, bracket);
        kept += write_part(part, bits.above, words, bitmap);
        stage_part(layer, part, bits.undecided, bracket, candidates, scratch, shared);
    }
    append_staged(kept, bracket, candidates, scratch, shared);
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

    // Decides the candidates, given that the threshold is one of them.
    __device__ void from_candidates(const PruneCandidate* list) {
        const PruneBracket bracket = scratch->bracket;
        const PruneBin threshold = scratch->threshold;
        const unsigned count = scratch->counts.candidates;
        const unsigned thread = blockIdx.x * kPruneThreads + threadIdx.x;
        const unsigned threads = gridDim.x * kPruneThreads;
        for (int64_t c = thread; c < count; c += threads) {
            const PruneCandidate candidate = list[c];
            const unsigned bin = bin_of(bracket, candidate);
            if (bin > threshold.bin) keep(candidate);
            if (bin == threshold.bin) {
                scratch->tied[atomicAdd(&scratch->counts.tied, 1u)] = candidate;
            }
        }
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
    template <typename Body>
    __device__ void for_rows(Body&& body) {
        const int64_t each = (layer.rows + gridDim.x - 1) / gridDim.x;
        const int64_t begin = blockIdx.x * each;
        const int64_t end = begin + each < layer.rows ? begin + each : layer.rows;
        for (int64_t i = begin; i < end; ++i) body(i);
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
                 PruneCandidates candidates, unsigned* ties, unsigned* bitmap) {
    Finish finish{layer, scratch, bitmap, *reinterpret_cast<FinishShared*>(shared_memory())};
    if (scratch->threshold.rank > 0) {
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

PruneSample make_sample(int64_t numel, int64_t n_prune) {
    int bits = 0;
    while (bits < kMostSampleBits && int64_t{2} << bits <= numel) ++bits;
    const double size = static_cast<double>(int64_t{1} << bits);
    const double share = static_cast<double>(n_prune) / static_cast<double>(numel);
    const double spread = 1 + kSampleDeviations * std::sqrt(size * share * (1 - share));
    return {bits, static_cast<int64_t>(std::floor(size * share - spread)),
            static_cast<int64_t>(std::ceil(size * share + spread))};
}

bool aligned(const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % alignof(float4) == 0;
}

}  // namespace

int64_t prune_select_workspace(const float*, const float*, int64_t rows, int64_t cols, int64_t,
                               uint8_t*) {
    return static_cast<int64_t>(sizeof(PruneScratch)) +
           most_candidates(rows * cols) * static_cast<int64_t>(sizeof(PruneCandidate)) +
           finish_blocks() * static_cast<int64_t>(sizeof(unsigned));
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
    unsigned* words = reinterpret_cast<unsigned*>(bitmap);
    const auto split =
        cols % 4 == 0 && aligned(w) && aligned(h) ? prune_split<true> : prune_split<false>;
    const int64_t units = ceil_div(rows, kSplitRows) * ceil_div(cols, kSplitColumns);
    return in_order(
        [&] { return clear(scratch, offsetof(PruneScratch, bracket), stream); },
        [&] {
            return launch(prune_sample, blocks_for(int64_t{1} << sample.bits, kPruneThreads),
                          kPruneThreads, sizeof(unsigned) * kFindBinShared, stream, layer, sample,
                          scratch);
        },
        [&] {
            return launch(split, blocks_for(units, kUnitsPerWarp * kPruneWarps), kPruneThreads,
                          sizeof(SplitShared), stream, layer, count, scratch, candidates, words);
        },
        [&] {
            return launch_together(prune_finish, finish_blocks(), kPruneThreads,
                                   sizeof(FinishShared), stream, layer, count, scratch, candidates,
                                   ties, words);
        });
}

}  // namespace nowag::cuda
