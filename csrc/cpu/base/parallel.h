// Threads: OpenMP, with the number of threads that torch uses, passed in with each call.
#pragma once

#include <cstdint>
#include <exception>

namespace nowag::cpu {

// Calls body(index) for every index in [0, count), spread over threads. Which thread runs an index
// must not matter: bodies write to places of their own, or add integers. An exception of a body
// comes out of here, once every thread has stopped.
template <typename Body>
void parallel_for(int64_t count, int threads, Body&& body) {
    if (threads <= 1 || count <= 1) {
        for (int64_t index = 0; index < count; ++index) body(index);
        return;
    }
    const int team = static_cast<int>(count < threads ? count : threads);
    std::exception_ptr failure;
#pragma omp parallel for num_threads(team) schedule(dynamic, 1)
    for (int64_t index = 0; index < count; ++index) {
        try {
            body(index);
        } catch (...) {
#pragma omp critical(nowag_failure)
            failure = std::current_exception();
        }
    }
    if (failure) std::rethrow_exception(failure);
}

}  // namespace nowag::cpu
