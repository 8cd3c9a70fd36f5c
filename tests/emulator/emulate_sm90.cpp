// What emulate_sm90.h promises: barriers in shared memory, the copy engine, products of warp groups, clusters.
#include "machine.h"
#include "sm90.cuh"

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

// What the tests' launcher packs into a tensor map in the place of the driver: of a matrix of bytes, or of images
// [N, H, W, C] with the windows of a convolution.
struct Map {
    uint64_t address;
    uint32_t rank, swizzle;
    uint64_t sizes[4];             // columns and rows, or C, W, H, N
    uint32_t box[2];               // columns and rows, or channels and pixels
    int32_t first[2], last[2];     // of windows, along W and H: the first one's place, the last one's from the last pixel
    uint32_t steps[2];
};
static_assert(sizeof(Map) <= sizeof(TensorMap), "it has room there");

// What a copy is of: columns from at[0] on, rows from at[1] on; or channels and windows (at[1], at[2], at[3]) of images,
// of which the pixels at this place.
struct Place {
    int at[4];
    unsigned tap[2];
};

// Calls one(place in shared memory, place in the tensor or null) for each byte of a box.
template <class One>
static void each_byte(const Map& map, const Place& place, unsigned address, One one) {
    int64_t at[4] = {place.at[0], place.at[1], place.at[2], place.at[3]};
    for (unsigned row = 0; row < map.box[1]; ++row) {
        auto* global = reinterpret_cast<unsigned char*>(map.address);
        int64_t stride = 1;
        bool inside = true;
        for (unsigned d = 1; d < map.rank; ++d) {
            stride *= map.sizes[d - 1];
            const int64_t index = at[d] + (map.rank == 4 && d < 3 ? place.tap[d - 1] : 0);
            inside = inside && index >= 0 && index < static_cast<int64_t>(map.sizes[d]);
            global += index * stride;
        }
        for (unsigned byte = 0; byte < map.box[0]; ++byte) {
            const int64_t column = at[0] + static_cast<int64_t>(byte);
            const unsigned plain = address + row * map.box[0] + byte;
            const unsigned turn = map.swizzle == 3 ? plain >> 7 & 7 : plain >> 7 & 3;
            const bool valid = inside && column >= 0 && column < static_cast<int64_t>(map.sizes[0]);
            one(static_cast<int>((plain ^ turn << 4) - address), valid ? global + column : nullptr);
        }
        if (map.rank == 2) {
            ++at[1];
            continue;
        }
        for (unsigned d = 1;; ++d) {  // the next window
            if (d == 3) {
                ++at[3];
                break;
            }
            at[d] += map.steps[d - 1];
            if (at[d] < static_cast<int64_t>(map.sizes[d]) + map.last[d - 1]) break;
            at[d] = map.first[d - 1];
        }
    }
}

static size_t box_bytes(const Map& map) { return map.box[0] * map.box[1]; }

static Map map_of(const char* what, const TensorMap* tensor_map, unsigned rank, unsigned address) {
    Map map;
    std::memcpy(&map, tensor_map, sizeof(Map));
    if (reinterpret_cast<uintptr_t>(tensor_map) % 64) fail(std::string(what) + ": misaligned tensor map");
    if (map.rank != rank) fail(std::string(what) + ": a tensor map of another rank");
    if (address % (map.swizzle == 3 ? 1024 : 512)) fail(std::string(what) + ": the swizzle's pattern starts elsewhere");
    return map;
}

struct Load {
    Map map;
    Place place;
    int block;
    unsigned address;
    unsigned char* to;
    Barrier* barrier;
    size_t bytes;
};
static std::vector<Load> loads;

static void land(const Load& load) {
    each_byte(load.map, load.place, load.address,
              [&](int place, const unsigned char* from) { load.to[place] = from ? *from : 0; });
    load.barrier->bytes -= load.bytes;
    end_phase(*load.barrier);
}

static void load(const char* what, unsigned rank, unsigned dst, const TensorMap* tensor_map, unsigned bar,
                 const Place& place) {
    Load load;
    load.map = map_of(what, tensor_map, rank, dst);
    load.bytes = box_bytes(load.map);
    load.place = place;
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

// The bytes leave when their thread waits for them, as late as they may; until then none may change.
static void leave(const Store& store) {
    Map map;
    std::memcpy(&map, store.map, sizeof(Map));
    const unsigned char* const from = shared_pointer(store.address, store.bytes.size(), "tma_store");
    if (std::memcmp(from, store.bytes.data(), store.bytes.size())) fail("tma_store: its bytes changed while it was under way");
    each_byte(map, {{store.at[0], store.at[1]}, {}}, store.address, [&](int place, unsigned char* to) {
        if (to) *to = store.bytes[place];
    });
}

// ---- wgmma

struct Wgmma {
    Fiber* fiber;
    unsigned* d;
    int registers;
    const unsigned* a;
    unsigned long long descriptor;
    int add;
};

// The rows that a descriptor means, 32 bytes of each, taken out of the swizzle: of rows of 128 bytes, or of 64.
static std::vector<unsigned char> gather(unsigned long long descriptor, int count) {
    const unsigned start = (descriptor & 0x3fff) << 4, group = (descriptor >> 32 & 0x3fff) << 4;
    const unsigned layout = descriptor >> 62, row = layout == 1 ? 128 : 64, turns = layout == 1 ? 7 : 3;
    if (layout < 1 || layout > 2 || descriptor >> 49 & 7) fail("wgmma: not a descriptor with a 128- or 64-byte swizzle");
    std::vector<unsigned char> rows(count * 32);
    const unsigned rank = self->block << RANK_SHIFT;
    for (int n = 0; n < count; ++n) {
        for (int piece = 0; piece < 32; piece += 16) {
            const unsigned at = start + n / 8 * group + n % 8 * row + piece;
            std::memcpy(&rows[n * 32 + piece], shared_pointer(rank | (at ^ (at >> 7 & turns) << 4), 16, "wgmma"), 16);
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

static void multiply(int* sums, const signed char* row, const unsigned char* rows,
                                                     int columns) {
    short left[32];
    for (int k = 0; k < 32; ++k) left[k] = row[k];
    for (int n = 0; n < columns; ++n) {
        int sum = 0;
        for (int k = 0; k < 32; ++k) sum += left[k] * static_cast<short>(static_cast<signed char>(rows[n * 32 + k]));
        sums[n] += sum;
    }
}

static void begin_product(Wgmma** lanes) {
    const int registers = lanes[0]->registers, columns = 2 * registers;
    std::vector<int> sums(16 * columns);
    signed char left[16][32];
    const std::vector<unsigned char> rows = gather(lanes[0]->descriptor, columns);
    // The sum that register i of a lane has.
    const auto place = [=](int lane, int i) {
        return (lane / 4 + i / 2 % 2 * 8) * columns + i / 4 * 8 + lane % 4 * 2 + i % 2;
    };
    for (int lane = 0; lane < 32; ++lane) {
        Wgmma& one = *lanes[lane];
        if (one.descriptor != lanes[0]->descriptor || !one.add != !lanes[0]->add) fail("wgmma: lanes differ");
        if (!one.fiber->fenced) fail("wgmma: registers were used since the last fence");
        Accumulator& d = accumulator(*one.fiber, one.d, registers);
        for (int r = 0; r < 4; ++r) std::memcpy(&left[lane / 4 + r % 2 * 8][r / 2 * 16 + lane % 4 * 4], &one.a[r], 4);
        for (int i = 0; i < registers; ++i) {
            if (d.under_way && one.d[i] != POISON) fail("wgmma: its result was touched while it was under way");
            const unsigned was = d.under_way ? d.values[i] : one.d[i];
            sums[place(lane, i)] = one.add ? was : 0;
        }
    }
    for (int row = 0; row < 16; ++row) multiply(&sums[row * columns], left[row], rows.data(), columns);
    for (int lane = 0; lane < 32; ++lane) {
        Wgmma& one = *lanes[lane];
        Accumulator& d = accumulator(*one.fiber, one.d, registers);
        ++d.under_way;
        for (int i = 0; i < registers; ++i) {
            d.values[i] = sums[place(lane, i)];
            one.d[i] = POISON;
        }
        Product product = {one.d, one.a, {one.a[0], one.a[1], one.a[2], one.a[3]}, {}};
        if (lane == 0) product.shared.push_back({one.descriptor, rows});
        one.fiber->open_products.push_back(product);
    }
    ++warps[self->warp].products;
}

struct WgmmaHalf {
    Fiber* fiber;
    unsigned* d;
    int registers, kind;
    unsigned long long a, b;
};

// Both operands in shared memory, 16 values of K in half or bfloat16; the sums are of double.
static void begin_half_product(WgmmaHalf** lanes) {
    const int kind = lanes[0]->kind, count = lanes[0]->registers;
    const auto value = [kind](const unsigned char* at) {
        unsigned short bits;
        std::memcpy(&bits, at, 2);
        return kind == 2 ? __bfloat162float(__ushort_as_bfloat16(bits)) : __half2float(__ushort_as_half(bits));
    };
    // A warp has 16 of the 64 rows.
    const std::vector<unsigned char> all = gather(lanes[0]->a, 64), right = gather(lanes[0]->b, 2 * count);
    const unsigned char* const left = &all[self->warp % 4 * 16 * 32];
    for (int lane = 0; lane < 32; ++lane) {
        WgmmaHalf& one = *lanes[lane];
        if (one.a != lanes[0]->a || one.b != lanes[0]->b) fail("wgmma: lanes differ");
        if (!one.fiber->fenced) fail("wgmma: registers were used since the last fence");
        unsigned* const registers = one.d;
        Accumulator& d = accumulator(*one.fiber, registers, count);
        for (int i = 0; i < count; ++i) {
            if (d.under_way && registers[i] != POISON) fail("wgmma: its result was touched while it was under way");
            const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
            float was;
            std::memcpy(&was, d.under_way ? &d.values[i] : &registers[i], 4);
            double sum = was;
            for (int k = 0; k < 16; ++k) sum += static_cast<double>(value(left + row * 32 + 2 * k)) * value(&right[column * 32 + 2 * k]);
            const float rounded = static_cast<float>(sum);
            std::memcpy(&d.values[i], &rounded, 4);
            registers[i] = POISON;
        }
        ++d.under_way;
        Product product = {registers, nullptr, {}, {}};
        if (lane == 0) product.shared = {{one.a, all}, {one.b, right}};
        one.fiber->open_products.push_back(product);
    }
    ++warps[self->warp].products;
}

static void finish(const Product& product) {
    if (product.a && std::memcmp(product.a, product.a_was, sizeof(product.a_was))) fail("wgmma: A changed while it was under way");
    for (const Operand& operand : product.shared) {
        if (gather(operand.descriptor, operand.was.size() / 32) != operand.was) {
            fail("wgmma: an operand in shared memory changed while it was under way");
        }
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

void barrier_init(unsigned bar, int count) {
    const uint64_t mark = emulate::BARRIER_MARK ^ bar;
    if (bar % 8) emulate::fail("mbarrier: misaligned address");
    std::memcpy(emulate::shared_pointer(bar, 8, "mbarrier"), &mark, 8);
    emulate::blocks[emulate::self->block].barriers[bar] = {count, count, 0, 0, false};
}

void barrier_init_visible() {
    for (auto& one : emulate::blocks[emulate::self->block].barriers) one.second.visible = true;
}

void barrier_expect(unsigned bar, int bytes) {
    emulate::Barrier& barrier = emulate::barrier_at(bar);
    barrier.bytes += bytes;
    if (barrier.bytes >= 1 << 20) emulate::fail("mbarrier: more bytes than it counts");
    emulate::arrive(barrier);
}

void barrier_arrive(unsigned bar) {
    emulate::arrive(emulate::barrier_at(bar));
    emulate::dawdle();
}

void barrier_wait(unsigned bar, unsigned parity) {
    const emulate::Barrier& barrier = emulate::barrier_at(bar);
    if (barrier.phase == parity) {
        emulate::self->barrier = &barrier;
        emulate::self->phase = parity;
        emulate::self->state = emulate::Fiber::IN_BARRIER;
        emulate::pause();
    }
    emulate::dawdle();
}

void prefetch_map(const TensorMap* map) {
    if (reinterpret_cast<uintptr_t>(map) % 64) emulate::fail("prefetch_map: misaligned tensor map");
}

void tma_load_2d(unsigned dst, const TensorMap* map, unsigned bar, int c0, int c1) {
    emulate::load("tma_load_2d", 2, dst, map, bar, {{c0, c1}, {}});
}

void tma_load_pixels(unsigned dst, const TensorMap* map, unsigned bar, int channel, int w, int h, int n, int tap_w,
                     int tap_h) {
    emulate::Map parsed;
    std::memcpy(&parsed, map, sizeof(parsed));
    const int at[2] = {w, h}, taps[2] = {tap_w, tap_h};
    for (int d = 0; d < 2; ++d) {
        const int from = at[d] - parsed.first[d], end = static_cast<int>(parsed.sizes[1 + d]) + parsed.last[d];
        if (from < 0 || at[d] >= end || from % parsed.steps[d]) emulate::fail("tma_load_pixels: no window begins there");
        if (taps[d] < 0 || taps[d] > 255) emulate::fail("tma_load_pixels: too far from the window's begin");
    }
    emulate::load("tma_load_pixels", 4, dst, map, bar,
                  {{channel, w, h, n}, {static_cast<unsigned>(tap_w), static_cast<unsigned>(tap_h)}});
}

void named_barrier(int id, int threads) {
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

void wgmma_fence() {
    emulate::aligned("wgmma_fence");
    emulate::self->fenced = true;
}

void wgmma_commit() {
    emulate::aligned("wgmma_commit");
    emulate::self->products.push_back(std::move(emulate::self->open_products));
    emulate::self->open_products.clear();
    emulate::dawdle();
}

// What is waited for may be used again, so the next product wants a fence.
void emulate::wait_for_products(size_t count) {
    aligned("wgmma_wait");
    auto& groups = self->products;
    for (; groups.size() > count; groups.pop_front()) {
        for (const Product& product : groups.front()) finish(product);
    }
    self->fenced = false;
}

unsigned turn_over(unsigned v) {
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

void stmatrix_x4_turned(unsigned row, const unsigned (&v)[4]) {
    struct Rows {
        unsigned char* row;
        unsigned v[4];
    } mine = {emulate::shared_pointer(row, 16, "stmatrix"), {v[0], v[1], v[2], v[3]}};
    if (row % 16) emulate::fail("stmatrix: misaligned address");
    int none = 0;
    emulate::collective("stmatrix_x4_turned", mine, none, [](Rows** lanes, int**) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            bool taken[8] = {};  // groups of 4 banks
            for (int i = 0; i < 8; ++i) {
                unsigned char* const to = lanes[8 * matrix + i]->row;
                bool& group = taken[reinterpret_cast<uintptr_t>(to) / 16 % 8];
                emulate::bank_conflicts += group;
                group = true;
                for (int j = 0; j < 8; ++j) {  // element [j][i] of what the lanes hold
                    const unsigned short one = lanes[4 * j + i / 2]->v[matrix] >> (16 * (i % 2));
                    std::memcpy(to + 2 * j, &one, 2);
                }
            }
        }
    });
    emulate::self->unfenced = true;
}

void fence_copy_engine() { emulate::self->unfenced = false; }

void tma_store_2d(const TensorMap* map, unsigned src, int c0, int c1) {
    emulate::Store store;
    const emulate::Map parsed = emulate::map_of("tma_store", map, 2, src);
    const size_t bytes = emulate::box_bytes(parsed);
    const unsigned char* const from = emulate::shared_pointer(src, bytes, "tma_store");
    for (const emulate::Fiber& fiber : emulate::fibers) {  // its warpgroup's
        const bool here = fiber.block == emulate::self->block && fiber.warp / 4 == emulate::self->warp / 4;
        if (here && fiber.unfenced) emulate::fail("tma_store: a thread has not fenced what it wrote");
    }
    std::memcpy(store.map, &parsed, sizeof(parsed));
    store.address = src;
    store.bytes.assign(from, from + bytes);
    store.at[0] = c0, store.at[1] = c1;
    emulate::self->stores.push_back(store);
    emulate::dawdle();
}

void stores_wait_read() {
    for (const emulate::Store& store : emulate::self->stores) emulate::leave(store);
    emulate::self->stores.clear();
    emulate::dawdle();
}

void store_shared(unsigned address, unsigned v) {
    if (address % 4) emulate::fail("store_shared: misaligned address");
    emulate::dawdle();
    std::memcpy(emulate::shared_pointer(address, 4, "store_shared"), &v, 4);
}

void cluster_sync() {
    emulate::aligned("cluster_sync");
    emulate::self->state = emulate::Fiber::IN_CLUSTER;
    emulate::pause();
}

unsigned cluster_rank() { return emulate::self->block; }

unsigned cluster_address(unsigned address, unsigned rank) {
    if (rank >= emulate::blocks.size()) emulate::fail("cluster_address: the cluster has no such block");
    return emulate::CLUSTER_WINDOW | rank << emulate::RANK_SHIFT | (address & ((1u << emulate::RANK_SHIFT) - 1));
}

uint4 load_cluster(unsigned address) {
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

// The bytes land at once.
void push_cluster(unsigned to, const unsigned* words, int count, unsigned bar) {
    if (!(to & bar & emulate::CLUSTER_WINDOW)) emulate::fail("push_cluster: not addresses of the cluster's window");
    const auto local = [](unsigned address) { return address & ~emulate::CLUSTER_WINDOW; };
    if (to % (4 * count)) emulate::fail("push_cluster: misaligned address");
    emulate::Block& block = emulate::blocks[local(to) >> emulate::RANK_SHIFT];
    const size_t offset = (to & ((1u << emulate::RANK_SHIFT) - 1)) - emulate::SHARED_BASE;
    if (offset + 4 * count > emulate::dynamic_shared_bytes) emulate::fail("push_cluster: outside the dynamic shared memory");
    if (block.done) emulate::fail("push_cluster: the block may have ended");
    std::memcpy(block.shared + offset, words, 4 * count);
    emulate::Barrier& barrier = block.barriers.at(local(bar));
    barrier.bytes -= 4 * count;
    emulate::end_phase(barrier);
}
void push_cluster(unsigned to, unsigned v, unsigned bar) { push_cluster(to, &v, 1, bar); }
void push_cluster(unsigned to, const float4& v, unsigned bar) {
    unsigned words[4];
    std::memcpy(words, &v, 16);
    push_cluster(to, words, 4, bar);
}

// ---- The functions of cuda/include/wgmma.cuh

void emulate::wgmma(unsigned* d, int registers, const unsigned* a, unsigned long long descriptor, int add) {
    Wgmma request = {self, d, registers, a, descriptor, add};
    int none = 0;
    collective("wgmma_s8", request, none, [](Wgmma** lanes, int**) { begin_product(lanes); });
}

void emulate::wgmma_half(unsigned* d, int registers, int kind, unsigned long long a, unsigned long long b) {
    WgmmaHalf request = {self, d, registers, kind, a, b};
    int none = 0;
    collective("wgmma_half", request, none, [](WgmmaHalf** lanes, int**) { begin_half_product(lanes); });
}
