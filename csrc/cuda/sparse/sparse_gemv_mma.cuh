// sparse_gemv.h on a GPU with tensor cores, where x and the values have the same 16-bit type: up to
// 8 tokens (an octet) take the time of one.
//
// Kept values are put back between their zeros in registers, as the first operand of mma; the
// second is x as it lies in memory.
//
//   block: 16 rows, all columns; 16 warps take runs of steps of 64 columns, whose sums meet in
//          shared memory. Where a warp's values begin in each row the block counts first.
//   step:  with g = lane / 4 and t = lane % 4 a lane has columns 16 t to 16 t + 15 of rows g and
//          g + 8. In product i of four those are columns 16 t + 4 i to 16 t + 4 i + 3: rows 2 t,
//          2 t + 1, 2 t + 8 and 2 t + 9 of the second operand.
//
// Unstructured: a warp's values of a step go through shared memory, those of the next are on their
// way meanwhile; a lane goes through its columns and takes the next value for each that is kept.
// For 32 columns of a row that is 9 instructions, 2.3 cycles of a multiprocessor, and at half
// kept 2.2 wavefronts of shared memory (expected conflicts of banks). 2:4: if all 16 rows keep two
// of every four columns, values lie where they are needed: a lane's 8 are one load, 3 instructions
// for 32 columns.
//
// Measured on an H100, one token: half kept of 11008 x 4096 takes 41 us, with L1 at 82 % and a
// third of the wavefronts of shared memory conflicts of banks: that bounds it. 2:4 reads at 62 to
// 75 % of a copy's rate.
//
// Error: the products of a step go through four mma, less than 2.7e-6 of their absolute sum
// (vq_gemv_mma.cuh), then through one float32 addition a step of the warp and 15 more.
#pragma once

#include "cuda/sparse/sparse_gemv.cuh"

namespace nowag::cuda {

constexpr int kSparseMmaThreads = 512;
constexpr int kSparseMmaWarps = kSparseMmaThreads / kWarpSize;
constexpr int kSparseMmaRows = 16;
constexpr int kSparseStep = kBitmapAlign;                  // columns
constexpr int kSparseOctet = 8;                            // tokens
constexpr int64_t kSparseMmaMaxCols = 1 << 16;             // sums stay short
constexpr int kStepLane = kSparseStep / 4;                 // columns of a lane in a row
constexpr int kStepProducts = kStepLane / 4;               // mma of a step and octet
constexpr int kValueChunk = 8;                             // values of a copy
constexpr int kRowChunks = kSparseStep / kValueChunk + 1;  // of a step: it may begin within one
constexpr unsigned kStageRow = kRowChunks * sizeof(uint4);
constexpr unsigned kLaterRow = 8 * kStageRow;  // from row g to row g + 8
constexpr unsigned kStageBytes = kSparseMmaRows * kStageRow;
constexpr unsigned kOtherStage = kSparseMmaWarps * kStageBytes;
constexpr size_t kSparseMmaShared = 2 * kOtherStage;

// The lane's columns of rows g and g + 8 in a step.
struct StepBits {
    unsigned bits[2];

    // Values of the step before the lane's, and of the whole step.
    __device__ __forceinline__ void count(int (&before)[2], int (&total)[2]) const {
        const int t = threadIdx.x % 4;
        const unsigned own = __popc(bits[0]) | static_cast<unsigned>(__popc(bits[1])) << 16;
        unsigned sum = own;
#pragma unroll
        for (int delta = 1; delta < 4; delta *= 2) {
            const unsigned other = __shfl_up_sync(kFullWarp, sum, delta, 4);
            if (t >= delta) sum += other;
        }
        const unsigned all = __shfl_sync(kFullWarp, sum, 3, 4);
        sum -= own;
        before[0] = static_cast<int>(sum & 0xffffu), before[1] = static_cast<int>(sum >> 16);
        total[0] = static_cast<int>(all & 0xffffu), total[1] = static_cast<int>(all >> 16);
    }
};

// Whether each four of 32 columns keep two; from column `columns` on there are none.
__device__ __forceinline__ bool two_of_each_four(uint32_t bits, int columns) {
    uint32_t expected = 0x22222222u;
    if (columns < kWarpSize) expected &= columns <= 0 ? 0u : (1u << columns) - 1u;
    const uint32_t twos = bits - ((bits >> 1) & 0x55555555u);
    const uint32_t fours = (twos & 0x33333333u) + ((twos >> 2) & 0x33333333u);
    return fours == expected;
}

// Four columns of a row as the lane has them in the first operand, unstructured: the next value
// where a column is kept, else 0. `place` is where that stands.
__device__ __forceinline__ uint2 next_four(unsigned kept, SharedPlace& place) {
    uint32_t found[4] = {0u, 0u, 0u, 0u};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (!((kept >> i) & 1u)) continue;
        found[i] = load_16(place);
        place += sizeof(uint16_t);
    }
    return make_uint2(found[0] | found[1] << 16, found[2] | found[3] << 16);
}

// The same where two of the four are kept, whose values are a word.
__device__ __forceinline__ uint2 two_in_four(unsigned kept, uint32_t word) {
    uint32_t low = kept & 1u ? word : word << 16;
    if (!(kept & 2u)) low &= 0xffffu;
    uint32_t high = kept & 8u ? word : word >> 16;
    if (!(kept & 4u)) high &= 0xffff0000u;
    return make_uint2(low, high);
}

// A step's values of rows g and g + 8: where they begin among all `count` values, and how many.
struct StepValues {
    unsigned begin[2];
    int total[2];

    // Starts copying them to `stage`; a row's four lanes take chunks in turn.
    __device__ __forceinline__ void start(const uint16_t* values, unsigned count,
                                          unsigned char* stage) const {
        const int t = threadIdx.x % 4;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const unsigned first = begin[h] & ~(kValueChunk - 1u);
            const unsigned wanted = begin[h] + static_cast<unsigned>(total[h]);
            const unsigned end = wanted < count ? wanted : count;
            if (first + kRowChunks * kValueChunk <= count) {
#pragma unroll
                for (int i = 0; i < kRowChunks; i += 4) {
                    const unsigned chunk = first + (t + i) * kValueChunk;
                    if (t + i >= kRowChunks || chunk >= end) break;
                    start_copy(stage + h * kLaterRow + (t + i) * sizeof(uint4), values + chunk);
                }
            } else {  // a chunk may end beyond the last value
#pragma unroll 1
                for (unsigned i = begin[h] + t; i < end; i += 4) {
                    *reinterpret_cast<uint16_t*>(stage + h * kLaterRow +
                                                 (i - first) * sizeof(uint16_t)) = values[i];
                }
            }
        }
        commit_copies();
    }
};

// The lane's columns of one token's x in a step; what is absent is 0.
struct StepX {
    uint4 chunks[kStepLane / kValueChunk];

    __device__ __forceinline__ void load(const uint16_t* x, bool present, int columns) {
#pragma unroll
        for (int i = 0; i < kStepLane / kValueChunk; ++i) {
            chunks[i] = make_uint4(0u, 0u, 0u, 0u);
            if (!present || i * kValueChunk >= columns) continue;
            chunks[i] = *reinterpret_cast<const uint4*>(x + i * kValueChunk);
        }
    }

    // Columns 4 i to 4 i + 3.
    __device__ __forceinline__ uint2 product(int i) const {
        const uint4& chunk = chunks[i / 2];
        return i % 2 == 0 ? make_uint2(chunk.x, chunk.y) : make_uint2(chunk.z, chunk.w);
    }
};

// What a lane reads, and its warp's steps.
struct SparseLane {
    const uint16_t* values;
    unsigned count;        // of all values
    const uint16_t* bits;  // of row g
    const uint16_t* x;     // of token g
    int tokens;            // from token g on
    int cols;              // from the lane's first on
    bool present[2];       // rows g and g + 8
    int steps;
    int first_step;
    int end_step;

    __device__ __forceinline__ SparseLane(const SparseWeight& weight, const SparseActivations& io) {
        const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
        const int g = lane / 4, t = lane % 4;
        const int64_t row = static_cast<int64_t>(blockIdx.x) * kSparseMmaRows + g;
        steps = static_cast<int>(padded_columns(weight.cols) / kSparseStep);
        first_step = steps * warp / kSparseMmaWarps;
        end_step = steps * (warp + 1) / kSparseMmaWarps;
        values = static_cast<const uint16_t*>(weight.values);
        count = static_cast<unsigned>(weight.kept);
        bits = reinterpret_cast<const uint16_t*>(weight.bitmap) + row * steps * 4 + t;
        x = static_cast<const uint16_t*>(io.x) + g * weight.cols + t * kStepLane;
        tokens = io.tokens - g;
        cols = static_cast<int>(weight.cols) - t * kStepLane;
        present[0] = row < weight.rows, present[1] = row + 8 < weight.rows;
    }

    __device__ __forceinline__ StepBits bits_at(int step) const {
        StepBits found{};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (present[h] && step < end_step) found.bits[h] = bits[(h * 8 * steps + step) * 4];
        }
        return found;
    }

    __device__ __forceinline__ int columns_at(int step) const { return cols - step * kSparseStep; }

    template <int kOctets>
    __device__ __forceinline__ void load_x(int step, int64_t pitch,
                                           StepX (&loaded)[kOctets]) const {
#pragma unroll
        for (int o = 0; o < kOctets; ++o) {
            loaded[o].load(x + o * kSparseOctet * pitch + step * kSparseStep,
                           o * kSparseOctet < tokens, columns_at(step));
        }
    }
};

// Adds the products of a step to the sums; four(h, i) are columns 4 i to 4 i + 3 of row g + 8 h.
template <int kOctets, DType kType, typename Four>
__device__ __forceinline__ void multiply_step(const StepX (&x)[kOctets], Four&& four,
                                              MmaC (&total)[kOctets]) {
    MmaC sum[kOctets] = {};
#pragma unroll
    for (int i = 0; i < kStepProducts; ++i) {
        MmaA a;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint2 columns = four(h, i);
            a.x[h] = columns.x, a.x[2 + h] = columns.y;
        }
#pragma unroll
        for (int o = 0; o < kOctets; ++o) {
            const uint2 b = x[o].product(i);
            mma_16<kType>(a, b.x, b.y, sum[o]);
        }
    }
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
#pragma unroll
        for (int i = 0; i < 4; ++i) total[o].x[i] += sum[o].x[i];
    }
}

// `begin`: the lane's rows' first values among all. `stage`: place of the lane's row in its warp's
// first stage; the second is kOtherStage on.
template <int kOctets, DType kType>
__device__ __forceinline__ void multiply_unstructured(const SparseLane& lane, int64_t pitch,
                                                      const unsigned (&begin)[2],
                                                      unsigned char* memory, unsigned stage,
                                                      MmaC (&total)[kOctets]) {
    const unsigned both_stages = 2 * stage + kOtherStage;
    const SharedPlace shared = shared_place(memory);
    StepBits bits = lane.bits_at(lane.first_step), ahead = lane.bits_at(lane.first_step + 1);
    StepValues values{{begin[0], begin[1]}, {}};
    int before[2];
    bits.count(before, values.total);
    values.start(lane.values, lane.count, memory + stage);
    for (int step = lane.first_step; step < lane.end_step; ++step) {
        StepX x[kOctets];
        lane.load_x(step, pitch, x);
        SharedPlace place[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const unsigned first = values.begin[h] % kValueChunk + static_cast<unsigned>(before[h]);
            place[h] =
                shared + stage + h * kLaterRow + first * static_cast<unsigned>(sizeof(uint16_t));
            values.begin[h] += static_cast<unsigned>(values.total[h]);
        }
        const StepBits kept = bits;
        bits = ahead;
        ahead = lane.bits_at(step + 2);
        stage = both_stages - stage;
        bits.count(before, values.total);
        values.start(lane.values, lane.count, memory + stage);
        wait_for_copies<1>();
        __syncwarp();
        multiply_step<kOctets, kType>(
            x, [&](int h, int i) { return next_four(kept.bits[h] >> (4 * i), place[h]); }, total);
        __syncwarp();
    }
    // The copy begun last is of no use, but must not land where the warps are added up.
    wait_for_copies<0>();
}

// Both rows keep two of every four columns, and begin at multiples of a chunk: the lane's values of
// a step are one chunk of each.
template <int kOctets, DType kType>
__device__ __forceinline__ void multiply_2_of_4(const SparseLane& lane, int64_t pitch,
                                                const unsigned (&begin)[2],
                                                MmaC (&total)[kOctets]) {
    static_assert(kStepLane / 2 == kValueChunk, "a lane's half");
    const auto load = [&](int step, uint4(&chunks)[2]) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            chunks[h] = make_uint4(0u, 0u, 0u, 0u);
            if (!lane.present[h] || step >= lane.end_step || lane.columns_at(step) <= 0) continue;
            const unsigned first = begin[h] + (step - lane.first_step) * (kSparseStep / 2) +
                                   threadIdx.x % 4 * kValueChunk;
            chunks[h] = *reinterpret_cast<const uint4*>(lane.values + first);
        }
    };
    StepBits ahead = lane.bits_at(lane.first_step);
    uint4 chunks_ahead[2];
    load(lane.first_step, chunks_ahead);
    for (int step = lane.first_step; step < lane.end_step; ++step) {
        StepX x[kOctets];
        lane.load_x(step, pitch, x);
        const StepBits kept = ahead;
        const uint4 chunks[2] = {chunks_ahead[0], chunks_ahead[1]};
        ahead = lane.bits_at(step + 1);
        load(step + 1, chunks_ahead);
        multiply_step<kOctets, kType>(
            x,
            [&](int h, int i) {
                const uint4& four = chunks[h];
                const uint32_t word = i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w;
                return two_in_four(kept.bits[h] >> (4 * i), word);
            },
            total);
    }
}

// Adds up the warps' sums [warp][octet][row of 16][token of 8] and finishes the outputs.
template <int kOctets, DType kType>
__device__ __forceinline__ void finish_sparse_rows(const SparseWeight& weight,
                                                   const SparseActivations& io, const float* sums) {
    constexpr int kOutputs = kOctets * kSparseMmaRows * kSparseOctet;
    const int i = threadIdx.x;
    const int token = i / (kSparseMmaRows * kSparseOctet) * kSparseOctet + i % kSparseOctet;
    const int64_t row =
        static_cast<int64_t>(blockIdx.x) * kSparseMmaRows + i / kSparseOctet % kSparseMmaRows;
    if (i >= kOutputs || token >= io.tokens || row >= weight.rows) return;
    float sum = sums[i];
    for (int warp = 1; warp < kSparseMmaWarps; ++warp) sum += sums[warp * kOutputs + i];
    if (io.bias != nullptr) sum += Element<kType>::load(io.bias, row);
    Element<kType>::store(io.y, token * weight.rows + row, sum);
}

//   kOctets  of tokens, 1 or 2: sums of 8 tokens that a lane has part of
//   kType    of x, the values, bias and y, 16 bits; x, its rows and the values begin at multiples
//            of 16 bytes
// Shared memory: the warps' counts, then two stages of values a warp, then the warps' sums.
// A block: kSparseMmaRows rows; a warp: a run of the steps of all 16; a lane: 16 columns of two
// rows in each step; at the end a thread adds up one output.
template <int kOctets, DType kType>
__global__ void __launch_bounds__(kSparseMmaThreads, kOctets == 1 ? 2 : 1)
    sparse_gemv_mma(SparseWeight weight, SparseActivations io) {
    const int warp = threadIdx.x / kWarpSize, in_warp = threadIdx.x % kWarpSize;
    const int g = in_warp / 4, t = in_warp % 4;
    const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kSparseMmaRows;
    const SparseLane lane(weight, io);
    bool structured = weight.cols % kStepLane == 0;
    unsigned begin[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        begin[h] =
            lane.present[h] ? static_cast<unsigned>(weight.first_value(first_row + g + 8 * h)) : 0u;
        structured = structured && begin[h] % kValueChunk == 0 &&
                     (!lane.present[h] || begin[h] + weight.cols / 2 <= weight.kept);
    }

    // A warp's values begin behind those of the warps before it. Two lanes count a row's.
    unsigned char* memory = shared_memory();
    auto* counts = reinterpret_cast<unsigned*>(memory);  // [warp][row]
    const int64_t counted_row = first_row + in_warp / 2;
    const auto* words = reinterpret_cast<const uint2*>(weight.bitmap) + counted_row * lane.steps;
    unsigned own = 0;
    for (int step = lane.first_step + in_warp % 2; step < lane.end_step; step += 2) {
        if (counted_row >= weight.rows) break;
        const uint2 bits = words[step];
        const int columns = static_cast<int>(weight.cols) - step * kSparseStep;
        own += __popc(bits.x) + __popc(bits.y);
        structured = structured && two_of_each_four(bits.x, columns) &&
                     two_of_each_four(bits.y, columns - 32);
    }
    own += __shfl_xor_sync(kFullWarp, own, 1);
    if (in_warp % 2 == 0) counts[warp * kSparseMmaRows + in_warp / 2] = own;
    structured = __syncthreads_and(structured);
    for (int other = 0; other < warp; ++other) {
#pragma unroll
        for (int h = 0; h < 2; ++h) begin[h] += counts[other * kSparseMmaRows + g + 8 * h];
    }
    __syncthreads();

    MmaC total[kOctets] = {};
    if (structured) {
        multiply_2_of_4<kOctets, kType>(lane, weight.cols, begin, total);
    } else {
        multiply_unstructured<kOctets, kType>(lane, weight.cols, begin, memory,
                                              warp * kStageBytes + g * kStageRow, total);
    }

    __syncthreads();
    auto* sums = reinterpret_cast<float*>(memory);
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float* two = sums + ((warp * kOctets + o) * kSparseMmaRows + g + 8 * h) * kSparseOctet;
            *reinterpret_cast<float2*>(two + 2 * t) =
                make_float2(total[o].x[2 * h], total[o].x[2 * h + 1]);
        }
    }
    __syncthreads();
    finish_sparse_rows<kOctets, kType>(weight, io, sums);
}

}  // namespace nowag::cuda
