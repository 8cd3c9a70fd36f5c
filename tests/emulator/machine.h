// The emulator's machine, for its own sources: a cluster's fibers, and what each waits for.
#pragma once

#include <algorithm>
#include <cmath>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <ucontext.h>
#include <vector>

#include "emulate.h"

namespace emulate {

constexpr size_t STACK_BYTES = 64 << 10;
constexpr size_t SHARED_BYTES = 228 << 10;
// 32-bit addresses of shared memory: the rank of a block in its cluster, and an offset. The system has the first KiB.
constexpr unsigned RANK_SHIFT = 24, SHARED_BASE = 1024;
constexpr unsigned char GARBAGE = 0xa5;

struct Copy {
    unsigned char* to;
    const unsigned char* from;
    bool valid;
};

// A barrier in shared memory that counts arrivals and bytes (mbarrier).
struct Barrier {
    int count, pending;
    long bytes;  // announced, not arrived
    unsigned phase;
    bool visible;  // to the copy engine
};

// A named barrier: threads that have come, and how many it waits for.
struct Named {
    int arrived, threads;
};

// Products under way, and the registers that they write.
struct Accumulator {
    unsigned* registers;
    int under_way;
    std::vector<unsigned> values;
};
struct Operand {  // in shared memory
    unsigned long long descriptor;
    std::vector<unsigned char> was;
};
struct Product {
    unsigned* accumulator;
    const unsigned* a;  // registers, or null
    unsigned a_was[4];
    std::vector<Operand> shared;
};

// A copy from shared memory that is under way.
struct Store {
    unsigned char map[128];
    int at[2];
    unsigned address;
    std::vector<unsigned char> bytes;
};

struct Fiber {
    ucontext_t context;
    dim3 index;
    int block, warp, lane;
    enum { READY, LATER, IN_WARP, IN_BLOCK, IN_CLUSTER, IN_NAMED, IN_BARRIER, DONE } state;
    int rounds;              // LATER
    int named;               // IN_NAMED
    const Barrier* barrier;  // IN_BARRIER: until this phase is over
    unsigned phase;
    std::vector<Copy> open;               // copies since the last commit
    std::deque<std::vector<Copy>> groups;  // committed, not arrived
    std::vector<Accumulator> accumulators;
    std::vector<Product> open_products;
    std::deque<std::vector<Product>> products;
    std::vector<Store> stores;  // under way
    bool unfenced;  // wrote to shared memory what the copy engine may not see yet
    bool fenced;
};

struct Warp {
    const char* operation;
    int arrived, lanes, first;
    Exchange exchange;
    int products;
};

struct Block {
    dim3 index;
    int done;
    unsigned char* shared;
    std::map<unsigned, Barrier> barriers;
    Named named[16];
};

extern std::vector<Fiber> fibers;
extern std::vector<Warp> warps;
extern std::vector<Block> blocks;  // those of a cluster, all at once
extern Fiber* self;
extern std::string error;
extern long bank_conflicts;
extern size_t dynamic_shared_bytes;
extern std::function<bool()> land_copy;  // lets something asynchronous happen; false: there is nothing

void pause();
// Numbers without a pattern, the same in every run.
unsigned dice();
// Others may come first, at times by far: for the places where a kernel hands something over.
void dawdle();
[[noreturn]] void fail(const std::string& text);
void check_shared(const void* pointer, size_t bytes, const char* what);

}  // namespace emulate
