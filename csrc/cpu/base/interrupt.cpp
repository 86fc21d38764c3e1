#include "cpu/base/interrupt.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <ctime>
#include <thread>

namespace nowag::cpu {
namespace {

// Nanoseconds.
constexpr int64_t kInterval = 50'000'000;
constexpr int64_t kShort = 20'000'000;
// Of the time that has passed: what noticing that others are done may take.
constexpr int64_t kWaitShare = 128;

InterruptCheck interrupt_check = nullptr;

thread_local const std::atomic<bool>* heeded = nullptr;
thread_local int64_t next_check = 0;

// Of a few milliseconds' resolution, and read without leaving the process.
int64_t coarse_nanoseconds() {
    timespec now{};
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

}  // namespace

void set_interrupt_check(InterruptCheck check) { interrupt_check = check; }

void poll() {
    if (heeded != nullptr && heeded->load(std::memory_order_relaxed)) throw Interrupted{};
    const int64_t now = coarse_nanoseconds();
    if (now < next_check || interrupt_check == nullptr) return;
    next_check = now + kInterval;
    // A signal handler may call operations of its own, which another's failure must not end.
    const Heeding none(nullptr);
    if (interrupt_check()) throw Interrupted{};
}

Heeding::Heeding(const std::atomic<bool>* stop) : before_(heeded) { heeded = stop; }

Heeding::~Heeding() { heeded = before_; }

OthersAtWork::OthersAtWork() : start_(coarse_nanoseconds()) {}

void OthersAtWork::wait_polling() const {
    while (count_.load(std::memory_order_relaxed) > 0) {
        const int64_t passed = coarse_nanoseconds() - start_;
        if (passed < kShort) return;
        poll();
        std::this_thread::sleep_for(
            std::chrono::nanoseconds(std::min(passed / kWaitShare, kInterval)));
    }
}

}  // namespace nowag::cpu
