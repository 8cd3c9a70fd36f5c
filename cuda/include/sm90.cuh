// Hopper's asynchronous machinery behind one-line functions: mbarriers, the tensor copy engine (TMA), wgmma ordering.
//
// With QDIFF_EMULATE the CPU emulator of the tests supplies the functions instead.
#pragma once

// What cuTensorMapEncodeTiled or cuTensorMapEncodeIm2col fills; opaque to us.
struct alignas(64) TensorMap {
    unsigned long long words[16];
};

// The descriptor of a K-major tile whose rows are 128 bytes, swizzled by 128 bytes: 8 rows are 1,024 bytes apart.
__device__ __forceinline__ unsigned long long tile_descriptor(unsigned address) {
    return (1ull << 62) | (64ull << 32) | (1ull << 16) | ((address & 0x3ffff) >> 4);
}

// The same with rows of 64 bytes, swizzled by 64 bytes.
__device__ __forceinline__ unsigned long long narrow_tile_descriptor(unsigned address) {
    return (2ull << 62) | (32ull << 32) | (1ull << 16) | ((address & 0x3ffff) >> 4);
}

#ifdef QDIFF_EMULATE
#include "emulate_sm90.h"
#else

// The block's dynamic shared memory under a name, aligned as the swizzles need it.
#define SWIZZLED_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

__device__ __forceinline__ void barrier_init(unsigned bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_init_visible() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(unsigned bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(unsigned bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

__device__ __forceinline__ void barrier_wait(unsigned bar, unsigned parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra finished;\n"
        "bra again;\n"
        "finished:\n}\n" ::"r"(bar),
        "r"(parity)
        : "memory");
}

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A box of a tensor to shared memory; what lies outside the tensor arrives as zeros and counts as bytes all the same.
__device__ __forceinline__ void tma_load_2d(unsigned dst, const TensorMap* map, unsigned bar, int c0, int c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(dst),
        "l"(map), "r"(bar), "r"(c0), "r"(c1)
        : "memory");
}

// Channels of pixels of images [N, H, W, C], as many as the map says, from (w, h, n) on, which is where a convolution's window
// begins; in the order of its windows, each at this place (tap_w, tap_h) of its window; zeros outside, which count as bytes.
__device__ __forceinline__ void tma_load_pixels(unsigned dst, const TensorMap* map, unsigned bar, int channel, int w, int h,
                                                int n, int tap_w, int tap_h) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(dst),
        "l"(map), "r"(bar), "r"(channel), "r"(w), "r"(h), "r"(n), "h"(static_cast<unsigned short>(tap_w)),
        "h"(static_cast<unsigned short>(tap_h))
        : "memory");
}

__device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Registers move between the warpgroups of a block: each must have as many as it was compiled for.
template <int N>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// The register has its value here, not later: before a fence, so that the compiler need not add one of its own.
__device__ __forceinline__ void settled(unsigned& v) { asm volatile("" : "+r"(v)::"memory"); }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int N>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Two numbers rounded to 16 bits each, the first in the low ones.
__device__ __forceinline__ unsigned pack_f16x2(float low, float high) {
    unsigned v;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}
__device__ __forceinline__ unsigned pack_bf16x2(float low, float high) {
    unsigned v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}

// An 8x8 block of 16-bit numbers, two a thread, transposed.
__device__ __forceinline__ unsigned turn_over(unsigned v) {
    unsigned r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}

// Four 8x8 blocks of 16-bit numbers to shared memory, transposed; lanes 8i..8i+7 give the rows of block i, 16 bytes each.
__device__ __forceinline__ void stmatrix_x4_turned(unsigned row, const unsigned (&v)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(v[0]), "r"(v[1]),
                 "r"(v[2]), "r"(v[3])
                 : "memory");
}

// What this thread wrote to shared memory is there for the copy engine, after a barrier with the thread that asks it.
__device__ __forceinline__ void fence_copy_engine() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A box of shared memory to a tensor, but for what lies outside of it.
__device__ __forceinline__ void tma_store_2d(const TensorMap* map, unsigned src, int c0, int c1) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];\n"
                 "cp.async.bulk.commit_group;" ::"l"(map), "r"(src), "r"(c0), "r"(c1)
                 : "memory");
}

// What this thread has asked to be stored has left shared memory.
__device__ __forceinline__ void stores_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

__device__ __forceinline__ void store_shared(unsigned address, unsigned v) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ unsigned cluster_rank() {
    unsigned r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}

// The address, in the cluster's window, of a block's shared memory location.
__device__ __forceinline__ unsigned cluster_address(unsigned address, unsigned rank) {
    unsigned r;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
    return r;
}

__device__ __forceinline__ uint4 load_cluster(unsigned address) {
    uint4 v;
    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

// To another block's shared memory, whose barrier counts the bytes; both addresses are of the cluster's window.
__device__ __forceinline__ void push_cluster(unsigned to, unsigned v, unsigned bar) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to), "r"(v), "r"(bar)
                 : "memory");
}
__device__ __forceinline__ void push_cluster(unsigned to, const float4& v, unsigned bar) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
                 "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(bar)
                 : "memory");
}

// A barrier of the cluster in two halves; the first orders nothing but the barriers that were made visible.
__device__ __forceinline__ void cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

#endif
