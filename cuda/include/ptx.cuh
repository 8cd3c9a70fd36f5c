// One function for every PTX instruction of the portable kernels.
//
// With QDIFF_EMULATE the same functions come from the CPU emulator of the tests instead, so a kernel that keeps to them
// runs there unchanged. Fragment layouts (lane = 4 * g + t):
//   mma m16n8k32 (s8)   a0 row g,     k 4t..4t+3     a1 row g + 8, same k     a2, a3 as a0, a1 at k + 16
//                       b0 k 4t..4t+3, column g      b1 the same at k + 16
//   mma m16n8k16 (half) a0 row g,     k 2t, 2t+1     a1 row g + 8, same k     a2, a3 as a0, a1 at k + 8
//                       b0 k 2t, 2t+1, column g      b1 the same at k + 8
//   both                d0, d1 row g, columns 2t, 2t+1                        d2, d3 row g + 8, same columns
//   ldmatrix            register i of a lane holds bytes 4t..4t+3 of row g of matrix i; lanes 8i..8i+7 give its rows
#pragma once

#ifdef QDIFF_EMULATE
#include "emulate.h"
#else

// The block's dynamic shared memory under a name.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// `value`, of which the compiler knows nothing: what depends on it stays in the loop it is written in.
__device__ __forceinline__ int opaque(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

// Copy 16 bytes from global to shared memory; or write 16 zeros where `bytes` is 0: `global` is not read then.
__device__ __forceinline__ void cp_async_16_or_0(void* shared, const void* global, int bytes) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(bytes)
                 : "memory");
#else
    *static_cast<uint4*>(shared) = bytes ? __ldg(static_cast<const uint4*>(global)) : make_uint4(0, 0, 0, 0);
#endif
}

__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
    cp_async_16_or_0(shared, global, valid ? 16 : 0);
}

// Ask for the line of an address, which is to be read later.
__device__ __forceinline__ void prefetch_l2(const void* global) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// Close the group of copies begun since the last commit.
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until at most `GROUPS` of this thread's groups are under way.
template <int GROUPS>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
#endif
}

// Four 8x8 matrices of 16-bit elements; `row` is this lane's row of 16 bytes.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&d)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// d += a * b, int8 by int8 to int32, 16 x 8 x 32.
__device__ __forceinline__ void mma_s8(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    // Turing's 8 x 8 x 16 has the same layout in each quarter.
#define QDIFF_MMA_QUARTER(d0, d1, a, b)                                                                       \
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};" \
                 : "+r"(d0), "+r"(d1)                                                                         \
                 : "r"(a), "r"(b))
    QDIFF_MMA_QUARTER(d[0], d[1], a[0], b0);
    QDIFF_MMA_QUARTER(d[2], d[3], a[1], b0);
    QDIFF_MMA_QUARTER(d[0], d[1], a[2], b1);
    QDIFF_MMA_QUARTER(d[2], d[3], a[3], b1);
#undef QDIFF_MMA_QUARTER
#endif
}

// d += a * b, float16 by float16 to float32, 16 x 8 x 16.
__device__ __forceinline__ void mma_f16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
#define QDIFF_MMA_HALF(a0, a1, b)                                                                           \
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, " \
                 "{%0, %1, %2, %3};"                                                                        \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                           \
                 : "r"(a0), "r"(a1), "r"(b))
    QDIFF_MMA_HALF(a[0], a[1], b0);
    QDIFF_MMA_HALF(a[2], a[3], b1);
#undef QDIFF_MMA_HALF
#endif
}

#if __CUDA_ARCH__ >= 800
#define HAS_MMA_BF16 1

// d += a * b, bfloat16 by bfloat16 to float32, 16 x 8 x 16. Turing has none.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

#endif
