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
//   stage: a warp's values of a step in shared memory; those of the next are on their way. A lane
//          goes through its columns and takes the next value for each that is kept.
//
// Error: the products of a step go through four mma, less than 2.7e-6 of their absolute sum
// (vq_gemv_mma.cuh), then through one float32 addition a step of the warp and 15 more.
#pragma once

#include "sparse_gemv.cuh"

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
constexpr size_t kSparseMmaShared = 2 * kSparseMmaWarps * kStageBytes;

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

// Two columns of a row as the lane has them in the first operand: the next value where a column is
// kept, else 0. `place` is where that stands, in bytes.
__device__ __forceinline__ uint32_t two_columns(const unsigned char* memory, unsigned kept,
                                                unsigned& place) {
    uint32_t found[2] = {0u, 0u};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (!((kept >> i) & 1u)) continue;
        found[i] = *reinterpret_cast<const uint16_t*>(memory + place);
        place += sizeof(uint16_t);
    }
    return found[0] | found[1] << 16;
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
            const unsigned end = begin[h] + static_cast<unsigned>(total[h]);
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

// x and the values are of kType; x, its rows and the values begin at multiples of 16 bytes.
template <int kOctets, DType kType>
__global__ void __launch_bounds__(kSparseMmaThreads, kOctets == 1 ? 2 : 1)
    sparse_gemv_mma(SparseWeight weight, SparseActivations io) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int g = lane / 4, t = lane % 4;
    const int steps = static_cast<int>(padded_columns(weight.cols) / kSparseStep);
    const int first_step = steps * warp / kSparseMmaWarps;
    const int end_step = steps * (warp + 1) / kSparseMmaWarps;
    const auto* values = static_cast<const uint16_t*>(weight.values);
    const auto count = static_cast<unsigned>(weight.row_offsets[weight.rows]);

    const int64_t row = static_cast<int64_t>(blockIdx.x) * kSparseMmaRows + g;
    const bool present[2] = {row < weight.rows, row + 8 < weight.rows};
    const uint16_t* lane_bits =
        reinterpret_cast<const uint16_t*>(weight.bitmap) + row * steps * 4 + t;
    const auto bits_at = [&](int step) {
        StepBits found{};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (present[h] && step < end_step)
                found.bits[h] = lane_bits[(h * 8 * steps + step) * 4];
        }
        return found;
    };
    unsigned begin[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        begin[h] = present[h] ? static_cast<unsigned>(weight.row_offsets[row + 8 * h]) : 0u;
    }

    // A warp's values begin behind those of the warps before it.
    unsigned char* memory = shared_memory();
    auto* counts = reinterpret_cast<unsigned*>(memory);  // [warp][row]
    unsigned own[2] = {};
    for (int step = first_step; step < end_step; ++step) {
        const StepBits found = bits_at(step);
#pragma unroll
        for (int h = 0; h < 2; ++h) own[h] += __popc(found.bits[h]);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        own[h] += __shfl_xor_sync(kFullWarp, own[h], 1);
        own[h] += __shfl_xor_sync(kFullWarp, own[h], 2);
        if (t == 0) counts[warp * kSparseMmaRows + g + 8 * h] = own[h];
    }
    __syncthreads();
    for (int other = 0; other < warp; ++other) {
#pragma unroll
        for (int h = 0; h < 2; ++h) begin[h] += counts[other * kSparseMmaRows + g + 8 * h];
    }
    __syncthreads();

    // The lane's rows in one stage and the other.
    unsigned stage = warp * kStageBytes + g * kStageRow;
    const unsigned both_stages = 2 * stage + kSparseMmaWarps * kStageBytes;
    const uint16_t* lane_x = static_cast<const uint16_t*>(io.x) + g * weight.cols + t * kStepLane;

    MmaC total[kOctets] = {};
    StepBits bits = bits_at(first_step), bits_ahead = bits_at(first_step + 1);
    StepValues step_values{{begin[0], begin[1]}, {}};
    int before[2];
    bits.count(before, step_values.total);
    step_values.start(values, count, memory + stage);
    for (int step = first_step; step < end_step; ++step) {
        StepX x[kOctets];
#pragma unroll
        for (int o = 0; o < kOctets; ++o) {
            x[o].load(lane_x + o * kSparseOctet * weight.cols + step * kSparseStep,
                      o * kSparseOctet + g < io.tokens,
                      static_cast<int>(weight.cols) - step * kSparseStep - t * kStepLane);
        }
        unsigned place[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            place[h] = stage + h * kLaterRow +
                       static_cast<unsigned>(sizeof(uint16_t)) *
                           (step_values.begin[h] % kValueChunk + static_cast<unsigned>(before[h]));
            step_values.begin[h] += static_cast<unsigned>(step_values.total[h]);
        }
        const StepBits kept = bits;
        bits = bits_ahead;
        bits_ahead = bits_at(step + 2);
        stage = both_stages - stage;
        bits.count(before, step_values.total);
        step_values.start(values, count, memory + stage);
        wait_for_copies<1>();
        __syncwarp();

        MmaC sum[kOctets] = {};
#pragma unroll
        for (int i = 0; i < kStepProducts; ++i) {
            MmaA a;
#pragma unroll
            for (int part = 0; part < 4; ++part) {  // low columns of both rows, then high ones
                const int h = part % 2, column = 4 * i + part / 2 * 2;
                a.x[part] = two_columns(memory, kept.bits[h] >> column, place[h]);
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
        __syncwarp();
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
