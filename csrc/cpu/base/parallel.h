// Threads: OpenMP, with the number of threads that torch uses, passed in with each call.
#pragma once

#include <omp.h>

#include <atomic>
#include <cstdint>
#include <exception>

#include "cpu/base/interrupt.h"

namespace nowag::cpu {

// Calls body(index) for every index in [0, count), spread over threads. Which thread runs an index
// must not matter: bodies write to places of their own, or add integers. Polls before each body; a
// body of more than a tenth of a second polls too. An exception of a body, or of polling, comes out
// of here once every thread has stopped: the others do at their next body or poll.
template <typename Body>
void parallel_for(int64_t count, int threads, Body&& body) {
    if (threads <= 1 || count <= 1) {
        for (int64_t index = 0; index < count; ++index) {
            poll();
            body(index);
        }
        return;
    }
    const int team = static_cast<int>(count < threads ? count : threads);
    std::exception_ptr failure;
    std::atomic<bool> failed{false};
    const auto carry = [&](auto&& work) {
        try {
            work();
        } catch (...) {
#pragma omp critical(nowag_failure)
            if (!failed.exchange(true)) failure = std::current_exception();
        }
    };
    OthersAtWork others;
#pragma omp parallel num_threads(team)
    {
        const Heeding heeding(&failed);
        const bool calling = omp_get_thread_num() == 0;
        if (!calling) others.begin();
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t index = 0; index < count; ++index) {
            if (failed.load(std::memory_order_relaxed)) continue;
            carry([&] {
                poll();
                body(index);
            });
        }
        if (calling) {
            carry([&] { others.wait_polling(); });
        } else {
            others.end();
        }
    }
    if (failure) std::rethrow_exception(failure);
}

}  // namespace nowag::cpu
