// A thread-block cluster on one CPU thread, for the code of csrc/cuda/walk.h: every device thread is a fiber.
//
// Fibers change where a device thread could wait, in an order drawn anew each round. With a seed other than 0 now and then one,
// or a whole block, sleeps for many rounds while the others run as far ahead as the barriers let them. A bulk copy spoils its
// target at once and lands at some later round, so that whoever reads too early, or still needs what was there, meets NaN.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#define __device__
#define __forceinline__ inline

namespace device {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10;

void yield();
void fail(const char* what) {
    std::fprintf(stderr, "cluster_device: %s\n", what);
    std::abort();
}

// Opens when `size` fibers are at it.
struct Meeting {
    int size = 0, present = 0, generation = 0;

    void arrive_and_wait() {
        const int mine = generation;
        if (++present == size) present = 0, ++generation;
        while (generation == mine) yield();
    }
};

struct Warp {
    Meeting meeting{kWarp};
    uint32_t slots[2][kWarp];
};

struct Block {
    int rank;
    Meeting meeting;
    std::vector<Warp> warps;
    void* shared;
    int asleep = 0;
};

struct Index {
    unsigned x;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    Index index;
    Block* block;
    int shuffles = 0, asleep = 0;
    bool done = false;
};

// An mbarrier of one arrival: the phase in progress, and what it still waits for.
struct Arrival {
    uint32_t phase = 0;
    int64_t bytes = 0;
    bool announced = false;

    void settle() {
        if (announced && bytes == 0) announced = false, ++phase;
    }
};

struct Copy {
    void* to;
    const void* from;
    uint32_t bytes;
    uint64_t* barrier;
};

struct Cluster {
    int64_t index, count;
    Meeting meeting;
    std::vector<Block> blocks;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::map<uint64_t*, Arrival> arrivals;
    std::vector<Copy> copies;
    std::mt19937 dice;
    bool sleepy;
    ucontext_t scheduler;
    Fiber* current = nullptr;
    std::function<void(Block&)> program;

    void land(size_t i) {
        const Copy copy = copies[i];
        copies.erase(copies.begin() + i);
        std::memcpy(copy.to, copy.from, copy.bytes);
        Arrival& arrival = arrivals[copy.barrier];
        arrival.bytes -= copy.bytes;
        arrival.settle();
    }

    // Whether what had `rounds` to sleep does not run this time; once in a while it goes to sleep.
    bool sleeps(int& rounds, unsigned once_in) {
        if (rounds > 0) return --rounds > 0;
        if (sleepy && dice() % once_in == 0) rounds = dice() % 200;
        return rounds > 0;
    }

    // One round: each fiber that is awake goes as far as it can, and some copies land.
    bool round() {
        std::shuffle(fibers.begin(), fibers.end(), dice);
        for (Block& block : blocks) sleeps(block.asleep, 100);
        bool alive = false;
        for (auto& fiber : fibers) {
            if (fiber->done) continue;
            alive = true;
            if (fiber->block->asleep > 0 || sleeps(fiber->asleep, 20000)) continue;
            current = fiber.get();
            swapcontext(&scheduler, &current->context);
        }
        for (size_t i = copies.size(); i-- > 0;) {
            if (dice() % 3 == 0) land(i);
        }
        return alive;
    }
};

Cluster* cluster = nullptr;

void yield() { swapcontext(&cluster->current->context, &cluster->scheduler); }

void enter() {
    cluster->program(*cluster->current->block);
    cluster->current->done = true;
    yield();
}

// Runs `program` in every thread of a cluster; `shared` is where each block's shared memory is.
void launch(
    int64_t index, int64_t count, int threads, const std::vector<void*>& shared, unsigned seed,
    std::function<void(Block&)> program
) {
    Cluster here{};
    here.index = index, here.count = count;
    here.meeting.size = threads * int(shared.size());
    here.dice.seed(seed * unsigned(count) + unsigned(index));
    here.sleepy = seed != 0;
    here.program = std::move(program);
    for (size_t rank = 0; rank < shared.size(); ++rank) {
        here.blocks.push_back({int(rank), {threads}, std::vector<Warp>(threads / kWarp), shared[rank]});
    }
    for (Block& block : here.blocks) {
        for (int i = 0; i < threads; ++i) {
            auto fiber = std::make_unique<Fiber>();
            getcontext(&fiber->context);
            fiber->context.uc_stack = {fiber->stack.get(), 0, kStack};
            fiber->index = {unsigned(i)};
            fiber->block = &block;
            makecontext(&fiber->context, enter, 0);
            here.fibers.push_back(std::move(fiber));
        }
    }
    cluster = &here;
    int rounds = 0;
    while (here.round()) {
        if (++rounds > 1000000) fail("no end: the threads wait for each other");
    }
    if (!here.copies.empty()) fail("a copy nobody waited for");
    cluster = nullptr;
}

}  // namespace device

#define threadIdx (device::cluster->current->index)

inline void __syncthreads() { device::cluster->current->block->meeting.arrive_and_wait(); }

template <typename Value>
Value __shfl_xor_sync(unsigned, Value value, int mask) {
    device::Fiber& fiber = *device::cluster->current;
    device::Warp& warp = fiber.block->warps[fiber.index.x / device::kWarp];
    const int lane = fiber.index.x % device::kWarp, turn = fiber.shuffles++ % 2;
    std::memcpy(&warp.slots[turn][lane], &value, 4);
    warp.meeting.arrive_and_wait();
    std::memcpy(&value, &warp.slots[turn][lane ^ mask], 4);
    return value;
}

namespace kdfast {
namespace cluster {

using std::min;

inline int cluster_rank() { return device::cluster->current->block->rank; }
inline int cluster_blocks() { return int(device::cluster->blocks.size()); }
inline int64_t cluster_index() { return device::cluster->index; }
inline int64_t cluster_count() { return device::cluster->count; }
inline void cluster_barrier(bool) { device::cluster->meeting.arrive_and_wait(); }

template <typename Value>
void put_in(Value* at, int rank, const Value& value) {
    const auto offset = reinterpret_cast<char*>(at) - static_cast<char*>(device::cluster->current->block->shared);
    std::memcpy(static_cast<char*>(device::cluster->blocks[rank].shared) + offset, &value, sizeof(Value));
}

inline void barrier_start(uint64_t* barrier) { device::cluster->arrivals[barrier] = {}; }
inline void barriers_started() {}

inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
    device::Arrival& arrival = device::cluster->arrivals.at(barrier);
    if (arrival.announced) device::fail("a chunk was asked for before the last one had arrived");
    arrival.announced = true;
    arrival.bytes += bytes;
    arrival.settle();
}

inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
    while (device::cluster->arrivals.at(barrier).phase % 2 == parity) device::yield();
}

inline uint64_t read_once() { return 0; }
inline void prefetch(const void*) {}

inline void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier, uint64_t) {
    if (uintptr_t(to) % 16 || uintptr_t(from) % 16 || bytes % 16) device::fail("a bulk copy is not aligned to 16 bytes");
    std::memset(to, 0xff, bytes);
    device::cluster->copies.push_back({to, from, bytes, barrier});
}

}  // namespace cluster
}  // namespace kdfast
