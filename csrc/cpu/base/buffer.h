// Scratch memory of the drivers: uninitialised and aligned for any vector.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace nowag::cpu {

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

// `count` elements; throws std::bad_alloc if they cannot be had.
template <typename T>
Buffer<T> buffer(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    void* memory = std::aligned_alloc(64, bytes);
    if (memory == nullptr) throw std::bad_alloc();
    return Buffer<T>(static_cast<T*>(memory));
}

}  // namespace nowag::cpu
