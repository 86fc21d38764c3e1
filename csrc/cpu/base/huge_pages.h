// Large outputs that are written for the first time: faulting their memory in by 4 KiB pages takes
// longer than the kernels that fill it.
#pragma once

#include <sys/mman.h>

#include <cstdint>

namespace nowag::cpu {

// Asks the system for 2 MiB pages in [data, data + bytes). Only a hint: nothing else changes.
inline void advise_huge_pages(void* data, int64_t bytes) {
    constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
    const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t last = (begin + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

}  // namespace nowag::cpu
