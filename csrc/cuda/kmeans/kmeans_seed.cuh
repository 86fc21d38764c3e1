// Greedy k-means++ (kmeans.h) on a GPU.
//
// Entries are chosen one after another, so one kernel stays on the device for all of them. Each of
// its blocks keeps a stretch of the sample, each of its warps a stretch of that, and in a round, an
// entry, they exchange two messages:
//   every block: how much q its stretch would have left with each candidate
//   every block hears that of all blocks, so all know the best candidate, which is the next entry,
//            and draw the same numbers. Who has the drawn points in its share of the running sum of
//            q says where they are: the next candidates.
// A message is one 64-bit word, written and read whole, that carries the number of its round beside
// the value. So nothing else that a block writes has to be seen by others, and there is no barrier
// and no fence: those would throw out of the first-level cache what a block reads in every round.
// Nobody overwrites a word that another has yet to read:
//   candidates   of the next round are said by who has heard all sums of this one, and a block says
//                its sums after it has heard the candidates
//   sums         have two places, for even and odd rounds: a block says those of round k + 2 after
//                it has heard all of round k + 1, said by blocks that had heard all of round k
// Predicted for an H100 at K = 4096, d = 6, 69632 points: 2.1 us an entry, 8.6 ms. A message takes
// 0.35, a store to the second-level cache and a load from there; the rest are about 2500 clocks:
// 1000 to score 17 warps of points (200 instructions a warp, 5 warps a scheduler), 350 to add them
// up, 300 to add up the blocks, 500 to find a point, and four barriers of a block. It took 7.8 us
// with two barriers of the grid: each fences twice, and the fence empties the first-level cache
// (CCTL.IVALL), so that all of a block's points came from the second-level one, twice an entry.
#pragma once

#include "cuda/kmeans/kmeans_sample.cuh"

namespace nowag::cuda {

constexpr int kCandidates = kKmeansCandidates;
constexpr int kMaxSeedBlocks = 160;           // five words to hear for each lane
constexpr int kMaxSeedWarps = 20;             // of a block: 96 registers a thread
constexpr int64_t kSeedPointsPerBlock = 512;  // fewer would only make more messages
constexpr int kDistanceBits = 40;             // of the largest q after the first entry
constexpr int kSeedRoundBits = 4;             // of a round's number beside a sum
constexpr unsigned kSeedRoundMask = (1u << kSeedRoundBits) - 1;

// A q has kDistanceBits + 1 bits at most.
static_assert((kmeans_sample_size(int64_t{1} << kMaxCodeBits) << (kDistanceBits + 1)) <=
                  int64_t{1} << (63 - kSeedRoundBits),
              "a sum of q and the number of a round fit into a word");

// The sample, coordinate by coordinate: x and h [d, size]. nearest [kCandidates + 1, size]: the
// distance to the nearest entry, and what it would be with each candidate.
struct SeedSample {
    float* x;
    float* h;
    float* nearest;
    int size;
};

// What the blocks tell each other; all zero at the start, which no round's words are.
struct SeedBoard {
    unsigned arrived;
    unsigned largest;  // bits of the largest distance to the first entry
    // The bits of a coordinate below the round's number.
    unsigned long long candidates[kCandidates][kMaxSubvector];
    // For even and odd rounds: the sum above the round's number.
    unsigned long long left[2][kCandidates][kMaxSeedBlocks];
};

// A block's shared memory.
struct SeedShared {
    unsigned long long warps[kCandidates][kMaxSeedWarps];  // what each would have left
    // With each candidate as the next entry: the sum over the blocks before this one, over all;
    // where in it the draws fall, and whether one of them falls on this block.
    unsigned long long before[kCandidates], total[kCandidates];
    unsigned long long targets[kCandidates][kCandidates];
    bool drawn_here[kCandidates];
    float candidates[kCandidates][kMaxSubvector];
};

// round(value * scale), a power of two, to nearest even: beside 2^52 there is no room for a
// fraction. What is not finite gives some number too, of no more bits: all blocks find the drawn
// point of any sample.
__device__ __forceinline__ unsigned long long quantized_distance(float value, double scale) {
    const double sum = fma(static_cast<double>(value), scale, 0x1p52);
    constexpr unsigned long long kMask = (2ull << kDistanceBits) - 1;
    return static_cast<unsigned long long>(__double_as_longlong(sum)) & kMask;
}

// The sums of four values over the warp, value v to lanes 8 v to 8 v + 7: halves of the warp swap
// what the other is to add up, so that it takes 6 shuffles instead of 20.
__device__ __forceinline__ unsigned long long four_warp_sums(
    const unsigned long long (&values)[kCandidates]) {
    static_assert(kCandidates == 4, "two halvings");
    const bool upper = lane_of_thread() & 16, odd = lane_of_thread() & 8;
    unsigned long long half[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const unsigned long long give = upper ? values[i] : values[2 + i];
        half[i] = (upper ? values[2 + i] : values[i]) + __shfl_xor_sync(kFullWarp, give, 16);
    }
    const unsigned long long give = odd ? half[0] : half[1];
    unsigned long long sum = (odd ? half[1] : half[0]) + __shfl_xor_sync(kFullWarp, give, 8);
    for (int flip = 4; flip > 0; flip /= 2) sum += __shfl_xor_sync(kFullWarp, sum, flip);
    return sum;
}

// A block's stretch of the sample and what it does with it. A thread reads and writes `nearest` of
// its own points alone.
template <int kD>
struct SeedBlock {
    SeedSample sample;
    int begin, end;  // of this warp's stretch
    SeedShared& shared;
    SeedBoard* board;
    int current = 0;  // row of sample.nearest

    __device__ float* nearest_now() const { return sample.nearest + current * sample.size; }

    __device__ float* nearest_with(int candidate) const {
        return sample.nearest + (current + 1 + candidate) % (kCandidates + 1) * sample.size;
    }

    __device__ void read_point(int i, float (&x)[kD], float (&h)[kD]) const {
#pragma unroll
        for (int j = 0; j < kD; ++j) {
            x[j] = sample.x[j * sample.size + i];
            h[j] = sample.h[j * sample.size + i];
        }
    }

    static __device__ float distance(const float (&x)[kD], const float (&h)[kD],
                                     const float* entry) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kD; ++j) {
            const float t = x[j] - entry[j];
            sum = fused(h[j] * t, t, sum);
        }
        return sum;
    }

    // Distances to the first entry, which is also the only candidate.
    __device__ void start(int first) {
        if (threadIdx.x < kCandidates * kD) {
            const int candidate = threadIdx.x / kD, j = threadIdx.x % kD;
            shared.candidates[candidate][j] = sample.x[j * sample.size + first];
        }
        __syncthreads();
        float largest = 0.0f;
        for (int i = begin + lane_of_thread(); i < end; i += kWarpSize) {
            float x[kD], h[kD];
            read_point(i, x, h);
            const float far = distance(x, h, shared.candidates[0]);
            nearest_now()[i] = far;
            largest = fmaxf(largest, far);
        }
        raise_to_warp(&board->largest, largest);
    }

    // What would be left of q over this warp's stretch with each candidate.
    __device__ void consider(double scale) {
        unsigned long long left[kCandidates] = {};
        for (int i = begin + lane_of_thread(); i < end; i += kWarpSize) {
            float x[kD], h[kD];
            read_point(i, x, h);
            const float nearest = nearest_now()[i];
#pragma unroll
            for (int c = 0; c < kCandidates; ++c) {
                const float far = fminf(distance(x, h, shared.candidates[c]), nearest);
                nearest_with(c)[i] = far;
                left[c] += quantized_distance(far, scale);
            }
        }
        const unsigned long long sum = four_warp_sums(left);
        const int lane = lane_of_thread();
        if (lane % 8 == 0) shared.warps[lane / 8][warp_of_thread()] = sum;
        __syncthreads();
    }

    // Says what this block would have left with a candidate, and hears what all would; draws the
    // next ones in case it becomes the entry. A warp a candidate.
    __device__ void exchange(int candidate, unsigned round, uint64_t random) {
        constexpr int kEach = kMaxSeedBlocks / kWarpSize;
        const int lane = lane_of_thread(), warps = blockDim.x / kWarpSize;
        unsigned long long* words = board->left[round % 2][candidate];
        const unsigned number = round & kSeedRoundMask;
        const unsigned long long own = warp_sum(lane < warps ? shared.warps[candidate][lane] : 0u);
        if (lane == 0) tell(words + blockIdx.x, own << kSeedRoundBits | number);
        unsigned long long left[kEach], before = 0, total = 0;
        for (bool heard = false; !heard;) {
            heard = true;
            // All on their way before the first is needed.
#pragma unroll
            for (int e = 0; e < kEach; ++e) {
                const unsigned block = e * kWarpSize + lane;
                left[e] = block < gridDim.x ? hear(words + block) : number;
            }
#pragma unroll
            for (int e = 0; e < kEach; ++e) heard &= (left[e] & kSeedRoundMask) == number;
            if (!heard) spin_pause();
        }
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
            const unsigned block = e * kWarpSize + lane;
            before += block < blockIdx.x ? left[e] >> kSeedRoundBits : 0u;
            total += left[e] >> kSeedRoundBits;
        }
        before = warp_sum(before);
        total = warp_sum(total);
        const unsigned long long target = product_high(random, total);
        const bool here = before <= target && target < before + own;
        if (lane < kCandidates) shared.targets[candidate][lane] = target;
        const bool drawn_here = __any_sync(kFullWarp, lane < kCandidates && here);
        if (lane > 0) return;
        shared.before[candidate] = before;
        shared.total[candidate] = total;
        shared.drawn_here[candidate] = drawn_here;
    }

    __device__ int best_candidate() const {
        int best = 0;
        for (int c = 1; c < kCandidates; ++c) {
            if (shared.total[c] < shared.total[best]) best = c;
        }
        return best;
    }

    __device__ void say_candidate(int candidate, int i, unsigned round) const {
        float x[kD];
#pragma unroll
        for (int j = 0; j < kD; ++j) x[j] = sample.x[j * sample.size + i];
#pragma unroll
        for (int j = 0; j < kD; ++j) {
            tell(&board->candidates[candidate][j],
                 static_cast<unsigned long long>(round) << 32 | __float_as_uint(x[j]));
        }
    }

    // Says which points of this warp are the next candidates: those in whose share of the running
    // sum of q, with the entry that was candidate `best`, the targets lie.
    __device__ void find_drawn(int best, double scale, unsigned next_round) const {
        const int lane = lane_of_thread(), warp = warp_of_thread();
        unsigned long long passed =
            shared.before[best] + warp_sum(lane < warp ? shared.warps[best][lane] : 0u);
        const unsigned long long reached = passed + shared.warps[best][warp];
        bool drawn_here = false;
        for (int c = 0; c < kCandidates; ++c) {
            const unsigned long long target = shared.targets[best][c];
            drawn_here |= passed <= target && target < reached;
        }
        if (!drawn_here) return;
        for (int first = begin; first < end; first += kWarpSize) {
            const int i = first + lane;
            const unsigned long long q =
                i < end ? quantized_distance(nearest_with(best)[i], scale) : 0u;
            const unsigned long long upto = passed + warp_scan(q);
            for (int c = 0; c < kCandidates; ++c) {
                const unsigned long long target = shared.targets[best][c];
                if (upto - q <= target && target < upto) say_candidate(c, i, next_round);
            }
            passed = __shfl_sync(kFullWarp, upto, kWarpSize - 1);
        }
    }

    __device__ void hear_candidates(unsigned round) {
        if (threadIdx.x < kCandidates * kD) {
            const int candidate = threadIdx.x / kD, j = threadIdx.x % kD;
            unsigned long long word = hear(&board->candidates[candidate][j]);
            while (word >> 32 != round) {
                spin_pause();
                word = hear(&board->candidates[candidate][j]);
            }
            shared.candidates[candidate][j] = __uint_as_float(static_cast<unsigned>(word));
        }
        __syncthreads();
    }
};

// Entries [from, entries), once every point of the sample is an entry: any points.
template <int kD>
__device__ __forceinline__ void draw_uniformly(const SeedSample& sample, int64_t from,
                                               int64_t entries, const SeedRandom& random,
                                               int64_t drawn, float* codebook) {
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t k = from + thread; k < entries; k += threads) {
        const int64_t index = static_cast<int64_t>(
            random.below(drawn + k - from, static_cast<uint64_t>(sample.size)));
#pragma unroll
        for (int j = 0; j < kD; ++j) codebook[k * kD + j] = sample.x[j * sample.size + index];
    }
}

// k-means++ on the sample.
//   kD        d
//   sample    x and h in, nearest worked with
//   entries   K
//   drawn     how many random numbers have been used to draw the sample
//   board     zero at the start
//   codebook  out, [K, kD]
// Launched cooperatively: blocks wait for each other's messages. A block: a stretch of the sample,
// an equal share; from kCandidates to kMaxSeedWarps warps. Shared memory: SeedShared.
template <int kD>
__global__ void __launch_bounds__(kMaxSeedWarps* kWarpSize, 1)
    kmeans_plus_plus(SeedSample sample, int64_t entries, SeedRandom random, int64_t drawn,
                     SeedBoard* board, float* __restrict__ codebook) {
    const auto part = [](int whole_begin, int whole_end, int each, int index) {
        const int begin = whole_begin + index * each;
        return begin < whole_end ? begin : whole_end;
    };
    const int warp = warp_of_thread(), warps = blockDim.x / kWarpSize;
    const int blocks = gridDim.x;
    const int share = (sample.size + blocks - 1) / blocks;
    const int each = (share + warps - 1) / warps;
    const int block_begin = part(0, sample.size, share, blockIdx.x);
    const int block_end = part(block_begin, sample.size, share, 1);
    SeedBlock<kD> block{sample, part(block_begin, block_end, each, warp),
                        part(block_begin, block_end, each, warp + 1),
                        *reinterpret_cast<SeedShared*>(shared_memory()), board};
    block.start(static_cast<int>(random.below(drawn++, static_cast<uint64_t>(sample.size))));
    grid_barrier(&board->arrived, 1);
    const double scale = scale_to_bits(&board->largest, kDistanceBits);
    for (int64_t k = 0; k < entries; ++k) {
        const unsigned round = static_cast<unsigned>(k) + 1;
        block.consider(scale);
        if (warp < kCandidates)
            block.exchange(warp, round, random.number(drawn + lane_of_thread()));
        __syncthreads();
        const int best = block.best_candidate();
        if (blockIdx.x == 0 && threadIdx.x < kD) {
            codebook[k * kD + threadIdx.x] = block.shared.candidates[best][threadIdx.x];
        }
        if (k + 1 == entries) return;
        if (block.shared.total[best] == 0) {
            draw_uniformly<kD>(sample, k + 1, entries, random, drawn, codebook);
            return;
        }
        drawn += kCandidates;
        if (block.shared.drawn_here[best]) block.find_drawn(best, scale, round + 1);
        block.current = (block.current + 1 + best) % (kCandidates + 1);
        __syncwarp();  // the first warp has read the entry
        block.hear_candidates(round + 1);
    }
}

}  // namespace nowag::cuda
