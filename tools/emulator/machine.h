// The emulated GPU: blocks of fibers, a scheduler that picks the next thread at random, barriers, warp collectives and
// asynchronous copies. Where hardware leaves the behaviour undefined, the emulator raises an error or does the worst case.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "fibers.h"

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emu {

// Odd seeds give warps random priorities, so that some run far ahead of others; even seeds pick all threads equally often.
struct Options {
    uint64_t seed = 1;          // for the next launch; each launch adds one
    bool early_copies = false;  // some asynchronous copies arrive at once, the others as late as allowed
    size_t stack_bytes = 64 << 10;
    bool running = true;  // false: a launch returns at once, to time the code before it
    int processors = 3;   // multiprocessors of the first device
};
inline Options options;

struct Copy {
    void* to;
    const void* from;
    int bytes;
    int group;
};

struct Block;

struct Fiber : Context {
    Block* block = nullptr;
    dim3 index;
    int id = 0, lane = 0, warp = 0;
    const char* waits_for = "";
    std::vector<Copy> copies;  // those that have not arrived
    int group = 0;             // the group that new copies join
    int spins = 0;             // reads of another block's flag since the last barrier
};

struct Warp {
    void* arguments[32];
    int arrived = 0;
    unsigned mask = 0;
    const char* operation = nullptr;
    uint64_t priority = 0;
    std::vector<Fiber*> waiting;
};

struct Block {
    dim3 index;
    unsigned char* shared = nullptr;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<Fiber*> at_barrier;
    int barriers = 0;  // passed so far
    char met[2] = {};  // ThreadSanitizer's sync objects of even and odd barriers: some threads reach the next one before
                       // others leave the last
    int live = 0;
};

struct Grid {
    dim3 grid, block;
    std::function<void()> body;
    std::deque<Block> resident;
    std::vector<Fiber*> ready;
    int live = 0;
    uint64_t random_state = 1;
    Fiber host;
    bool together = false;  // all blocks are resident: a cooperative launch
    unsigned met = 0;       // arrivals of blocks at the grid's barriers
    std::string error;

    uint64_t random() {
        random_state ^= random_state << 13;
        random_state ^= random_state >> 7;
        random_state ^= random_state << 17;
        return random_state;
    }
};
inline Grid* grid = nullptr;
inline Fiber* self = nullptr;
inline std::string last_error;         // of the last launch
inline bool error_is_reported = true;  // by cudaGetLastError; until then later launches report it, too

EMU_OUTLINE inline void go_to(Fiber& next) {
    Fiber* me = self;
    self = &next;
    if (me->done) {  // it never continues, so its IgnoreAccesses is not destroyed
        EMU_TSAN(AnnotateIgnoreWritesEnd("", 0); AnnotateIgnoreReadsEnd("", 0);)
    }
    switch_context(*me, next);
}

inline Warp& warp_of(const Fiber& fiber) { return fiber.block->warps[fiber.warp]; }

// Continues a ready fiber. If there is none, the grid is done, or all fibers wait for one another.
EMU_OUTLINE inline void run_next(bool prioritised) {
    auto& ready = grid->ready;
    if (ready.empty()) {
        if (grid->live > 0) {
            grid->error = "deadlock:";
            for (auto& block : grid->resident) {
                for (auto& f : block.fibers) {
                    if (!f.done && grid->error.size() < 300) grid->error += " t" + std::to_string(f.id) + "@" + f.waits_for;
                }
            }
        }
        return go_to(grid->host);
    }
    size_t pick = grid->random() % ready.size();
    if (prioritised) {
        if (grid->random() % 512 == 0) warp_of(*ready[pick]).priority = grid->random();
        const size_t start = pick;
        for (size_t i = 0; i < ready.size(); ++i) {
            const size_t other = start + i < ready.size() ? start + i : start + i - ready.size();
            if (warp_of(*ready[other]).priority > warp_of(*ready[pick]).priority) pick = other;
        }
    }
    Fiber* next = ready[pick];
    ready[pick] = ready.back();
    ready.pop_back();
    if (next != self) go_to(*next);
}
EMU_OUTLINE inline void run_next() { run_next(options.seed & 1); }

// Stops the grid with an error.
EMU_OUTLINE inline void fail(const std::string& message) {
    grid->error = message + " (thread " + std::to_string(self->id) + ")";
    go_to(grid->host);
}

// Called before a read of memory that another block will write: lets others run first, whatever the reader's priority.
EMU_OUTLINE inline void spin() {
    IgnoreAccesses guard;
    if (++self->spins > 1000000) return fail("a thread waits for ever for another block");
    grid->ready.push_back(self);
    run_next(false);
}

EMU_OUTLINE inline void release(std::vector<Fiber*>& waiting) {
    for (Fiber* f : waiting) grid->ready.push_back(f);
    waiting.clear();
}

EMU_OUTLINE inline void block_barrier() {
    Block& block = *self->block;
    [[maybe_unused]] char* met = &block.met[block.barriers % 2];
    EMU_TSAN(__tsan_release(met);)
    {
        IgnoreAccesses guard;
        if (block.live < static_cast<int>(block.fibers.size())) return fail("__syncthreads after other threads have exited");
        block.at_barrier.push_back(self);
        self->waits_for = "__syncthreads";
        if (static_cast<int>(block.at_barrier.size()) == block.live) {
            ++block.barriers;
            release(block.at_barrier);
        }
        run_next();
    }
    EMU_TSAN(__tsan_acquire(met);)
    self->spins = 0;
}

// Waits for all lanes of the mask; the last one to arrive runs the operation for all of them.
template <class Run>
EMU_OUTLINE inline void collective(const char* operation, unsigned mask, void* argument, Run run) {
    IgnoreAccesses guard;
    Warp& warp = warp_of(*self);
    if (!(mask >> self->lane & 1)) return fail(std::string(operation) + ": the calling lane is not in its mask");
    if (warp.arrived > 0 && (warp.operation != operation || warp.mask != mask)) {
        return fail(std::string("warp diverged: ") + operation + " while others are in " + warp.operation);
    }
    warp.operation = operation;
    warp.mask = mask;
    warp.arguments[self->lane] = argument;
    self->waits_for = operation;
    if (++warp.arrived == __builtin_popcount(mask)) {
        run(warp);
        warp.arrived = 0;
        release(warp.waiting);
        return;
    }
    warp.waiting.push_back(self);
    run_next();
}

inline void touch_read([[maybe_unused]] const void* p, [[maybe_unused]] int bytes) {
    EMU_TSAN(__tsan_read_range(const_cast<void*>(p), bytes);)
}
inline void touch_write([[maybe_unused]] void* p, [[maybe_unused]] int bytes) { EMU_TSAN(__tsan_write_range(p, bytes);) }

EMU_OUTLINE inline void arrive(const Copy& copy) {
    if (copy.bytes > 0) memcpy(copy.to, copy.from, copy.bytes);
    memset(static_cast<char*>(copy.to) + copy.bytes, 0, 16 - copy.bytes);
}

EMU_OUTLINE inline void start_copy(void* to, const void* from, int bytes) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) return fail("cp.async: misaligned");
    if (bytes < 0 || bytes > 16) return fail("cp.async: not 0 .. 16 bytes");
    touch_write(to, 16);  // from here on it may arrive at any time
    IgnoreAccesses guard;
    const Copy copy{to, from, bytes, self->group};
    if (options.early_copies && grid->random() % 2) {
        arrive(copy);
    } else {
        self->copies.push_back(copy);
    }
}

EMU_OUTLINE inline void wait_for_copies(int newest) {
    const int last = self->group - newest;
    for (auto& copy : self->copies) {
        if (copy.group >= last) continue;
        touch_read(copy.from, copy.bytes);
        touch_write(copy.to, 16);
    }
    IgnoreAccesses guard;
    std::vector<Copy> later;
    for (auto& copy : self->copies) {
        if (copy.group < last) {
            arrive(copy);
        } else {
            later.push_back(copy);
        }
    }
    self->copies.swap(later);
}

inline char all_done;  // ThreadSanitizer's sync object of the fibers' ends and the host

EMU_OUTLINE inline void fiber_main() {
    EMU_ASAN(__sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);)
    EMU_TSAN(__tsan_acquire(&options);)
    grid->body();
    EMU_TSAN(__tsan_release(&all_done);)
    IgnoreAccesses guard;
    self->done = true;
    --grid->live;
    --self->block->live;
    if (!self->block->at_barrier.empty() && grid->error.empty()) {
        grid->error = "thread " + std::to_string(self->id) + " exits while others wait in __syncthreads";
    }
    if (!self->copies.empty() && grid->error.empty()) grid->error = "a thread exits before its cp.async has arrived";
    if (!grid->error.empty()) go_to(grid->host);
    run_next();
    abort();
}

EMU_OUTLINE inline void add_block(Grid& g, unsigned number, char* stacks, unsigned char* shared) {
    Block& block = g.resident.emplace_back();
    block.index = dim3(number % g.grid.x, number / g.grid.x % g.grid.y, number / g.grid.x / g.grid.y);
    block.shared = shared;
    const int threads = static_cast<int>(g.block.x * g.block.y * g.block.z);
    block.fibers.resize(threads);
    block.warps.resize((threads + 31) / 32);
    for (auto& warp : block.warps) warp.priority = g.random();
    for (int i = 0; i < threads; ++i) {
        Fiber& f = block.fibers[i];
        f.block = &block;
        f.id = i;
        f.lane = i % 32;
        f.warp = i / 32;
        f.index = dim3(i % g.block.x, i / g.block.x % g.block.y, i / g.block.x / g.block.y);
        prepare(f, stacks + options.stack_bytes * i, options.stack_bytes, fiber_main);
        g.ready.push_back(&f);
    }
    g.live += threads;
    block.live = threads;
}

// Runs a grid: its blocks in random order, all of them at the same time in a cooperative launch, otherwise one by one.
EMU_OUTLINE inline void launch(dim3 grid_size, dim3 block_size, size_t shared_bytes, bool together,
                               std::function<void()> body) {
    if (!options.running) return;
    EMU_TSAN(__tsan_release(&options);)
    IgnoreAccesses guard;
    const auto owner = std::make_unique<Grid>();  // not on the host's stack, whose memory is reused
    Grid& g = *owner;
    grid = &g;
    g.grid = grid_size;
    g.block = block_size;
    g.body = std::move(body);
    g.together = together;
    g.random_state = options.seed * 0x9E3779B97F4A7C15ull | 1;
    last_error.clear();
    EMU_TSAN(g.host.tsan = __tsan_get_current_fiber();)
    std::vector<unsigned> order(grid_size.x * grid_size.y * grid_size.z);
    for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[g.random() % i]);

    const size_t threads = block_size.x * block_size.y * block_size.z, at_once = together ? order.size() : 1;
    const size_t shared_room = (shared_bytes + 4095) / 4096 * 4096, room = options.stack_bytes * threads + shared_room;
    for (size_t first = 0; first < order.size() && last_error.empty(); first += at_once) {
        const Mapping memory(room * at_once);  // new for each block, so that sanitizers forget the last one's stacks
        g.resident.clear();
        g.ready.clear();
        g.live = 0;
        for (size_t i = 0; i < at_once; ++i) {
            char* base = memory.data() + room * i;
            char* end = base + room - shared_bytes;  // at the mapping's end, aligned down
            auto* shared = reinterpret_cast<unsigned char*>(end - reinterpret_cast<uintptr_t>(end) % 128);
            memset(shared, 0xff, shared_bytes);  // NaN in every dtype, so that reads of unwritten memory show
            add_block(g, order[first + i], base, shared);
        }
        self = &g.host;
        run_next();
        EMU_TSAN(for (auto& block : g.resident) for (auto& f : block.fibers) __tsan_destroy_fiber(f.tsan);)
        if (g.error.empty()) continue;
        last_error = "block " + std::to_string(order[first]) + ": " + g.error;
        error_is_reported = false;
    }
    grid = nullptr;
    ++options.seed;
    EMU_TSAN(__tsan_acquire(&all_done);)
}

}  // namespace emu
