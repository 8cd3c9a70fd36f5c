// A CUDA kernel's grid on the CPU, for tests: what the device code of cuda/ needs of the language and of the hardware.
//
// Every thread of a cluster's blocks is a fiber; it runs until it waits: for its warp (ldmatrix, mma, shuffles), for its
// block (__syncthreads), or for what emulate_sm90.h adds. The hardware is imitated strictly: the bytes of an asynchronous copy arrive at the wait for its
// group and are garbage until then; shared memory starts as garbage; misaligned or stray addresses, diverged warps and
// deadlocks are errors, and bank conflicts of ldmatrix are counted. Not seen: races between warps other than those that
// two orders of the warps show, and anything about speed.
#pragma once

#include <csetjmp>
#include <csignal>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define HAS_MMA_BF16 1
#define DYNAMIC_SHARED(name) unsigned char* const name = emulate::blocks[emulate::self->block].shared
#define SWIZZLED_SHARED(name) DYNAMIC_SHARED(name)

struct dim3 {
    unsigned x, y, z;
};
static dim3 threadIdx, blockIdx, blockDim, gridDim;
static const int warpSize = 32;

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
    int at[4];
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
    void *in[32], *out[32];
    int products;
};

struct Block {
    dim3 index;
    int done;
    unsigned char* shared;
    std::map<unsigned, Barrier> barriers;
    Named named[16];
};

static std::unique_ptr<unsigned char[]> stacks, shared_memory;
static size_t stacks_bytes, shared_memory_bytes;
static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static std::vector<Block> blocks;  // those of a cluster, all at once
static Fiber* self;
static ucontext_t scheduler;
static std::function<void()> kernel;
static std::string error;
static long bank_conflicts;
static unsigned dice_state;
static size_t dynamic_shared_bytes;
static std::function<bool()> land_copy;  // lets something asynchronous happen; false: there is nothing

static void pause() { swapcontext(&self->context, &scheduler); }

// Numbers without a pattern, the same in every run.
static unsigned dice() {
    dice_state = dice_state * 1664525 + 1013904223;
    return dice_state >> 16;
}

// Others may come first, at times by far: for the places where a kernel hands something over.
static void dawdle() {
    if (dice() % 4) return;
    self->state = Fiber::LATER;
    self->rounds = dice() % 16 ? dice() % 3 : 100;
    pause();
}

static std::string where() {
    return " (block " + std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y) + ", thread " +
           std::to_string(threadIdx.x) + "," + std::to_string(threadIdx.y) + ")";
}

// Ends the run: the caller is never resumed.
[[noreturn]] static void fail(const std::string& text) {
    if (error.empty()) error = text + where();
    for (;;) pause();
}

static void check_shared(const void* pointer, size_t bytes, const char* what) {
    const auto* start = static_cast<const unsigned char*>(pointer);
    const unsigned char* const shared = blocks[self->block].shared;
    if (start < shared || start + bytes > shared + dynamic_shared_bytes) {
        fail(std::string(what) + ": address outside the dynamic shared memory");
    }
    if (reinterpret_cast<uintptr_t>(pointer) % bytes) fail(std::string(what) + ": misaligned address");
}

// All lanes of a warp hand in a value and take one away; the last to arrive computes `apply(in, out)` for all.
template <class In, class Out, class Apply>
static void collective(const char* operation, In& in, Out& out, Apply apply) {
    Warp& warp = warps[self->warp];
    if (warp.arrived == 0) warp.operation = operation;
    if (warp.operation != operation) {
        fail(std::string(operation) + ": other lanes of the warp are at " + warp.operation);
    }
    warp.in[self->lane] = &in;
    warp.out[self->lane] = &out;
    if (++warp.arrived < warp.lanes) {
        self->state = Fiber::IN_WARP;
        pause();
        return;
    }
    apply(reinterpret_cast<In**>(warp.in), reinterpret_cast<Out**>(warp.out));
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

// Null, or the text of what went wrong. `cluster` neighbours along x are blocks of a cluster.
static const char* run(dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster, std::function<void()> body) {
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

// ---- Vector types

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(4) char4 {
    signed char x, y, z, w;
};
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline char4 make_char4(signed char x, signed char y, signed char z, signed char w) { return {x, y, z, w}; }

// ---- Arithmetic. The build has -ffp-contract=off, so the plain operators round once each.

using std::max;
using std::min;
static inline unsigned min(unsigned a, int b) { return min(a, static_cast<unsigned>(b)); }
static inline unsigned max(unsigned a, int b) { return max(a, static_cast<unsigned>(b)); }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __frcp_rn(float a) { return 1.0f / a; }
static inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
static inline float __int2float_rn(int a) { return static_cast<float>(a); }
// NaN becomes 0 and what does not fit saturates, as on the GPU.
static inline int __float2int_rn(float a) {
    if (std::isnan(a)) return 0;
    const double rounded = std::nearbyint(static_cast<double>(a));
    return static_cast<int>(std::min(2147483647.0, std::max(-2147483648.0, rounded)));
}

// The 64 bits of both, shifted.
static inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (by & 31));
}

template <class To, class From>
static inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "bits are kept");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}
static inline float __int_as_float(int a) { return bits_as<float>(a); }
static inline float __uint_as_float(unsigned a) { return bits_as<float>(a); }
static inline int __float_as_int(float a) { return bits_as<int>(a); }
static inline unsigned __float_as_uint(float a) { return bits_as<unsigned>(a); }

static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        result |= static_cast<unsigned>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
    }
    return result;
}

template <class T>
static inline T __ldg(const T* pointer) {
    if (reinterpret_cast<uintptr_t>(pointer) % sizeof(T)) emulate::fail("__ldg: misaligned address");
    return *pointer;
}

// ---- Half precision

struct __half {
    unsigned short bits;
};
struct __nv_bfloat16 {
    unsigned short bits;
};
struct alignas(4) __half2 {
    __half x, y;
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
using half = __half;
using half2 = __half2;
static inline __half __ushort_as_half(unsigned short a) { return {a}; }
static inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short a) { return {a}; }
static inline unsigned short __half_as_ushort(__half a) { return a.bits; }
static inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 a) { return a.bits; }

static inline float __half2float(__half a) {
    const int exponent = a.bits >> 10 & 31, mantissa = a.bits & 1023;
    float value;
    if (exponent == 31) {
        value = mantissa ? NAN : INFINITY;
    } else {
        value = std::ldexp(mantissa + (exponent ? 1024.0f : 0.0f), std::max(exponent, 1) - 25);
    }
    return a.bits & 0x8000 ? -value : value;
}

static inline __half __float2half_rn(float a) {
    const unsigned short sign = std::signbit(a) ? 0x8000 : 0;
    const float magnitude = std::fabs(a);
    if (std::isnan(a)) return {0x7fff};
    if (magnitude >= 65520.0f) return {static_cast<unsigned short>(sign | 0x7c00)};
    int exponent = magnitude < 6.103515625e-05f ? -14 : std::ilogb(magnitude);
    // In units of the last place; a carry into the next power of two runs into the exponent as it should.
    const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
    return {static_cast<unsigned short>(sign | ((exponent + 14) * 1024 + units))};
}

static inline float __bfloat162float(__nv_bfloat16 a) { return bits_as<float>(static_cast<unsigned>(a.bits) << 16); }

static inline __nv_bfloat16 __float2bfloat16_rn(float a) {
    if (std::isnan(a)) return {0x7fff};
    const unsigned bits = bits_as<unsigned>(a);
    return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

static inline __half __float2half(float a) { return __float2half_rn(a); }
static inline __nv_bfloat16 __float2bfloat16(float a) { return __float2bfloat16_rn(a); }
static inline float2 __half22float2(__half2 a) { return {__half2float(a.x), __half2float(a.y)}; }
static inline float2 __bfloat1622float2(__nv_bfloat162 a) { return {__bfloat162float(a.x), __bfloat162float(a.y)}; }
static inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
static inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
    return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)};
}

// ---- Barriers and shuffles

static inline void __syncthreads() {
    emulate::self->state = emulate::Fiber::IN_BLOCK;
    emulate::pause();
}

static inline void __syncwarp(unsigned = 0xffffffffu) {
    int none = 0;
    emulate::collective("__syncwarp", none, none, [](int**, int**) {});
}

// The value of the lane `from`; a lane outside the warp leaves each its own.
template <class T>
static inline T shuffle(const char* operation, unsigned mask, T value, int width, int from) {
    if (mask != 0xffffffffu || width != 32) emulate::fail(std::string(operation) + ": only whole warps are emulated");
    const int lanes = emulate::warps[emulate::self->warp].lanes;
    struct Request {
        T value;
        int from;
    } request = {value, from < 0 || from >= lanes ? emulate::self->lane : from};
    T result;
    emulate::collective(operation, request, result, [lanes](Request** in, T** out) {
        for (int lane = 0; lane < lanes; ++lane) *out[lane] = in[in[lane]->from]->value;
    });
    return result;
}
template <class T>
static inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
    return shuffle("__shfl_xor_sync", mask, value, width, emulate::self->lane ^ lanes);
}
template <class T>
static inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
    return shuffle("__shfl_down_sync", mask, value, width, emulate::self->lane + static_cast<int>(by));
}
template <class T>
static inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
    return shuffle("__shfl_up_sync", mask, value, width, emulate::self->lane - static_cast<int>(by));
}
template <class T>
static inline T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
    return shuffle("__shfl_sync", mask, value, width, from % 32);
}

// ---- The functions of cuda/include/ptx.cuh

static inline int opaque(int value) { return value; }

static inline unsigned shared_address(const void* pointer) {
    emulate::check_shared(pointer, 1, "shared_address");
    const emulate::Block& block = emulate::blocks[emulate::self->block];
    const auto offset = static_cast<const unsigned char*>(pointer) - block.shared;
    return static_cast<unsigned>(emulate::self->block << emulate::RANK_SHIFT) + emulate::SHARED_BASE + offset;
}

// The read is for an address that is no array's.
static inline void prefetch_l2(const void* global) { static_cast<void>(*static_cast<const volatile char*>(global)); }

static inline void cp_async_16(void* shared, const void* global, bool valid) {
    emulate::check_shared(shared, 16, "cp.async");
    if (reinterpret_cast<uintptr_t>(global) % 16) emulate::fail("cp.async: misaligned global address");
    auto* to = static_cast<unsigned char*>(shared);
    std::memset(to, 0x5a, 16);
    emulate::self->open.push_back({to, static_cast<const unsigned char*>(global), valid});
}

static inline void cp_async_commit() {
    emulate::self->groups.push_back(std::move(emulate::self->open));
    emulate::self->open.clear();
}

template <int GROUPS>
static inline void cp_async_wait() {
    auto& groups = emulate::self->groups;
    for (; groups.size() > GROUPS; groups.pop_front()) {
        for (const emulate::Copy& copy : groups.front()) {
            if (copy.valid) {
                std::memcpy(copy.to, copy.from, 16);
            } else {
                std::memset(copy.to, 0, 16);
            }
        }
    }
}

static inline void ldmatrix_x4(unsigned (&d)[4], const void* row) {
    emulate::check_shared(row, 16, "ldmatrix");
    emulate::collective("ldmatrix_x4", row, d, [](const void** rows[32], unsigned (*out[32])[4]) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            bool taken[8] = {};  // groups of 4 banks
            for (int i = 0; i < 8; ++i) {
                const auto* bytes = static_cast<const unsigned char*>(*rows[8 * matrix + i]);
                bool& group = taken[reinterpret_cast<uintptr_t>(bytes) / 16 % 8];
                emulate::bank_conflicts += group;
                group = true;
                for (int t = 0; t < 4; ++t) std::memcpy(&(*out[4 * i + t])[matrix], bytes + 4 * t, 4);
            }
        }
    });
}

namespace emulate {

template <class D>
struct Operands {
    D (*d)[4];
    unsigned a[4], b[2];
};

// d += a * b, 16 x 8 x (32 bytes), of elements E that `value` turns into numbers.
template <class E, class D, class Number, class Value>
static void mma(const char* operation, D (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Value value) {
    constexpr int EACH = 4 / sizeof(E), DEPTH = 8 * EACH;
    Operands<D> in = {&d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    int none = 0;
    collective(operation, in, none, [value](Operands<D>** lanes, int**) {
        Number left[16][DEPTH], right[8][DEPTH];
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4;
            for (int r = 0; r < 4; ++r) {
                E elements[EACH];
                std::memcpy(elements, &lanes[lane]->a[r], 4);
                const int k = r / 2 * DEPTH / 2 + EACH * t;
                for (int i = 0; i < EACH; ++i) left[g + r % 2 * 8][k + i] = value(elements[i]);
            }
            for (int r = 0; r < 2; ++r) {
                E elements[EACH];
                std::memcpy(elements, &lanes[lane]->b[r], 4);
                for (int i = 0; i < EACH; ++i) right[g][r * DEPTH / 2 + EACH * t + i] = value(elements[i]);
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 4; ++i) {
                const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
                Number sum = (*lanes[lane]->d)[i];
                for (int k = 0; k < DEPTH; ++k) sum += left[row][k] * right[column][k];
                (*lanes[lane]->d)[i] = static_cast<D>(sum);
            }
        }
    });
}

}  // namespace emulate

static inline void mma_s8(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    emulate::mma<signed char, int, int>("mma_s8", d, a, b0, b1, [](signed char code) { return int(code); });
}
static inline void mma_f16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    auto value = [](unsigned short bits) { return static_cast<double>(__half2float({bits})); };
    emulate::mma<unsigned short, float, double>("mma_f16", d, a, b0, b1, value);
}
static inline void mma_bf16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    auto value = [](unsigned short bits) { return static_cast<double>(__bfloat162float({bits})); };
    emulate::mma<unsigned short, float, double>("mma_bf16", d, a, b0, b1, value);
}
