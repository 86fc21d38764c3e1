// What each instruction set provides for tape.cpp.
#pragma once

#include <cstdint>

#include "nowag/tape.h"

namespace nowag::cpu {

struct TapeTable {
    // All of a step that is neither index_copy nor attention.
    void (*run)(const TapeStep& step);
    // The keys of a head from which on none is visible to any of its queries.
    int64_t (*visible_keys)(const TapeStep& step, int64_t batch, int64_t head);
    // One head's part of a step of attention, over its first `visible` keys.
    void (*attend)(const TapeStep& step, int64_t batch, int64_t head, int64_t visible);
};

extern const TapeTable kTapeScalar, kTapeAvx2, kTapeAvx512;

}  // namespace nowag::cpu
