// Rates of an SM's units, and what launches, barriers and cold reads cost: the numbers that the
// kernels' arithmetic rests on. bench_gpu_units.py compiles and runs it.
//
// Every line it prints is `name<tab>value<tab>unit`. Rates are a clock and SM, at the clock that
// the device says is its highest: a device that runs slower shows lower rates.
#include <cooperative_groups.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

constexpr int kUnroll = 8;  // independent chains a thread
constexpr int kSeeds = 8192;
constexpr size_t kOutBytes = 4 << 20;

int sms;
double ghz;
uint32_t* out;    // what kernels write so that nothing is optimised away
uint32_t* seeds;  // random numbers

void ok(cudaError_t status, int line) {
    if (status == cudaSuccess) return;
    std::fprintf(stderr, "units.cu:%d: %s\n", line, cudaGetErrorString(status));
    std::exit(1);
}
#define OK(call) ok(call, __LINE__)

void say(const char* name, double value, const char* unit) {
    std::printf("%s\t%.4g\t%s\n", name, value, unit);
    std::fflush(stdout);
}

// The median time of what `launch` queues on `stream`.
template <class Launch>
double microseconds(Launch launch, cudaStream_t stream = nullptr) {
    constexpr int kWarm = 2, kRounds = 7;
    cudaEvent_t begin, end;
    OK(cudaEventCreate(&begin));
    OK(cudaEventCreate(&end));
    std::vector<float> times;
    for (int round = 0; round < kWarm + kRounds; ++round) {
        OK(cudaEventRecord(begin, stream));
        launch();
        OK(cudaGetLastError());
        OK(cudaEventRecord(end, stream));
        OK(cudaEventSynchronize(end));
        float milliseconds;
        OK(cudaEventElapsedTime(&milliseconds, begin, end));
        if (round >= kWarm) times.push_back(milliseconds * 1e3f);
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

// Things a clock and SM, of `count` things that an SM did in `us`.
double rate(double count, double us) { return count / (us * ghz * 1e3); }

// --- arithmetic ---------------------------------------------------------------------------------

enum class Op { kFfma, kFmnmx, kVimnmx3, kMinF16x2, kHfma2, kIadd, kLop3, kPrmt, kShf };

template <Op kOp>
__device__ uint32_t apply(uint32_t x, uint32_t y, uint32_t z, uint32_t a, uint32_t b) {
    if constexpr (kOp == Op::kFfma) {
        x = __float_as_uint(__fmaf_rn(__uint_as_float(x), __uint_as_float(a), __uint_as_float(b)));
    } else if constexpr (kOp == Op::kFmnmx) {
        asm volatile("min.f32 %0, %0, %1;" : "+r"(x) : "r"(y));
    } else if constexpr (kOp == Op::kVimnmx3) {
        int least = __vimin3_s32(static_cast<int>(x), static_cast<int>(y), static_cast<int>(z));
        asm volatile("" : "+r"(least));
        x = least;
    } else if constexpr (kOp == Op::kMinF16x2) {
        asm volatile("min.f16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
    } else if constexpr (kOp == Op::kHfma2) {
        asm volatile("fma.rn.f16x2 %0, %0, %1, %2;" : "+r"(x) : "r"(a), "r"(b));
    } else if constexpr (kOp == Op::kIadd) {
        asm volatile("add.u32 %0, %0, %1;" : "+r"(x) : "r"(y));
    } else if constexpr (kOp == Op::kLop3) {
        asm volatile("lop3.b32 %0, %0, %1, %2, 0x6a;" : "+r"(x) : "r"(y), "r"(z));
    } else if constexpr (kOp == Op::kPrmt) {
        asm volatile("prmt.b32 %0, %0, %1, %2;" : "+r"(x) : "r"(y), "r"(b));
    } else {
        asm volatile("shf.r.clamp.b32 %0, %0, %1, %2;" : "+r"(x) : "r"(y), "r"(b));
    }
    return x;
}

template <Op kOp>
__global__ void arithmetic(uint32_t* result, int iterations, uint32_t a, uint32_t b) {
    uint32_t v[kUnroll];
    for (int k = 0; k < kUnroll; ++k) v[k] = threadIdx.x * (k + 1) + a;
    for (int i = 0; i < iterations; ++i) {
#pragma unroll
        for (int k = 0; k < kUnroll; ++k) {
            v[k] = apply<kOp>(v[k], v[(k + 1) % kUnroll], v[(k + 3) % kUnroll], a, b);
        }
    }
    uint32_t sum = 0;
    for (uint32_t x : v) sum ^= x;
    result[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

template <Op kOp>
void measure_arithmetic(const char* name) {
    constexpr int kIterations = 4000, kThreads = 1024;
    const double us = microseconds(
        [] { arithmetic<kOp><<<sms, kThreads>>>(out, kIterations, 0x3f800001u, 0x12340003u); });
    say(name, rate(double(kUnroll) * kIterations * kThreads, us), "lanes a clock and SM");
}

// --- tensor cores -------------------------------------------------------------------------------

enum class Mma { kF16k16, kF16k8, kTf32k8, kTf32k4 };

template <Mma kMma>
__device__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#define D "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define WIDE "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
#define NARROW "{%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
    if constexpr (kMma == Mma::kF16k16) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 " WIDE
                     : D
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else if constexpr (kMma == Mma::kF16k8) {
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 " NARROW
                     : D
                     : "r"(a[0]), "r"(a[1]), "r"(b[0]));
    } else if constexpr (kMma == Mma::kTf32k8) {
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 " WIDE
                     : D
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 " NARROW
                     : D
                     : "r"(a[0]), "r"(a[1]), "r"(b[0]));
    }
#undef D
#undef WIDE
#undef NARROW
}

constexpr int kTiles = 4;  // independent accumulators a warp

template <Mma kMma>
__global__ void tensor(float* result, int iterations) {
    float c[kTiles][4] = {};
    const uint32_t a[4] = {threadIdx.x, 2, 3, 4}, b[2] = {threadIdx.x, 7};
    for (int i = 0; i < iterations; ++i) {
#pragma unroll
        for (auto& tile : c) multiply<kMma>(tile, a, b);
    }
    float sum = 0;
    for (auto& tile : c) {
        for (float v : tile) sum += v;
    }
    result[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

template <Mma kMma>
void measure_tensor(const char* name) {
    constexpr int kIterations = 4000, kThreads = 512, kOutputs = 16 * 8;
    const double us = microseconds(
        [] { tensor<kMma><<<sms, kThreads>>>(reinterpret_cast<float*>(out), kIterations); });
    const double count = double(kTiles) * kIterations * kThreads / 32;
    say(name, rate(kOutputs * count, us), "outputs a clock and SM");
}

// What an accumulator of 1 keeps of 15 products of 2^-exponent, in units of that.
__global__ void accumulate(float* kept, int exponent) {
    const bool first = threadIdx.x % 4 == 0;
    const half one = __float2half(1.f);
    const half low = __float2half(exp2f(-(exponent / 2)));
    const half high = __float2half(exp2f(-(exponent - exponent / 2)));
    const half2 pairs[4] = {__halves2half2(first ? one : low, low), __halves2half2(low, low),
                            __halves2half2(first ? one : high, high), __halves2half2(high, high)};
    const auto bits = [&](int i) { return *reinterpret_cast<const uint32_t*>(&pairs[i]); };
    float c[4] = {};
    multiply<Mma::kF16k16>(c, {bits(0), bits(0), bits(1), bits(1)}, {bits(2), bits(3)});
    if (threadIdx.x == 0) *kept = (c[0] - 1.f) / exp2f(-exponent);
}

void measure_accumulator() {
    for (int exponent : {23, 24, 25, 26}) {
        accumulate<<<1, 32>>>(reinterpret_cast<float*>(out), exponent);
        float kept;
        OK(cudaMemcpy(&kept, out, sizeof(kept), cudaMemcpyDeviceToHost));
        char name[64];
        std::snprintf(name, sizeof(name), "accumulator: of 15 products of 2^-%d beside 1",
                      exponent);
        say(name, kept, "kept");
    }
}

// --- gathers ------------------------------------------------------------------------------------

__device__ uint32_t fold(uint16_t v) { return v; }
__device__ uint32_t fold(uint32_t v) { return v; }
__device__ uint32_t fold(uint2 v) { return v.x ^ v.y; }
__device__ uint32_t fold(uint4 v) { return v.x ^ v.y ^ v.z ^ v.w; }

// Loads of one entry each at random places of a table, which is in shared or in global memory.
template <class T, bool kShared>
__global__ void gather(const T* global, const uint32_t* random, uint32_t* result, int entries,
                       int iterations) {
    extern __shared__ uint4 words[];
    const T* table = kShared ? reinterpret_cast<const T*>(words) : global;
    if (kShared) {
        for (int i = threadIdx.x; i < entries * int(sizeof(T)) / 16; i += blockDim.x) {
            words[i] = make_uint4(i, i * 3, i * 5, i * 7);
        }
        __syncthreads();
    }
    uint32_t at[kUnroll], sum = 0;
    for (int k = 0; k < kUnroll; ++k) at[k] = random[(threadIdx.x + k * blockDim.x) % kSeeds];
    for (int i = 0; i < iterations; ++i) {
#pragma unroll
        for (int k = 0; k < kUnroll; ++k) {
            const T* entry = table + (at[k] & (entries - 1));
            sum ^= fold(kShared ? *entry : __ldg(entry));
            at[k] += 0x9E37u;
        }
    }
    result[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

template <class T, bool kShared>
void measure_gather(const char* name, int entries) {
    constexpr int kIterations = kShared ? 2000 : 300, kThreads = 1024;
    const size_t bytes = size_t(entries) * sizeof(T);
    T* table = nullptr;
    if (kShared) {
        OK(cudaFuncSetAttribute(gather<T, kShared>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                int(bytes)));
    } else {
        OK(cudaMalloc(&table, bytes));
        OK(cudaMemset(table, 3, bytes));
    }
    const double us = microseconds([&] {
        gather<T, kShared>
            <<<sms, kThreads, kShared ? bytes : 0>>>(table, seeds, out, entries, kIterations);
    });
    say(name, rate(double(kUnroll) * kIterations * kThreads, us), "lanes a clock and SM");
    OK(cudaFree(table));
}

// --- launches and barriers ----------------------------------------------------------------------

__global__ void plain(uint32_t* p) {
    if (threadIdx.x == 0) p[blockIdx.x] += 1;
}

__global__ void chained(uint32_t* p) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    if (threadIdx.x == 0) p[blockIdx.x] += 1;
}

void launch_chained(int blocks, cudaStream_t stream) {
    cudaLaunchAttribute early;
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks;
    config.blockDim = 256;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = 1;
    OK(cudaLaunchKernelEx(&config, chained, out));
}

// What a kernel that does nothing takes in a graph of them, one after another.
void measure_graph_edge(int blocks, bool programmatic) {
    constexpr int kKernels = 200;
    cudaStream_t stream;
    OK(cudaStreamCreate(&stream));
    OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < kKernels; ++i) {
        if (programmatic) {
            launch_chained(blocks, stream);
        } else {
            plain<<<blocks, 256, 0, stream>>>(out);
        }
    }
    cudaGraph_t graph;
    OK(cudaStreamEndCapture(stream, &graph));
    cudaGraphExec_t replay;
    OK(cudaGraphInstantiate(&replay, graph, 0));
    const double us = microseconds([&] { OK(cudaGraphLaunch(replay, stream)); }, stream);
    char name[64];
    std::snprintf(name, sizeof(name), "graph edge, %d blocks, %s", blocks,
                  programmatic ? "programmatic" : "plain");
    say(name, us / kKernels, "us");
}

__global__ void synchronize(uint32_t* p, int count) {
    auto grid = cooperative_groups::this_grid();
    for (int i = 0; i < count; ++i) grid.sync();
    if (threadIdx.x == 0) p[blockIdx.x] = count;
}

void measure_barrier(int blocks_an_sm) {
    int count = 200;
    void* arguments[] = {&out, &count};
    const double us = microseconds([&] {
        OK(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(synchronize),
                                       dim3(sms * blocks_an_sm), dim3(256), arguments, 0, nullptr));
    });
    char name[64];
    std::snprintf(name, sizeof(name), "grid barrier, %d blocks an SM", blocks_an_sm);
    say(name, us / count, "us");
}

// --- memory -------------------------------------------------------------------------------------

__global__ void read(const uint4* p, size_t count, uint32_t* result) {
    const size_t stride = size_t(gridDim.x) * blockDim.x;
    uint32_t sum = 0;
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i + 3 * stride < count;
         i += 4 * stride) {
        uint4 v[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) v[k] = __ldcs(p + i + k * stride);
        for (auto& part : v) sum ^= fold(part);
    }
    if (sum == 0x12345) result[0] = sum;
}

// The floors of a GEMV: a cold read of so much in a launch of its own, launch included.
void measure_reads() {
    constexpr size_t kBytes = size_t(4) << 30, kPart = kBytes / 100;
    constexpr int kThreads = 256, kBlocks = 4, kReads = 20;
    uint4* memory;
    OK(cudaMalloc(&memory, kBytes));
    OK(cudaMemset(memory, 1, kBytes));
    const auto launch = [&](size_t offset, size_t bytes) {
        read<<<sms * kBlocks, kThreads>>>(memory + offset / 16, bytes / 16, out);
    };
    say("read of 4 GiB", kBytes / microseconds([&] { launch(0, kBytes); }) * 1e-6, "TB/s");
    for (size_t mib : {4, 8, 16, 32}) {
        const double us = microseconds([&] {  // far apart, so that no cache has them
            for (size_t i = 0; i < kReads; ++i) launch(i * 7 % 100 * kPart / 16 * 16, mib << 20);
        });
        char name[64];
        std::snprintf(name, sizeof(name), "cold read of %zu MiB", mib);
        say(name, us / kReads, "us");
    }
    OK(cudaFree(memory));
}

void prepare() {
    cudaDeviceProp device;
    OK(cudaGetDeviceProperties(&device, 0));
    sms = device.multiProcessorCount;
    int khz;
    OK(cudaDeviceGetAttribute(&khz, cudaDevAttrClockRate, 0));
    ghz = khz * 1e-6;
    std::vector<uint32_t> numbers(kSeeds);
    uint32_t x = 12345;
    for (auto& number : numbers) {
        x = x * 1103515245u + 12345u;
        number = x >> 3;
    }
    OK(cudaMalloc(&out, kOutBytes));
    OK(cudaMemset(out, 0, kOutBytes));
    OK(cudaMalloc(&seeds, kSeeds * sizeof(uint32_t)));
    OK(cudaMemcpy(seeds, numbers.data(), kSeeds * sizeof(uint32_t), cudaMemcpyHostToDevice));
}

}  // namespace

int main() {
    prepare();
    measure_arithmetic<Op::kFfma>("FFMA");
    measure_arithmetic<Op::kFmnmx>("FMNMX");
    measure_arithmetic<Op::kVimnmx3>("VIMNMX3");
    measure_arithmetic<Op::kMinF16x2>("min.f16x2");
    measure_arithmetic<Op::kHfma2>("HFMA2");
    measure_arithmetic<Op::kIadd>("IADD");
    measure_arithmetic<Op::kLop3>("LOP3");
    measure_arithmetic<Op::kPrmt>("PRMT");
    measure_arithmetic<Op::kShf>("SHF");
    measure_tensor<Mma::kF16k16>("mma m16n8k16 f16");
    measure_tensor<Mma::kF16k8>("mma m16n8k8 f16");
    measure_tensor<Mma::kTf32k8>("mma m16n8k8 tf32");
    measure_tensor<Mma::kTf32k4>("mma m16n8k4 tf32");
    measure_accumulator();
    measure_gather<uint16_t, true>("shared gather of 2 bytes, 4096 entries", 4096);
    measure_gather<uint32_t, true>("shared gather of 4 bytes, 4096 entries", 4096);
    measure_gather<uint2, true>("shared gather of 8 bytes, 4096 entries", 4096);
    measure_gather<uint4, true>("shared gather of 16 bytes, 4096 entries", 4096);
    measure_gather<uint16_t, true>("shared gather of 2 bytes, 256 entries", 256);
    measure_gather<uint32_t, true>("shared gather of 4 bytes, 256 entries", 256);
    measure_gather<uint4, true>("shared gather of 16 bytes, 256 entries", 256);
    measure_gather<uint32_t, false>("L1 gather of 4 bytes, 4096 entries", 4096);
    measure_gather<uint4, false>("L1 gather of 16 bytes, 4096 entries", 4096);
    measure_gather<uint4, false>("L2 gather of 16 bytes, 65536 entries", 65536);
    for (bool programmatic : {false, true}) {
        for (int blocks : {1, 132, 1056}) measure_graph_edge(blocks, programmatic);
    }
    for (int blocks : {1, 2, 4}) measure_barrier(blocks);
    measure_reads();
    return 0;
}
