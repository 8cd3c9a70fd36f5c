// Hopper's machinery on the CPU: the functions of cuda/include/sm90.cuh and wgmma.cuh.
//
// What is asynchronous happens late: a copy's bytes arrive now and then, in any order, or when no thread can go on
// without them, and the place is garbage from the moment the copy is asked for; a product reads its operands when it is begun,
// and its result is garbage until the wait for its group. Until then neither its registers nor its rows in shared memory
// may change. A wgmma is taken warp by warp: each has 16 rows of the product.
#pragma once

#include "emulate.h"

// ---- The functions of cuda/include/sm90.cuh

void barrier_init(unsigned bar, int count);
void barrier_init_visible();
void barrier_expect(unsigned bar, int bytes);
void barrier_arrive(unsigned bar);
void barrier_wait(unsigned bar, unsigned parity);
void prefetch_map(const TensorMap* map);
void tma_load_2d(unsigned dst, const TensorMap* map, unsigned bar, int c0, int c1);
void tma_load_pixels(unsigned dst, const TensorMap* map, unsigned bar, int channel, int w, int h, int n, int tap_w,
                     int tap_h);
void named_barrier(int id, int threads);
void wgmma_fence();
void wgmma_commit();
unsigned turn_over(unsigned v);
void stmatrix_x4_turned(unsigned row, const unsigned (&v)[4]);
void fence_copy_engine();
void tma_store_2d(const TensorMap* map, unsigned src, int c0, int c1);
void stores_wait_read();
void store_shared(unsigned address, unsigned v);
void cluster_sync();
unsigned cluster_rank();
unsigned cluster_address(unsigned address, unsigned rank);
uint4 load_cluster(unsigned address);
void push_cluster(unsigned to, const unsigned* words, int count, unsigned bar);
void push_cluster(unsigned to, unsigned v, unsigned bar);
void push_cluster(unsigned to, const float4& v, unsigned bar);

// Nothing happens in between that the emulator could show.
static inline void cluster_arrive_relaxed() {}
static inline void cluster_wait() { cluster_sync(); }

template <int N>
static inline void give_registers() {
    static_assert(N >= 24 && N <= 256 && N % 8 == 0, "a count that setmaxnreg takes");
}
template <int N>
static inline void take_registers() {
    static_assert(N >= 24 && N <= 256 && N % 8 == 0, "a count that setmaxnreg takes");
}

static inline void settled(unsigned&) {}

static inline unsigned pack_f16x2(float low, float high) {
    return __half_as_ushort(__float2half_rn(low)) | static_cast<unsigned>(__half_as_ushort(__float2half_rn(high))) << 16;
}
static inline unsigned pack_bf16x2(float low, float high) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(low)) |
           static_cast<unsigned>(__bfloat16_as_ushort(__float2bfloat16_rn(high))) << 16;
}

namespace emulate {
void wgmma(unsigned* d, int registers, const unsigned* a, unsigned long long descriptor, int add);
// Of half (`kind` 1) or bfloat16 (2), added to d's floats.
void wgmma_half(unsigned* d, int registers, int kind, unsigned long long a, unsigned long long b);
void wait_for_products(size_t groups);
}  // namespace emulate

template <int N>
static inline void wgmma_wait() {
    emulate::wait_for_products(N);
}

// ---- The functions of cuda/include/wgmma.cuh

template <int REGISTERS>
static inline void wgmma_s8(unsigned (&d)[REGISTERS], const unsigned (&a)[4], unsigned long long descriptor, int add) {
    emulate::wgmma(d, REGISTERS, a, descriptor, add);
}

template <int KIND, int REGISTERS>
static inline void wgmma_half(unsigned (&d)[REGISTERS], unsigned long long a, unsigned long long b) {
    emulate::wgmma_half(d, REGISTERS, KIND, a, b);
}
