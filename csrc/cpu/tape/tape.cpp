#include "nowag/tape.h"

#include <algorithm>

#include "cpu/base/failure.h"
#include "cpu/base/parallel.h"
#include "cpu/base/simd.h"
#include "cpu/tape/tape_table.h"

namespace nowag::cpu {
namespace {

// Multiplications of one step below which a second thread costs more than it does.
constexpr int64_t kWorthThreads = int64_t{1} << 17;

const TapeTable* table() {
#ifdef NOWAG_X86
    return simd_pick(&kTapeScalar, &kTapeAvx2, &kTapeAvx512,
                     static_cast<const TapeTable*>(nullptr));
#else
    return &kTapeScalar;
#endif
}

bool has_type(const TapeTensor& tensor) {
    return tensor.type >= TapeType::float32 && tensor.type < TapeType::count;
}

bool is_valid(const TapeStep& step) {
    if (step.op < TapeOp::copy || step.op >= TapeOp::count) return false;
    for (const int64_t size : step.sizes) {
        if (size < 1) return false;
    }
    for (const TapeTensor* tensor : {&step.out, &step.a, &step.b, &step.c, &step.d}) {
        if (!has_type(*tensor)) return false;
    }
    if (step.out.type == TapeType::boolean || step.out.address == 0 || step.a.address == 0) {
        return false;
    }
    if (step.op >= TapeOp::add && step.op != TapeOp::mean && step.b.address == 0) return false;
    if ((step.op == TapeOp::select || step.op == TapeOp::attention) && step.c.address == 0) {
        return false;
    }
    if (step.out.type == TapeType::int64) return step.op == TapeOp::copy || step.op == TapeOp::add;
    if (step.op == TapeOp::attention) {
        return step.extent > 0 && step.sizes[2] <= kTapeQueries && step.sizes[3] <= kTapeFeatures;
    }
    return true;
}

int64_t element_size(TapeType type) {
    constexpr int64_t sizes[] = {4, 2, 2, 8, 1};
    return sizes[static_cast<int64_t>(type)];
}

// Row i of the operand's first dimension.
TapeTensor row_of(const TapeTensor& tensor, int64_t i) {
    TapeTensor row = tensor;
    row.address += i * tensor.strides[0] * element_size(tensor.type);
    return row;
}

// Whether every index was in range; nothing is written where one is not.
bool index_copy(const TapeTable& kernel, const TapeStep& step) {
    const auto* index = reinterpret_cast<const int64_t*>(step.b.address);
    const auto at = [&](int64_t i) { return index[i * step.b.strides[0]]; };
    for (int64_t i = 0; i < step.sizes[0]; ++i) {
        if (at(i) < 0 || at(i) >= step.extent) return false;
    }
    TapeStep copy = step;
    copy.op = TapeOp::copy;
    copy.sizes[0] = 1;
    for (int64_t i = 0; i < step.sizes[0]; ++i) {
        copy.out = row_of(step.out, at(i));
        copy.a = row_of(step.a, i);
        kernel.run(copy);
    }
    return true;
}

void attention(const TapeTable& kernel, const TapeStep& step, int threads) {
    const int64_t heads = step.sizes[1], tasks = step.sizes[0] * heads;
    const int64_t visible = kernel.visible_keys(step, 0, 0);
    const bool alike = step.d.strides[0] == 0 && step.d.strides[1] == 0;
    const int64_t multiplications = tasks * visible * step.sizes[2] * step.sizes[3];
    parallel_for(tasks, multiplications < kWorthThreads ? 1 : threads, [&](int64_t task) {
        const int64_t batch = task / heads, head = task % heads;
        kernel.attend(step, batch, head, alike ? visible : kernel.visible_keys(step, batch, head));
    });
}

}  // namespace

Status tape_run(const int64_t* steps, int64_t count, int threads) try {
    if (count < 0 || threads < 1) return Status::invalid_argument;
    const TapeTable& kernel = *table();
    const auto* all = reinterpret_cast<const TapeStep*>(steps);
    for (int64_t i = 0; i < count; ++i) {
        const TapeStep& step = all[i];
        if (!is_valid(step)) return Status::invalid_argument;
        if (step.op == TapeOp::attention) {
            attention(kernel, step, threads);
        } else if (step.op != TapeOp::index_copy) {
            kernel.run(step);
        } else if (step.b.type != TapeType::int64 || !index_copy(kernel, step)) {
            return Status::invalid_argument;
        }
    }
    return Status::ok;
} catch (...) {
    return failure();
}

}  // namespace nowag::cpu
