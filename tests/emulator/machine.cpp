// Runs a grid: cluster by cluster, the fibers of one in turns, until all have ended or something is wrong.
#include "machine.h"

#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <memory>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulate {

std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<Block> blocks;
Fiber* self;
std::string error;
long bank_conflicts;
size_t dynamic_shared_bytes;
std::function<bool()> land_copy;

static std::unique_ptr<unsigned char[]> stacks, shared_memory;
static size_t stacks_bytes, shared_memory_bytes;
static ucontext_t scheduler;
static void (*kernel)();
static unsigned dice_state;

void pause() { swapcontext(&self->context, &scheduler); }

unsigned dice() {
    dice_state = dice_state * 1664525 + 1013904223;
    return dice_state >> 16;
}

void dawdle() {
    if (dice() % 4) return;
    self->state = Fiber::LATER;
    self->rounds = dice() % 16 ? dice() % 3 : 100;
    pause();
}

static std::string where() {
    return " (block " + std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y) + ", thread " +
           std::to_string(threadIdx.x) + "," + std::to_string(threadIdx.y) + ")";
}

void fail(const std::string& text) {
    if (error.empty()) error = text + where();
    for (;;) pause();
}

void fail(const char* text, const char* more) { fail(std::string(text) + more); }

unsigned char* shared() { return blocks[self->block].shared; }
int lane() { return self->lane; }
int lanes() { return warps[self->warp].lanes; }

void check_shared(const void* pointer, size_t bytes, const char* what) {
    const auto* start = static_cast<const unsigned char*>(pointer);
    const unsigned char* const shared = blocks[self->block].shared;
    if (start < shared || start + bytes > shared + dynamic_shared_bytes) {
        fail(std::string(what) + ": address outside the dynamic shared memory");
    }
    if (reinterpret_cast<uintptr_t>(pointer) % bytes) fail(std::string(what) + ": misaligned address");
}

Exchange* meet(const char* operation, void* in, void* out) {
    Warp& warp = warps[self->warp];
    if (warp.arrived == 0) warp.operation = operation;
    if (std::strcmp(warp.operation, operation)) {
        fail(std::string(operation) + ": other lanes of the warp are at " + warp.operation);
    }
    warp.exchange.in[self->lane] = in;
    warp.exchange.out[self->lane] = out;
    if (++warp.arrived < warp.lanes) {
        self->state = Fiber::IN_WARP;
        pause();
        return nullptr;
    }
    return &warp.exchange;
}

void part() {
    Warp& warp = warps[self->warp];
    warp.arrived = 0;
    for (int i = warp.first; i < warp.first + warp.lanes; ++i) {
        if (fibers[i].state == Fiber::IN_WARP) fibers[i].state = Fiber::READY;
    }
}

static void enter() {
    kernel();
    if (!self->products.empty() || !self->open_products.empty()) fail("the thread ends with products under way");
    if (!self->stores.empty()) fail("the thread ends with stores under way");
    self->state = Fiber::DONE;
    ++blocks[self->block].done;
    pause();
}

static void resume(Fiber& fiber) {
    self = &fiber;
    threadIdx = fiber.index;
    blockIdx = blocks[fiber.block].index;
    swapcontext(&scheduler, &fiber.context);
}

static bool can_run(const Fiber& fiber) {
    return fiber.state == Fiber::READY || (fiber.state == Fiber::IN_BARRIER && fiber.barrier->phase != fiber.phase);
}

// Opens the barriers at which all threads of a block, or of the cluster, are.
static bool open_barriers(int threads) {
    bool opened = false;
    auto open = [&](int first, int count, int state) {
        int waiting = 0, done = 0;
        for (int i = first; i < first + count; ++i) {
            waiting += fibers[i].state == state;
            done += fibers[i].state == Fiber::DONE;
        }
        if (!waiting || waiting + done < count) return;
        for (int i = first; i < first + count; ++i) {
            if (fibers[i].state == state) fibers[i].state = Fiber::READY;
        }
        opened = true;
    };
    for (size_t b = 0; b < blocks.size(); ++b) open(b * threads, threads, Fiber::IN_BLOCK);
    open(0, fibers.size(), Fiber::IN_CLUSTER);
    return opened;
}

static void run_cluster() {
    const int threads = blockDim.x * blockDim.y * blockDim.z, warps_of_block = (threads + 31) / 32;
    const int count = blocks.size();
    fibers.assign(count * threads, Fiber());
    warps.assign(count * warps_of_block, Warp());
    if (stacks_bytes < fibers.size() * STACK_BYTES) {
        stacks_bytes = fibers.size() * STACK_BYTES;
        stacks.reset(new unsigned char[stacks_bytes]);
    }
    if (shared_memory_bytes < count * SHARED_BYTES) {
        shared_memory_bytes = count * SHARED_BYTES;
        shared_memory.reset(new unsigned char[shared_memory_bytes + SHARED_BASE]);
    }
    unsigned char* const shared = shared_memory.get() + SHARED_BASE - reinterpret_cast<uintptr_t>(shared_memory.get()) % SHARED_BASE;
    std::memset(shared, GARBAGE, count * SHARED_BYTES);
    for (int b = 0; b < count; ++b) blocks[b].shared = shared + b * SHARED_BYTES;
    for (int i = 0; i < count * threads; ++i) {
        Fiber& fiber = fibers[i];
        const int thread = i % threads;
        fiber.index = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / (blockDim.x * blockDim.y)};
        fiber.block = i / threads;
        fiber.warp = fiber.block * warps_of_block + thread / 32;
        fiber.lane = thread % 32;
        fiber.state = Fiber::READY;
        if (fiber.lane == 0) warps[fiber.warp].first = i;
        ++warps[fiber.warp].lanes;
        getcontext(&fiber.context);
        fiber.context.uc_stack = {&stacks[i * STACK_BYTES], 0, STACK_BYTES};
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
    }
    for (bool forward = true;; forward = !forward) {
        // Every warp up to where it waits for others, now from the first to the last, then the other way round. A copy
        // arrives now and then, or when nothing else can happen.
        for (size_t w = 0; w < warps.size(); ++w) {
            const Warp& warp = warps[forward ? w : warps.size() - 1 - w];
            for (bool moved = true; moved;) {
                moved = false;
                for (int i = warp.first; i < warp.first + warp.lanes; ++i) {
                    if (!can_run(fibers[i])) continue;
                    fibers[i].state = Fiber::READY;
                    resume(fibers[i]);
                    if (!error.empty()) return;
                    moved = true;
                }
            }
        }
        bool more = false;
        for (Fiber& fiber : fibers) {
            more = more || fiber.state == Fiber::LATER || can_run(fiber);
            if (fiber.state == Fiber::LATER && fiber.rounds-- == 0) fiber.state = Fiber::READY;
        }
        if (more && land_copy && dice() % 2) land_copy();
        if (!more && !open_barriers(threads) && !(land_copy && land_copy())) break;
        if (!error.empty()) return;
    }
    for (int state : {Fiber::IN_WARP, Fiber::IN_BARRIER, Fiber::IN_NAMED, Fiber::IN_CLUSTER, Fiber::IN_BLOCK}) {
        for (const Fiber& fiber : fibers) {
            if (fiber.state != state || !error.empty()) continue;
            threadIdx = fiber.index, blockIdx = blocks[fiber.block].index;
            error = state == Fiber::IN_WARP ? "deadlock: some lanes of a warp never came to a warp-wide operation"
                    : state == Fiber::IN_BARRIER ? "deadlock: a phase of a barrier in shared memory never ends"
                    : state == Fiber::IN_NAMED   ? "deadlock: too few threads came to a named barrier"
                                                 : "deadlock: some threads never came to a barrier of all";
            error += where();
        }
    }
    for (const Block& block : blocks) {
        for (size_t i = dynamic_shared_bytes; i < SHARED_BYTES; ++i) {
            if (block.shared[i] != GARBAGE && error.empty()) error = "a write past the end of the shared memory";
        }
    }
    for (size_t w = 0; w < warps.size(); ++w) {
        if (warps[w].products != warps[w - w % warps_of_block % 4].products && error.empty()) {
            error = "the warps of a warpgroup did not begin the same products";
        }
    }
}

static sigjmp_buf rescue;

// An access to memory that the process does not have, such as the pages after the tests' arrays: ends the run.
static void stray(int, siginfo_t* info, void*) {
    char text[64];
    std::snprintf(text, sizeof(text), "stray access to global memory at %p", info->si_addr);
    if (error.empty()) error = text + where();
    siglongjmp(rescue, 1);
}

const char* run(dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster, void (*body)()) {
    error.clear();
    bank_conflicts = 0;
    land_copy = nullptr;
    dice_state = 1;
    kernel = body;
    gridDim = grid, blockDim = block, dynamic_shared_bytes = shared_bytes;
    if (shared_bytes > SHARED_BYTES) error = "more dynamic shared memory than any GPU has";
    if (grid.x % cluster) error = "a grid that clusters do not fill";
    struct sigaction action = {}, before;
    action.sa_sigaction = stray;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &action, &before);
    if (sigsetjmp(rescue, 1) == 0) {
        for (unsigned i = 0; i < grid.x / cluster * grid.y * grid.z && error.empty(); ++i) {
            const unsigned x = i % (grid.x / cluster) * cluster, yz = i / (grid.x / cluster);
            blocks.assign(cluster, Block());
            for (unsigned c = 0; c < cluster; ++c) blocks[c].index = {x + c, yz % grid.y, yz / grid.y};
            run_cluster();
        }
    }
    sigaction(SIGSEGV, &before, nullptr);
    return error.empty() ? nullptr : error.c_str();
}

}  // namespace emulate

extern "C" long bank_conflicts() { return emulate::bank_conflicts; }
