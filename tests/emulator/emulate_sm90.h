// Hopper's machinery on the CPU: the functions of cuda/include/sm90.cuh and wgmma.cuh.
//
// What is asynchronous happens late: a copy's bytes arrive now and then, in any order, or when no thread can go on
// without them, and the place is garbage from the moment the copy is asked for; a product reads its operands when it is begun,
// and its result is garbage until the wait for its group. Until then neither its registers nor its rows in shared memory
// may change. A wgmma is taken warp by warp: each has 16 rows of the product.
#pragma once

#include "emulate.h"

namespace emulate {

constexpr unsigned POISON = 0xbadacc00;
constexpr unsigned CLUSTER_WINDOW = 0x80000000;
constexpr uint64_t BARRIER_MARK = 0x6d6261727269657200;  // what a barrier looks like in memory

static unsigned char* shared_pointer(unsigned address, size_t bytes, const char* what) {
    if (address >> RANK_SHIFT != static_cast<unsigned>(self->block)) fail(std::string(what) + ": not this block's memory");
    const size_t offset = (address & ((1u << RANK_SHIFT) - 1)) - SHARED_BASE;
    if (offset >= SHARED_BYTES) fail(std::string(what) + ": address outside the dynamic shared memory");
    unsigned char* const pointer = blocks[self->block].shared + offset;
    check_shared(pointer, 1, what);
    check_shared(pointer + bytes - 1, 1, what);
    return pointer;
}

// ---- Barriers

static Barrier& barrier_at(unsigned address) {
    uint64_t mark;
    std::memcpy(&mark, shared_pointer(address, 8, "mbarrier"), 8);
    auto& barriers = blocks[self->block].barriers;
    if (!barriers.count(address)) fail("mbarrier: none was made at this address");
    if (mark != (BARRIER_MARK ^ address)) fail("mbarrier: it was overwritten");
    return barriers[address];
}

static void end_phase(Barrier& barrier) {
    if (barrier.pending || barrier.bytes) return;
    barrier.phase ^= 1;
    barrier.pending = barrier.count;
}

static void arrive(Barrier& barrier) {
    if (barrier.pending == 0) fail("mbarrier: more arrivals than it was made for");
    if (--barrier.pending == 0 && barrier.bytes < 0) fail("mbarrier: more bytes came than were announced");
    end_phase(barrier);
}

// ---- The copy engine

// What the tests' launcher packs into a tensor map in the place of the driver.
struct Map {
    uint64_t address;
    uint32_t rank, swizzle;
    uint64_t sizes[4], strides[3];
    uint32_t box[4], steps[4];
};
static_assert(sizeof(Map) <= sizeof(TensorMap), "it has room there");

struct Load {
    Map map;
    int at[4], block;
    unsigned address;
    unsigned char* to;
    Barrier* barrier;
    size_t bytes;
};
static std::vector<Load> loads;

static void land(const Load& load) {
    const Map& map = load.map;
    unsigned line[4] = {};  // counts the box's elements; [0] is of bytes, contiguous in memory
    for (size_t done = 0; done < load.bytes; done += map.box[0]) {
        const unsigned char* from = reinterpret_cast<const unsigned char*>(map.address);
        bool inside = true;
        for (unsigned d = 1; d < map.rank; ++d) {
            const int64_t at = load.at[d] + static_cast<int64_t>(line[d]) * map.steps[d];
            inside = inside && at >= 0 && at < static_cast<int64_t>(map.sizes[d]);
            if (inside) from += at * map.strides[d - 1];
        }
        for (unsigned byte = 0; byte < map.box[0]; ++byte) {
            const int64_t at = load.at[0] + static_cast<int64_t>(byte);
            const unsigned plain = load.address + done + byte;
            const unsigned turn = map.swizzle == 3 ? plain >> 7 & 7 : map.swizzle == 2 ? plain >> 7 & 3 : 0;
            const bool valid = inside && at >= 0 && at < static_cast<int64_t>(map.sizes[0]);
            load.to[static_cast<int>((plain ^ turn << 4) - load.address)] = valid ? from[at] : 0;
        }
        for (unsigned d = 1; d < map.rank; ++d) {
            if (++line[d] < (map.box[d] + map.steps[d] - 1) / map.steps[d]) break;
            line[d] = 0;
        }
    }
    load.barrier->bytes -= load.bytes;
    end_phase(*load.barrier);
}

static void load(const char* what, unsigned rank, unsigned dst, const TensorMap* tensor_map, unsigned bar,
                 const int (&at)[4]) {
    Load load;
    std::memcpy(&load.map, tensor_map, sizeof(Map));
    if (reinterpret_cast<uintptr_t>(tensor_map) % 64) fail(std::string(what) + ": misaligned tensor map");
    if (load.map.rank != rank) fail(std::string(what) + ": a tensor map of another rank");
    load.bytes = load.map.box[0];
    for (unsigned d = 1; d < rank; ++d) load.bytes *= (load.map.box[d] + load.map.steps[d] - 1) / load.map.steps[d];
    std::memcpy(load.at, at, sizeof(at));
    if (dst % (load.map.swizzle == 3 ? 1024 : 512)) fail(std::string(what) + ": the swizzle's pattern starts elsewhere");
    load.block = self->block;
    load.address = dst;
    load.to = shared_pointer(dst, load.bytes, what);
    load.barrier = &barrier_at(bar);
    if (!load.barrier->visible) fail(std::string(what) + ": the barrier is not visible to the copy engine yet");
    for (const Load& other : loads) {
        if (load.to < other.to + other.bytes && other.to < load.to + load.bytes) {
            fail(std::string(what) + ": another copy to the same place is under way");
        }
    }
    std::memset(load.to, 0x5a, load.bytes);
    if (!land_copy) loads.clear();  // a new run
    loads.push_back(load);
    land_copy = [] {
        if (loads.empty()) return false;
        const size_t which = dice() % loads.size();
        const Load one = loads[which];
        loads.erase(loads.begin() + which);
        if (blocks[one.block].done == static_cast<int>(fibers.size() / blocks.size())) {
            error = "a block ended while copies to it were under way";
        }
        land(one);
        return true;
    };
}

// ---- wgmma

struct Wgmma {
    Fiber* fiber;
    unsigned* d;
    const unsigned* a;
    unsigned long long descriptor;
    int add;
};

// The rows of B that a descriptor means, 32 bytes each, taken out of the swizzle.
static std::vector<unsigned char> gather(unsigned long long descriptor, int columns) {
    const unsigned start = (descriptor & 0x3fff) << 4, group = (descriptor >> 32 & 0x3fff) << 4;
    if (descriptor >> 62 != 1 || descriptor >> 49 & 7) fail("wgmma: not a descriptor with a 128-byte swizzle");
    std::vector<unsigned char> rows(columns * 32);
    const unsigned rank = self->block << RANK_SHIFT;
    for (int n = 0; n < columns; ++n) {
        for (int piece = 0; piece < 32; piece += 16) {
            const unsigned at = start + n / 8 * group + n % 8 * 128 + piece;
            std::memcpy(&rows[n * 32 + piece], shared_pointer(rank | (at ^ (at >> 7 & 7) << 4), 16, "wgmma"), 16);
        }
    }
    return rows;
}

static Accumulator& accumulator(Fiber& fiber, unsigned* registers, int count) {
    for (Accumulator& one : fiber.accumulators) {
        if (one.registers == registers) return one;
    }
    fiber.accumulators.push_back({registers, 0, std::vector<unsigned>(count)});
    return fiber.accumulators.back();
}

__attribute__((optimize("O3"))) static void multiply(int* sums, const signed char* row, const unsigned char* rows,
                                                     int columns) {
    short left[32];
    for (int k = 0; k < 32; ++k) left[k] = row[k];
    for (int n = 0; n < columns; ++n) {
        int sum = 0;
        for (int k = 0; k < 32; ++k) sum += left[k] * static_cast<short>(static_cast<signed char>(rows[n * 32 + k]));
        sums[n] += sum;
    }
}

template <int REGISTERS>
static void begin_product(Wgmma** lanes) {
    constexpr int COLUMNS = 2 * REGISTERS;
    static thread_local int sums[16][COLUMNS];
    static thread_local signed char left[16][32];
    const std::vector<unsigned char> rows = gather(lanes[0]->descriptor, COLUMNS);
    for (int lane = 0; lane < 32; ++lane) {
        Wgmma& one = *lanes[lane];
        if (one.descriptor != lanes[0]->descriptor || !one.add != !lanes[0]->add) fail("wgmma: lanes differ");
        if (!one.fiber->fenced) fail("wgmma: registers were used since the last fence");
        Accumulator& d = accumulator(*one.fiber, one.d, REGISTERS);
        for (int r = 0; r < 4; ++r) std::memcpy(&left[lane / 4 + r % 2 * 8][r / 2 * 16 + lane % 4 * 4], &one.a[r], 4);
        for (int i = 0; i < REGISTERS; ++i) {
            if (d.under_way && one.d[i] != POISON) fail("wgmma: its result was touched while it was under way");
            const unsigned was = d.under_way ? d.values[i] : one.d[i];
            sums[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2] = one.add ? was : 0;
        }
    }
    for (int row = 0; row < 16; ++row) multiply(sums[row], left[row], rows.data(), COLUMNS);
    for (int lane = 0; lane < 32; ++lane) {
        Wgmma& one = *lanes[lane];
        Accumulator& d = accumulator(*one.fiber, one.d, REGISTERS);
        ++d.under_way;
        for (int i = 0; i < REGISTERS; ++i) {
            d.values[i] = sums[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2];
            one.d[i] = POISON;
        }
        Product product = {one.d, one.a, {one.a[0], one.a[1], one.a[2], one.a[3]}, one.descriptor, {}};
        if (lane == 0) product.b_was = rows;
        one.fiber->open_products.push_back(product);
    }
    ++warps[self->warp].products;
}

static void finish(const Product& product) {
    if (std::memcmp(product.a, product.a_was, sizeof(product.a_was))) fail("wgmma: A changed while it was under way");
    if (!product.b_was.empty() && gather(product.descriptor, product.b_was.size() / 32) != product.b_was) {
        fail("wgmma: B changed while it was under way");
    }
    Accumulator& d = accumulator(*self, product.accumulator, 0);
    for (size_t i = 0; i < d.values.size(); ++i) {
        if (d.registers[i] != POISON) fail("wgmma: its result was touched while it was under way");
    }
    if (--d.under_way == 0) std::copy(d.values.begin(), d.values.end(), d.registers);
}

static void aligned(const char* operation) {
    int none = 0;
    collective(operation, none, none, [](int**, int**) {});
}

}  // namespace emulate

// ---- The functions of cuda/include/sm90.cuh

static inline void barrier_init(unsigned bar, int count) {
    const uint64_t mark = emulate::BARRIER_MARK ^ bar;
    if (bar % 8) emulate::fail("mbarrier: misaligned address");
    std::memcpy(emulate::shared_pointer(bar, 8, "mbarrier"), &mark, 8);
    emulate::blocks[emulate::self->block].barriers[bar] = {count, count, 0, 0, false};
}

static inline void barrier_init_visible() {
    for (auto& one : emulate::blocks[emulate::self->block].barriers) one.second.visible = true;
}

static inline void barrier_expect(unsigned bar, int bytes) {
    emulate::Barrier& barrier = emulate::barrier_at(bar);
    barrier.bytes += bytes;
    if (barrier.bytes >= 1 << 20) emulate::fail("mbarrier: more bytes than it counts");
    emulate::arrive(barrier);
}

static inline void barrier_arrive(unsigned bar) {
    emulate::arrive(emulate::barrier_at(bar));
    emulate::dawdle();
}

static inline void barrier_wait(unsigned bar, unsigned parity) {
    const emulate::Barrier& barrier = emulate::barrier_at(bar);
    if (barrier.phase == parity) {
        emulate::self->barrier = &barrier;
        emulate::self->phase = parity;
        emulate::self->state = emulate::Fiber::IN_BARRIER;
        emulate::pause();
    }
    emulate::dawdle();
}

static inline void prefetch_map(const TensorMap* map) {
    if (reinterpret_cast<uintptr_t>(map) % 64) emulate::fail("prefetch_map: misaligned tensor map");
}

static inline void tma_load_2d(unsigned dst, const TensorMap* map, unsigned bar, int c0, int c1) {
    emulate::load("tma_load_2d", 2, dst, map, bar, {c0, c1, 0, 0});
}

static inline void tma_load_4d(unsigned dst, const TensorMap* map, unsigned bar, int c0, int c1, int c2, int c3) {
    emulate::load("tma_load_4d", 4, dst, map, bar, {c0, c1, c2, c3});
}

static inline void named_barrier(int id, int threads) {
    emulate::aligned("named_barrier");
    if (id < 1 || id > 15 || threads % 32) emulate::fail("named_barrier: no such barrier, or not of whole warps");
    emulate::Named& named = emulate::blocks[emulate::self->block].named[id];
    if (named.arrived && named.threads != threads) emulate::fail("named_barrier: others wait for another number");
    named.threads = threads;
    if (++named.arrived < threads) {
        emulate::self->named = id;
        emulate::self->state = emulate::Fiber::IN_NAMED;
        emulate::pause();
        return;
    }
    named.arrived = 0;
    for (emulate::Fiber& fiber : emulate::fibers) {
        const bool here = fiber.block == emulate::self->block && fiber.state == emulate::Fiber::IN_NAMED;
        if (here && fiber.named == id) fiber.state = emulate::Fiber::READY;
    }
}

template <int N>
static inline void give_registers() {
    static_assert(N >= 24 && N <= 256 && N % 8 == 0, "a count that setmaxnreg takes");
}
template <int N>
static inline void take_registers() {
    static_assert(N >= 24 && N <= 256 && N % 8 == 0, "a count that setmaxnreg takes");
}

static inline void settled(unsigned&) {}

static inline void wgmma_fence() {
    emulate::aligned("wgmma_fence");
    emulate::self->fenced = true;
}

static inline void wgmma_commit() {
    emulate::aligned("wgmma_commit");
    emulate::self->products.push_back(std::move(emulate::self->open_products));
    emulate::self->open_products.clear();
    emulate::dawdle();
}

// What is waited for may be used again, so the next product wants a fence.
template <int N>
static inline void wgmma_wait() {
    emulate::aligned("wgmma_wait");
    auto& groups = emulate::self->products;
    for (; groups.size() > N; groups.pop_front()) {
        for (const emulate::Product& product : groups.front()) emulate::finish(product);
    }
    emulate::self->fenced = false;
}

static inline unsigned pack_f16x2(float low, float high) {
    return __half_as_ushort(__float2half_rn(low)) | static_cast<unsigned>(__half_as_ushort(__float2half_rn(high))) << 16;
}
static inline unsigned pack_bf16x2(float low, float high) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(low)) |
           static_cast<unsigned>(__bfloat16_as_ushort(__float2bfloat16_rn(high))) << 16;
}

static inline unsigned turn_over(unsigned v) {
    if (emulate::self->lane == 0) emulate::dawdle();
    unsigned result;
    emulate::collective("turn_over", v, result, [](unsigned** in, unsigned** out) {
        for (int lane = 0; lane < 32; ++lane) {
            const int row = lane / 4, column = lane % 4 * 2;
            unsigned two = 0;
            for (int i = 0; i < 2; ++i) {  // element [row][column + i] of the result is [column + i][row] of what was
                two |= (*in[4 * (column + i) + row / 2] >> (16 * (row % 2)) & 0xffff) << (16 * i);
            }
            *out[lane] = two;
        }
    });
    return result;
}

static inline void store_if(bool inside, void* at, unsigned low, unsigned high) {
    if (!inside) return;
    if (reinterpret_cast<uintptr_t>(at) % 8) emulate::fail("store_if: misaligned address");
    static_cast<unsigned*>(at)[0] = low;
    static_cast<unsigned*>(at)[1] = high;
}

static inline void store_shared(unsigned address, unsigned v) {
    if (address % 4) emulate::fail("store_shared: misaligned address");
    emulate::dawdle();
    std::memcpy(emulate::shared_pointer(address, 4, "store_shared"), &v, 4);
}

static inline void cluster_sync() {
    emulate::aligned("cluster_sync");
    emulate::self->state = emulate::Fiber::IN_CLUSTER;
    emulate::pause();
}

static inline unsigned cluster_rank() { return emulate::self->block; }

static inline unsigned cluster_address(unsigned address, unsigned rank) {
    if (rank >= emulate::blocks.size()) emulate::fail("cluster_address: the cluster has no such block");
    return emulate::CLUSTER_WINDOW | rank << emulate::RANK_SHIFT | (address & ((1u << emulate::RANK_SHIFT) - 1));
}

static inline uint4 load_cluster(unsigned address) {
    if (!(address & emulate::CLUSTER_WINDOW)) emulate::fail("load_cluster: not an address of the cluster's window");
    const unsigned rank = (address & ~emulate::CLUSTER_WINDOW) >> emulate::RANK_SHIFT;
    const emulate::Block& block = emulate::blocks[rank];
    const size_t offset = (address & ((1u << emulate::RANK_SHIFT) - 1)) - emulate::SHARED_BASE;
    if (offset + 16 > emulate::dynamic_shared_bytes || offset % 16) {
        emulate::fail("load_cluster: address misaligned or outside the dynamic shared memory");
    }
    if (block.done) emulate::fail("load_cluster: the block may have ended");
    uint4 v;
    std::memcpy(&v, block.shared + offset, 16);
    return v;
}

// ---- The functions of cuda/include/wgmma.cuh

template <int REGISTERS>
static inline void wgmma_s8(unsigned (&d)[REGISTERS], const unsigned (&a)[4], unsigned long long descriptor, int add) {
    emulate::Wgmma request = {emulate::self, d, a, descriptor, add};
    int none = 0;
    emulate::collective("wgmma_s8", request, none, [](emulate::Wgmma** lanes, int**) { emulate::begin_product<REGISTERS>(lanes); });
}
