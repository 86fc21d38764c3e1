// What a kernel's entry point returns. Inside: a code. Outside (bindings/): one sentence.
#pragma once

namespace nowag {

enum class Status : int {
    ok = 0,
    invalid_argument = 1,  // a size, pointer or setting outside the contract in the header
    unsupported = 2,       // legal by the contract, but this build or machine cannot run it
    out_of_memory = 3,     // scratch memory could not be had; nothing was written
    interrupted = 4,       // on the caller's own wish (CPU); what was written is of no use
};

}  // namespace nowag
