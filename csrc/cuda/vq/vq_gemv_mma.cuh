// vq_gemv.h on a GPU with tensor cores: d = 4 at 8 and 12 bits, and d = 6 at 12 for more tokens
// than vq_gemv_lut.cuh takes.
//
// Codebook entries are float16 and go from shared memory into the second operand of mma as they
// are; one gather serves 8 tokens (an octet) or 16. Inputs, times their column norms, are two
// float16 parts of 22 bits together, scaled by a power of two for each token and step of 8
// positions; the high parts of an octet are rows 0 to 7 of the first operand, the low ones rows 8
// to 15. vq_gemv_prepare writes them in the order in which lanes take them.
//
//   step: 8 positions; with g = lane / 4 and t = lane % 4 a lane takes positions t and t + 4
//   band: 64 rows of a warp; a lane takes rows 8 g to 8 g + 7, whose codes are 3 (or 2) whole words
//         a position. Its row u is column g of the product u, 0 to 7.
//   mma:  rows 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of the second operand are coordinates 0 to 3 of
//         position t, in the next mma those of position t + 4, and in the third, where d = 6,
//         coordinates 4 and 5 of both. Entries are in the registers that mma reads: no lane needs
//         another's, and nothing is moved.
//   sums: a lane has those of token g, rows 16 t to 16 t + 15.
//
//   block: 2 bands, 8 warps each, which take the steps of a segment in turn; their sums meet in
//          shared memory and go to scratch, [segment, token, row], for vq_gemv_finish. Blocks stay
//          and take one item (segment, bands) after another.
//
// What shared memory has time for. d = 6: 32 lanes read 8 and 4 bytes of entries at random in
// 6.2 + 3.5 cycles (expected conflicts), and codes and inputs take 2.2 on their way through the
// same L1: 16 weights a cycle and multiprocessor. d = 4: 16 copies of the 256 entries, so that each
// lane of a half-warp has banks of its own: 2 cycles for 32 codes, and 0.9 (1 token) to 1.4 (8
// tokens) for the rest: 44 to 37 weights, with 2.1 cycles of issue beside it.
//
// Measured on an H100 at 11008 x 4096: d = 6, 16 tokens, 24 us: L1, at 80 %, bounds it. d = 4, one
// token, 13 us: latency does, with one block of 16 warps a multiprocessor that issues in 47 % of
// its cycles.
//
// Error: a step loses less than 2e-6 of its absolute sum if mma keeps 2 bits below float32's last
// of what it adds up and truncates the sum, which is not specified, but what Hopper is believed to
// do. Then at most kMaxWarpSteps float32 additions, 8 and the segments: within the 8e-6 of
// vq_gemv.h. (With 1 bit and eight products at a time, as Ampere is believed to do, a step may lose
// 3.9e-6, and all 9e-6, on data made for that.) What float16 loses below 2^-24 is the term of
// vq_gemv.h for this kernel.
#pragma once

#include "cuda/vq/vq_gemv_fast.cuh"

namespace nowag::cuda {

constexpr int kMmaThreads = 512;
constexpr int kStep = 8;   // positions
constexpr int kOctet = 8;  // tokens
constexpr int kBandRows = 64;
constexpr int kBands = 2;  // of a block: they share the inputs in the L1 cache
constexpr int kSlices = kMmaThreads / kWarpSize / kBands;
constexpr int kBlockRows = kBands * kBandRows;
constexpr int kMaxWarpSteps = 64;  // of a warp in one segment: sums stay short
constexpr int kMmaResidues = 4;    // of vq_gemv_finish
// What adding the slices up at the end of an item takes, in steps of all its warps.
template <int kD>
constexpr double kItemEndTurns = kD == 4 ? 1.0 : 0.25;
constexpr int kQuads = kBandRows / 16;  // of consecutive rows, in the sums of a lane
constexpr int kBlockSums = kBands * kQuads * kWarpSize;  // quads that a slice has for an octet

// Few blocks: where one runs there is no room for a block of vq_gemv_mma, which starts meanwhile.
constexpr int kPrepareThreads = 1024;
constexpr int kPrepareWarps = kPrepareThreads / kWarpSize;

// The codebook in shared memory. Coordinates 0 to 3 of entry k are the 8 bytes at k 2^kEntryShift,
// in every copy; those beyond are 4 bytes each in a second table, from kFours on.
template <int kBits>
constexpr int kTableCopies = kBits == 8 ? 16 : 1;
template <int kBits>
constexpr int kEntryShift = kBits == 8 ? 7 : 3;
template <int kD, int kBits>
constexpr unsigned kFours = 1u << (kBits + kEntryShift<kBits>);
template <int kD, int kBits>
constexpr size_t kTableBytes = kFours<kD, kBits> + (kD == 4 ? 0 : sizeof(uint32_t) << kBits);

// Octets that a launch takes: two of d = 4 at 12 bits would have their registers spill on sm_80.
template <int kD, int kBits>
constexpr int kMmaOctets = kD == 4 && kBits == 12 ? 1 : 2;

// Of an item, what its end alone asks for: it waits in shared memory, for registers are full.
struct ItemEnd {
    int segment;
    int member;
    int first_row;
};

template <int kD, int kBits>
constexpr size_t kItemEnd = kTableBytes<kD, kBits> + sizeof(float4) * kSlices * kBlockSums;
template <int kD, int kBits>
constexpr size_t kMmaShared = kItemEnd<kD, kBits> + sizeof(ItemEnd);

// Scratch memory of vq_gemv_prepare.
struct MmaInputs {
    uint4* operands;  // [member, octet, step, kD / 2, lane]: the lane's part of each first operand
    float* scales;    // [member, octet, step, kOctet]: what takes a step's sums back
    int steps;
};

// Of two inputs: the high parts, and the low parts, which are what those leave.
struct Parts {
    uint32_t high;
    uint32_t low;

    __device__ __forceinline__ Parts(float x0, float x1) {
        const uint16_t h0 = float_to_half(x0), h1 = float_to_half(x1);
        high = h0 | static_cast<uint32_t>(h1) << 16;
        low = float_to_half(x0 - half_to_float(h0)) |
              static_cast<uint32_t>(float_to_half(x1 - half_to_float(h1))) << 16;
    }
};

// Coordinates of a token's position(s), in columns 2 t and 2 t + 1, and 2 t + 8 and 2 t + 9.
__device__ __forceinline__ uint4 first_operand(const Parts& left, const Parts& right) {
    return make_uint4(left.high, left.low, right.high, right.low);
}

// A token's inputs in a step, those of positions t and t + 4: a lane's part of the first operands.
template <int kD>
struct PreparedInputs {
    uint4 operands[kD / 2];
    float scale;  // what takes the step's sums back

    // By the four lanes of a token, which are all here or none is; a token that is absent is 0.
    template <DType kType>
    static __device__ __forceinline__ PreparedInputs of(const VqActivations& io,
                                                        const VqWeight& weight, int token, int step,
                                                        unsigned lanes) {
        const int t = threadIdx.x % 4;
        float x[2][kD] = {};
        float largest = 0.0f;
#pragma unroll
        for (int q = 0; q < 2; ++q) {
            if (token < io.tokens) {
                load_scaled<kD, kType>(io, weight, token,
                                       static_cast<int64_t>(step) * kStep + t + 4 * q, x[q]);
            }
#pragma unroll
            for (int j = 0; j < kD; ++j) largest = fmaxf(largest, fabsf(x[q][j]));
        }
        largest = fmaxf(largest, __shfl_xor_sync(lanes, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(lanes, largest, 2));

        const PowerOfTwo scale(largest);
        PreparedInputs prepared;
        prepared.scale = scale.inverse;
#pragma unroll
        for (int q = 0; q < 2; ++q) {
#pragma unroll
            for (int j = 0; j < kD; ++j) x[q][j] *= scale.value;
            prepared.operands[q] = first_operand(Parts(x[q][0], x[q][1]), Parts(x[q][2], x[q][3]));
        }
        if constexpr (kD == 6) {
            prepared.operands[2] = first_operand(Parts(x[0][4], x[0][5]), Parts(x[1][4], x[1][5]));
        }
        return prepared;
    }
};

// Splits and scales the inputs for vq_gemv_mma.
//   kD      4 or 6
//   kType   of x
//   inputs  out; absent tokens are 0
// Block (x, y, z): kPrepareWarps steps of octet y of member z; a warp: one step; lane 4 g + t:
// token g, positions t and t + 4. Bound by latency: measured on an H100, 4 to 5.5 us on 4 to 8
// blocks.
template <int kD, DType kType>
__global__ void __launch_bounds__(kPrepareThreads)
    vq_gemv_prepare(const __grid_constant__ VqGroup group, MmaInputs inputs) {
    let_next_kernel_start();
    const VqGroup::Member& member = group.members[blockIdx.z];
    const int lane = threadIdx.x % kWarpSize, g = lane / 4;
    const int step = blockIdx.x * kPrepareWarps + threadIdx.x / kWarpSize;
    if (step >= inputs.steps) return;
    const auto prepared = PreparedInputs<kD>::template of<kType>(
        member.io, member.weight, blockIdx.y * kOctet + g, step, kFullWarp);
    const int64_t octet = static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
    const int64_t place = octet * inputs.steps + step;
    if (lane % 4 == 0) inputs.scales[place * kOctet + g] = prepared.scale;
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) {
        inputs.operands[(place * (kD / 2) + i) * kWarpSize + lane] = prepared.operands[i];
    }
}

template <int kD, int kBits, int kThreads>
__device__ __forceinline__ void fill_table(const uint16_t* codebook, unsigned char* table) {
    constexpr int kOwn = (kTableCopies<kBits> << kBits) / kThreads;
    const uint32_t* pairs = reinterpret_cast<const uint32_t*>(codebook);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        const int place = threadIdx.x + i * kThreads;
        const uint32_t* entry = pairs + place / kTableCopies<kBits> * (kD / 2);
        reinterpret_cast<uint2*>(table)[place] = make_uint2(entry[0], entry[1]);
        if constexpr (kD == 6) {
            reinterpret_cast<uint32_t*>(table + kFours<kD, kBits>)[place] = entry[2];
        }
    }
}

// Where a warp is: in the steps [step, end) of an item.
struct MmaPlace {
    const uint32_t* words;  // the lane's, from position lane % 4 on
    int positions;          // before this one; 0: the lane has no codes here
    int step;
    int end;
};

// From step `first` to `end`, of the lane's rows in a band of the block's rows from first_row on;
// beyond padded_rows there are no codes.
template <int kBits>
__device__ __forceinline__ MmaPlace lane_place(const VqWeight& weight, int64_t padded_rows,
                                               int first_row, int band, int first, int end) {
    const int lane = threadIdx.x % kWarpSize;
    const int row = first_row + band * kBandRows + lane / 4 * kLaneRows;
    const int positions = min(end * kStep, static_cast<int>(weight.positions));
    return {lane_words<kBits>(weight, row / kTileRows, lane % 4, row % kTileRows / kLaneRows),
            row < padded_rows ? positions : 0, first, end};
}

// A block's items in turn, each kBlockRows rows (a piece of all) of one segment.
struct MmaItem {
    int segment;
    int piece;

    __device__ __forceinline__ explicit MmaItem(unsigned pieces)
        : segment(static_cast<int>(blockIdx.x / pieces)),
          piece(static_cast<int>(blockIdx.x % pieces)) {}

    __device__ __forceinline__ void advance(int pieces) {
        piece += static_cast<int>(gridDim.x);
        for (; piece >= pieces; piece -= pieces) ++segment;
    }

    // Of the lane's rows in a band, from step `first` of the item on; an item that does not exist
    // has no codes.
    template <int kBits>
    __device__ __forceinline__ MmaPlace place(const VqWeight& weight, const Segments& segments,
                                              int steps, int64_t padded_rows, int first_row,
                                              int band, int first) const {
        const int begin = segment * segments.length;
        const int end = min(begin + segments.length, steps);
        return lane_place<kBits>(weight, segment < segments.count ? padded_rows : 0, first_row,
                                 band, begin + first, end);
    }
};

// A lane's codes of one step; where there are none, 0.
template <int kBits>
struct StepCodes {
    LaneCodes<kBits> at[2];

    __device__ __forceinline__ void load(const MmaPlace& place, int step) {
#pragma unroll
        for (int q = 0; q < 2; ++q) {
            const int first = step * kStep + 4 * q;
            at[q] = {};
            if (first + static_cast<int>(threadIdx.x) % 4 < place.positions) {
                at[q] = load_codes<kBits>(place.words + static_cast<int64_t>(first) * kBits);
            }
        }
    }
};

// The first operands of one step and octet.
template <int kD>
struct StepInputs {
    MmaA operands[kD / 2];
    float scale;  // of the lane's token

    // `before`: octets of the members before this one.
    __device__ __forceinline__ void load(const MmaInputs& inputs, int before, int octet, int step,
                                         int tokens) {
        const int lane = threadIdx.x % kWarpSize;
        const int64_t place = static_cast<int64_t>(before + octet) * inputs.steps + step;
        const bool present = octet * kOctet + lane / 4 < tokens;
        scale = inputs.scales[place * kOctet + lane / 4];
#pragma unroll
        for (int i = 0; i < kD / 2; ++i) {
            uint4 words = make_uint4(0u, 0u, 0u, 0u);
            if (present) words = inputs.operands[(place * (kD / 2) + i) * kWarpSize + lane];
            operands[i] = {{words.x, words.y, words.z, words.w}};
        }
    }
};

// The second operands of product u: the entries of the lane's row u at its two positions.
template <int kD, int kBits>
__device__ __forceinline__ void gather(const unsigned char* table, const StepCodes<kBits>& codes,
                                       int u, uint2 (&b)[kD / 2]) {
    const unsigned copy = threadIdx.x % kTableCopies<kBits> * sizeof(uint2);
    unsigned offset[2];
#pragma unroll
    for (int q = 0; q < 2; ++q) {
        offset[q] = codes.at[q].template code<kEntryShift<kBits>>(u);
        b[q] = *reinterpret_cast<const uint2*>(table + (offset[q] | copy));
    }
    if constexpr (kD == 6) {
        const unsigned char* fours = table + kFours<kD, kBits>;
        b[2].x = *reinterpret_cast<const uint32_t*>(fours + offset[0] / 2);
        b[2].y = *reinterpret_cast<const uint32_t*>(fours + offset[1] / 2);
    }
}

// Sums of one token: rows 16 t + u and 16 t + 8 + u of the band.
struct LaneSums {
    float x[2][kLaneRows];
};

template <int kD>
__device__ __forceinline__ void multiply(const StepInputs<kD>& a, const uint2 (&b)[kD / 2], int u,
                                         LaneSums& total) {
    MmaC sum{};
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) mma_16<DType::float16>(a.operands[i], b[i].x, b[i].y, sum);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        total.x[h][u] = fused(sum.x[h] + sum.x[h + 2], a.scale, total.x[h][u]);
    }
}

// Adds the slices' sums of one octet up, each `apart` quads from the one before, and writes them to
// partial, of this segment, octet and weight, where a token's are `pitch` from the one before.
template <int kThreads, int kSums>
__device__ __forceinline__ void add_slices(const float4* sums, int apart, int first_row, int tokens,
                                           int64_t padded_rows, int64_t pitch, float* partial) {
    for (int i = threadIdx.x; i < kBlockSums; i += kThreads) {
        float4 sum = sums[i];
#pragma unroll
        for (int slice = 1; slice < kSums; ++slice) {
            sum = sum_of(sum, sums[slice * apart + i]);
        }
        const int lane = i % kWarpSize, quad = i / kWarpSize % kQuads;
        const int band = i / (kWarpSize * kQuads), token = lane / 4;
        const int row = first_row + band * kBandRows + lane % 4 * 16 + quad * 4;
        if (row < padded_rows && token < tokens) {
            *reinterpret_cast<float4*>(partial + token * pitch + row) = sum;
        }
    }
}

//   kD, kBits  4 and 8 or 12, or 6 and 12: d and the bits of a code
//   kOctets    of tokens, up to kMmaOctets
//   group      members that share a codebook; one alone, where kOctets is 2
//   inputs     of vq_gemv_prepare
//   segments   of steps
//   partial    out, [segment, token, row of all members]
// A block: items (segment, bands of a block) in turn, the last and perhaps short segment last; a
// warp: one band of each item, every kSlices-th step; a lane: 8 rows at 2 positions of each step.
template <int kD, int kBits, int kOctets>
__global__ void __launch_bounds__(kMmaThreads, 1)
    vq_gemv_mma(const __grid_constant__ VqGroup group, MmaInputs inputs, Segments segments,
                float* partial) {
    // Steps whose codes are on their way from memory: a warp's turn takes 700 cycles at d = 4 and 8
    // tokens, less than memory may, and from 1000 on otherwise.
    constexpr int kAhead = kD == 4 && kOctets == 1 ? 2 : 1;
    unsigned char* table = shared_memory();
    float4* sums = reinterpret_cast<float4*>(table + kTableBytes<kD, kBits>);
    auto* done = reinterpret_cast<ItemEnd*>(table + kItemEnd<kD, kBits>);
    let_next_kernel_start();
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int band = warp % kBands, slice = warp / kBands;
    const int tokens = group.members[0].io.tokens;
    constexpr bool kAlone = kOctets > 1;  // which leaves no registers for other members
    const auto member_of = [&](const MmaItem& i) { return kAlone ? 0 : group.of_piece(i.piece); };
    const auto first_row_of = [&](const MmaItem& i, int m) {
        return (i.piece - (kAlone ? 0 : group.members[m].first_piece)) * kBlockRows;
    };
    const auto place_of = [&](const MmaItem& i, int m) {
        return i.place<kBits>(group.members[m].weight, segments, inputs.steps,
                              group.members[m].padded_rows, first_row_of(i, m), band, slice);
    };
    MmaItem item(group.pieces);
    int member = member_of(item);
    MmaPlace place = place_of(item, member);
    StepCodes<kBits> ahead[kAhead];
    const auto start_loading = [&] {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) ahead[i].load(place, place.step + i * kSlices);
    };
    start_loading();
    fill_table<kD, kBits, kMmaThreads>(group.members[0].weight.codebook, table);
    __syncthreads();
    wait_for_previous_kernel();

    while (item.segment < segments.count) {
        if (threadIdx.x == 0) *done = {item.segment, member, first_row_of(item, member)};
        LaneSums total[kOctets] = {};
        for (int step = place.step; step < place.end; step += kSlices) {
            StepInputs<kD> a[kOctets];
#pragma unroll
            for (int o = 0; o < kOctets; ++o) {
                a[o].load(inputs, member * kOctets, o, step, tokens);
            }
            const StepCodes<kBits> codes = ahead[0];
#pragma unroll
            for (int i = 1; i < kAhead; ++i) ahead[i - 1] = ahead[i];
            ahead[kAhead - 1].load(place, step + kAhead * kSlices);
#pragma unroll
            for (int u = 0; u < kLaneRows; ++u) {
                uint2 b[kD / 2];
                gather<kD, kBits>(table, codes, u, b);
#pragma unroll
                for (int o = 0; o < kOctets; ++o) multiply<kD>(a[o], b, u, total[o]);
            }
        }

        item.advance(group.pieces);
        member = member_of(item);
        place = place_of(item, member);
        start_loading();
#pragma unroll
        for (int o = 0; o < kOctets; ++o) {
#pragma unroll
            for (int quad = 0; quad < kQuads; ++quad) {
                const float* x = total[o].x[quad / 2] + quad % 2 * 4;
                sums[slice * kBlockSums + (band * kQuads + quad) * kWarpSize + lane] =
                    make_float4(x[0], x[1], x[2], x[3]);
            }
            __syncthreads();
            const VqGroup::Member& of = group.members[kAlone ? 0 : done->member];
            const int64_t first_token = static_cast<int64_t>(done->segment) * tokens + o * kOctet;
            add_slices<kMmaThreads, kSlices>(
                sums, kBlockSums, done->first_row, tokens - o * kOctet, of.padded_rows,
                group.padded_rows,
                partial + first_token * group.padded_rows + (kAlone ? 0 : of.first_row));
            __syncthreads();
        }
    }
}

}  // namespace nowag::cuda
