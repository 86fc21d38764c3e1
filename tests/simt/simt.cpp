// The scheduler of simt.h: fibres, barriers, warp collectives.
#include "simt.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "the SIMT executor switches stacks with x86-64 instructions"
#endif

// Saves the callee-saved registers and the stack pointer of the caller, and resumes another stack.
extern "C" void simt_switch(void** save, void* resume);
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size simt_switch, .-simt_switch
)");

namespace simt {
namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr long kMostYields = 2'000'000;  // of one grid: beyond, it waits for what never comes

enum class State { ready, at_barrier, at_cluster_barrier, at_collective, done };

struct Block;

struct Copy {
    void* target;
    const void* source;
    size_t bytes;
};

struct Fibre {
    Block* block = nullptr;
    int lane = 0;
    void* stack_pointer = nullptr;
    unsigned char* stack = nullptr;
    void* fake_stack = nullptr;
    State state = State::done;
    uint3 thread{};
    Site site{};
    bool predicate = false;
    unsigned mask = 0;
    unsigned char mine[kLaneBytes];
    std::unique_ptr<Lanes[]> lanes;
    std::vector<std::vector<Copy>> copies;  // under way, by group; the last group is open
};

// A block that runs: its fibres, thread by thread.
struct Block {
    uint3 index{};
    std::vector<Fibre*> fibres;
    std::unique_ptr<unsigned char[]> shared;
    std::vector<Block>* alive = nullptr;  // those that run at once, this one among them
    Votes votes{};
    bool waits = false;  // all its threads are at a barrier of the cluster
    bool ended = false;
};

struct Engine {
    uint64_t seed = 0;
    uint64_t state = 0;
    long yields = 0;
    std::vector<std::unique_ptr<Fibre>> pool;
    Fibre* current = nullptr;
    void* scheduler_stack_pointer = nullptr;
    void* scheduler_fake_stack = nullptr;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_bytes = 0;
    const std::function<void()>* body = nullptr;
    bool clustered = false;

    // Sweeps of a block before another has its turn.
    uint64_t turns() { return clustered && seed > 1 ? uint64_t{1} << (random() % 8) : 1; }

    uint64_t random() {  // splitmix64
        uint64_t bits = (state += 0x9e3779b97f4a7c15u);
        bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
        bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
        return bits ^ (bits >> 31);
    }
};

Engine engine;

void announce_switch(void** save_fake, const void* stack, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(save_fake, stack, bytes);
#else
    (void)save_fake, (void)stack, (void)bytes;
#endif
}

void finish_switch(void* fake, const void** old_stack, size_t* old_bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, old_stack, old_bytes);
#else
    (void)fake, (void)old_stack, (void)old_bytes;
#endif
}

// Gives control back to the scheduler until this fibre is ready again.
void pause() {
    Fibre& self = *engine.current;
    const bool done = self.state == State::done;
    announce_switch(done ? nullptr : &self.fake_stack, engine.scheduler_stack,
                    engine.scheduler_stack_bytes);
    simt_switch(&self.stack_pointer, engine.scheduler_stack_pointer);
    finish_switch(self.fake_stack, nullptr, nullptr);
}

void fibre_main() {
    finish_switch(nullptr, &engine.scheduler_stack, &engine.scheduler_stack_bytes);
    (*engine.body)();
    for (const auto& group : engine.current->copies) {
        // On a device it would land whenever it likes, in memory used for something else by then.
        if (!group.empty()) {
            fail("a thread ended before its copy", {__FILE__, __LINE__, "start_copy"});
        }
    }
    engine.current->state = State::done;
    pause();
    std::abort();
}

void start(Fibre& fibre, Block& block, unsigned thread) {
    if (fibre.stack == nullptr) {
        void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) std::abort();
        fibre.stack = static_cast<unsigned char*>(memory);
        fibre.lanes = std::make_unique<Lanes[]>(1);
    }
    // simt_switch pops six registers and returns into fibre_main, whose frame then starts at an
    // address that is 8 modulo 16, as after a call.
    void** top = reinterpret_cast<void**>(fibre.stack + kStackBytes) - 2;
    *top = reinterpret_cast<void*>(fibre_main);
    std::fill(top - 6, top, nullptr);
    fibre.stack_pointer = top - 6;
    fibre.fake_stack = nullptr;
    fibre.state = State::ready;
    fibre.block = &block;
    fibre.copies.assign(1, {});
    fibre.lane = static_cast<int>(thread % kWarp);
    fibre.thread = {thread % blockDim.x, thread / blockDim.x % blockDim.y,
                    thread / blockDim.x / blockDim.y};
}

void resume(Fibre& fibre) {
    engine.current = &fibre;
    threadIdx = fibre.thread;
    blockIdx = fibre.block->index;
    announce_switch(&engine.scheduler_fake_stack, fibre.stack, kStackBytes);
    simt_switch(&engine.scheduler_stack_pointer, fibre.stack_pointer);
    finish_switch(engine.scheduler_fake_stack, nullptr, nullptr);
}

int poison() { return 0xff - static_cast<int>(engine.seed % 7) * 0x11; }

// Orders items as the seed says.
template <typename T>
void shuffle_items(std::vector<T>& items) {
    if (engine.seed == 1) std::reverse(items.begin(), items.end());
    if (engine.seed < 2) return;
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[engine.random() % i]);
}

[[noreturn]] void stuck(const Block& block) {
    for (const Fibre* fibre : block.fibres) {
        engine.current = const_cast<Fibre*>(fibre);
        if (fibre->state == State::at_barrier) {
            fail("a barrier not reached by every thread of the block", fibre->site);
        }
        if (fibre->state == State::at_cluster_barrier) {
            fail("a barrier not reached by every thread of the cluster", fibre->site);
        }
        if (fibre->state == State::at_collective) {
            fail("a collective not reached by every lane of its mask", fibre->site);
        }
    }
    std::abort();
}

// Lets the fibres of a block that are ready run, each until it waits; false if there were none.
bool sweep(Block& block) {
    std::vector<Fibre*> ready;
    for (Fibre* fibre : block.fibres) {
        if (fibre->state == State::ready) ready.push_back(fibre);
    }
    shuffle_items(ready);
    for (Fibre* fibre : ready) {
        if (fibre->state == State::ready) resume(*fibre);
    }
    return !ready.empty();
}

bool is_done(const Block& block) {
    return std::all_of(block.fibres.begin(), block.fibres.end(),
                       [](const Fibre* f) { return f->state == State::done; });
}

// Called when a block's threads are all at a barrier of the cluster: releases it once every block's
// are.
void advance_cluster(Block& block) {
    block.waits = true;
    const Fibre& first = *block.fibres.front();
    for (const Block& other : *block.alive) {
        if (other.ended) stuck(block);
        if (!other.waits) return;
        if (!(other.fibres.front()->site == first.site)) {
            engine.current = block.fibres.front();
            fail("blocks of a cluster at different barriers", first.site);
        }
    }
    for (Block& other : *block.alive) {
        other.waits = false;
        for (Fibre* fibre : other.fibres) fibre->state = State::ready;
    }
}

// Called when no fibre of the block is ready: releases the barrier that all its threads have
// reached, or marks the block as ended.
void advance(Block& block) {
    const auto& fibres = block.fibres;
    block.ended = is_done(block);
    if (block.ended) {
        for (const Block& other : *block.alive) {
            if (other.waits) stuck(other);
        }
        return;
    }
    const State state = fibres.front()->state;
    block.votes = {0, static_cast<int>(fibres.size())};
    for (const Fibre* fibre : fibres) {
        if (fibre->state != state || state == State::at_collective) stuck(block);
        if (!(fibre->site == fibres.front()->site)) {
            engine.current = const_cast<Fibre*>(fibre);
            fail("threads of a block at different barriers", fibre->site);
        }
        block.votes.count += fibre->predicate;
    }
    if (state == State::at_cluster_barrier) return advance_cluster(block);
    for (Fibre* fibre : fibres) fibre->state = State::ready;
}

// Runs blocks, all alive at once, to their end.
void run_blocks(const std::vector<uint3>& indices, size_t shared_bytes) {
    const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
    while (engine.pool.size() < indices.size() * threads) {
        engine.pool.push_back(std::make_unique<Fibre>());
    }
    std::vector<Block> blocks(indices.size());
    size_t used = 0;
    for (size_t b = 0; b < blocks.size(); ++b) {
        blocks[b].index = indices[b];
        blocks[b].shared = std::make_unique<unsigned char[]>(shared_bytes);
        blocks[b].alive = &blocks;
        std::memset(blocks[b].shared.get(), poison(), shared_bytes);
        for (unsigned t = 0; t < threads; ++t) {
            blocks[b].fibres.push_back(engine.pool[used++].get());
            start(*blocks[b].fibres.back(), blocks[b], t);
        }
    }
    for (size_t alive = blocks.size(); alive > 0;) {
        for (Block& block : blocks) {
            // One may be far ahead of the others, up to the next barrier of the cluster.
            for (uint64_t left = engine.turns(); left > 0; --left) {
                if (block.ended || block.waits) break;
                if (!sweep(block)) advance(block);
                alive -= block.ended;
            }
        }
    }
    engine.current = nullptr;
}

std::vector<uint3> block_order(dim3 grid) {
    std::vector<uint3> order;
    for (unsigned b = 0; b < grid.x * grid.y * grid.z; ++b) {
        order.push_back({b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y});
    }
    shuffle_items(order);
    return order;
}

void prepare(dim3 grid, dim3 block, const std::function<void()>& body) {
    engine.body = &body;
    engine.clustered = false;
    engine.yields = 0;
    gridDim = grid;
    blockDim = block;
}

}  // namespace

void set_seed(uint64_t value) {
    engine.seed = value;
    engine.state = value;
}

void fail(const char* what, const Site& site) {
    std::fprintf(stderr, "simt: %s: %s at %s:%d", what, site.operation, site.file, site.line);
    if (const Fibre* fibre = engine.current) {
        const uint3 block = fibre->block->index, thread = fibre->thread;
        std::fprintf(stderr, ", block (%u, %u, %u), thread (%u, %u, %u)", block.x, block.y, block.z,
                     thread.x, thread.y, thread.z);
    }
    std::fprintf(stderr, "\n");
    std::fflush(stderr);
    std::_Exit(3);
}

unsigned char* dynamic_shared() { return engine.current->block->shared.get(); }

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
    prepare(grid, block, body);
    for (const uint3 index : block_order(grid)) run_blocks({index}, shared_bytes);
}

void run_grid_together(dim3 grid, dim3 block, size_t shared_bytes,
                       const std::function<void()>& body) {
    prepare(grid, block, body);
    run_blocks(block_order(grid), shared_bytes);
}

void run_grid_in_clusters(dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes,
                          const std::function<void()>& body) {
    prepare(grid, block, body);
    engine.clustered = true;
    for (const uint3 first : block_order(dim3(grid.x / cluster))) {
        std::vector<uint3> indices;
        for (unsigned b = 0; b < cluster; ++b) indices.push_back({first.x * cluster + b, 0, 0});
        run_blocks(indices, shared_bytes);
    }
}

void cluster_barrier(const Site& site) {
    Fibre& self = *engine.current;
    self.state = State::at_cluster_barrier;
    self.site = site;
    self.predicate = false;
    pause();
}

const void* in_block(const void* shared, int rank) {
    const Block& self = *engine.current->block;
    const Site site{__FILE__, __LINE__, "in_block"};
    if (rank < 0 || static_cast<size_t>(rank) >= self.alive->size()) {
        fail("a block that the cluster lacks", site);
    }
    const Block& other = (*self.alive)[static_cast<size_t>(rank)];
    if (is_done(other)) fail("a look into a block that has ended", site);
    return other.shared.get() + (static_cast<const unsigned char*>(shared) - self.shared.get());
}

void yield() {
    if (++engine.yields > kMostYields) fail("waits for ever", {__FILE__, __LINE__, "yield"});
    pause();
}

Votes barrier(bool predicate, const Site& site) {
    Fibre& self = *engine.current;
    self.state = State::at_barrier;
    self.site = site;
    self.predicate = predicate;
    pause();
    return self.block->votes;
}

int lane() { return engine.current->lane; }

void start_copy(void* target, const void* source, size_t bytes) {
    const auto addresses =
        reinterpret_cast<uintptr_t>(target) | reinterpret_cast<uintptr_t>(source);
    if (addresses % bytes != 0) {
        fail("a copy whose addresses are not multiples of its size",
             {__FILE__, __LINE__, "start_copy"});
    }
    std::memset(target, poison(), bytes);
    engine.current->copies.back().push_back({target, source, bytes});
}

void commit_copies() { engine.current->copies.emplace_back(); }

void wait_for_copies(size_t pending) {
    auto& groups = engine.current->copies;
    while (groups.size() > pending + 1) {
        for (const Copy& copy : groups.front()) {
            std::memcpy(copy.target, copy.source, copy.bytes);
        }
        groups.erase(groups.begin());
    }
}

const Lanes& collect(unsigned mask, const void* mine, size_t bytes, const Site& site) {
    Fibre& self = *engine.current;
    if (!((mask >> self.lane) & 1u)) fail("a lane outside the mask it passes", site);
    self.state = State::at_collective;
    self.site = site;
    self.mask = mask;
    if (bytes > 0) std::memcpy(self.mine, mine, bytes);
    const uint3 t = self.thread;
    const size_t thread = t.x + blockDim.x * (t.y + blockDim.y * t.z);
    const size_t first = thread / kWarp * kWarp;
    const std::vector<Fibre*>& fibres = self.block->fibres;
    bool complete = true;
    for (size_t l = 0; l < kWarp; ++l) {
        if (!((mask >> l) & 1u)) continue;
        if (first + l >= fibres.size()) fail("a mask with a lane that the block lacks", site);
        const Fibre& other = *fibres[first + l];
        complete = complete && other.state == State::at_collective && other.mask == mask &&
                   other.site == site;
    }
    if (!complete) {
        pause();
        return self.lanes[0];
    }
    Lanes together;
    for (size_t l = 0; l < kWarp; ++l) {
        if ((mask >> l) & 1u) std::memcpy(together[l], fibres[first + l]->mine, kLaneBytes);
    }
    for (size_t l = 0; l < kWarp; ++l) {
        if (!((mask >> l) & 1u)) continue;
        std::memcpy(fibres[first + l]->lanes.get(), together, sizeof together);
        fibres[first + l]->state = State::ready;
    }
    return self.lanes[0];
}

}  // namespace simt
