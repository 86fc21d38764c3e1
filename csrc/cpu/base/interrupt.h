// How a long loop learns that its result is not wanted any more: Ctrl-C, or any signal whose
// handler raises.
#pragma once

#include <atomic>
#include <cstdint>

namespace nowag::cpu {

// What poll() throws. parallel_for carries it out as it does every exception; at the entry point it
// becomes Status::interrupted.
struct Interrupted {};

// Asks whether the call under way shall end. Kernels know no Python: bindings/ sets who answers,
// once, before any call. It may be asked on any thread, and says no where that is not the one to
// ask.
using InterruptCheck = bool (*)();
void set_interrupt_check(InterruptCheck check);

// Throws Interrupted if the call shall end, or if another thread of its team has failed. Takes a
// few nanoseconds, since it looks at a coarse clock and asks every 50 ms only: a loop calls it
// wherever it has done work for a microsecond or more, and does so within a tenth of a second.
void poll();

// While it lives, poll() on this thread also looks at `stop`; null: at none.
class Heeding {
  public:
    explicit Heeding(const std::atomic<bool>* stop);
    ~Heeding();
    Heeding(const Heeding&) = delete;
    Heeding& operator=(const Heeding&) = delete;

  private:
    const std::atomic<bool>* const before_;
};

// What is left for the calling thread to do once its part is done and others, which nobody asks
// about signals, are still at theirs.
class OthersAtWork {
  public:
    OthersAtWork();

    // By each of the others, around its part.
    void begin() { count_.fetch_add(1, std::memory_order_relaxed); }
    void end() { count_.fetch_sub(1, std::memory_order_relaxed); }

    // Polls until they are done, unless the work has been short so far: what is left of it is then
    // short as well, and the wait at the end of the region ends sooner.
    void wait_polling() const;

  private:
    const int64_t start_;
    std::atomic<int> count_{0};
};

}  // namespace nowag::cpu
