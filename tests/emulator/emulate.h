// A CUDA kernel's grid on the CPU, for tests: what the device code of cuda/ needs of the language and of the hardware.
//
// Every thread of a cluster's blocks is a fiber; it runs until it waits: for its warp (ldmatrix, mma, shuffles), for its
// block (__syncthreads), or for what emulate_sm90.h adds. The hardware is imitated strictly: the bytes of an asynchronous
// copy arrive at the wait for its group and are garbage until then; shared memory starts as garbage; misaligned or stray
// addresses, diverged warps and deadlocks are errors, and bank conflicts of ldmatrix are counted. Not seen: races between
// warps other than those that two orders of the warps show, and anything about speed.
//
// Every kernel is compiled with this header, and linked with machine.cpp, emulate.cpp and emulate_sm90.cpp, which are
// compiled once: so nothing of the standard library that takes long to read is in here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

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
#define DYNAMIC_SHARED(name) unsigned char* const name = emulate::shared()
#define SWIZZLED_SHARED(name) DYNAMIC_SHARED(name)

struct dim3 {
    unsigned x, y, z;
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;
static const int warpSize = 32;

namespace emulate {

// Runs a kernel; null, or the text of what went wrong. `cluster` neighbours along x are blocks of a cluster.
const char* run(dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster, void (*kernel)());

// Ends the run: the caller is never resumed. The text is of one or two parts, as "where: what".
[[noreturn]] void fail(const char* text, const char* more = "");

// The block's dynamic shared memory; the place of this thread in its warp, and how many threads that has.
unsigned char* shared();
int lane();
int lanes();

// What the lanes of a warp hand in and take away.
struct Exchange {
    void *in[32], *out[32];
};

// Waits until all lanes of the warp are here; for the last to come, what all have handed in, and null for the others.
Exchange* meet(const char* operation, void* in, void* out);
// Lets the others go on: the last to come calls it when it has computed.
void part();

// All lanes of a warp hand in a value and take one away; the last to arrive computes `apply(in, out)` for all.
template <class In, class Out, class Apply>
static void collective(const char* operation, In& in, Out& out, Apply apply) {
    if (Exchange* all = meet(operation, &in, &out)) {
        apply(reinterpret_cast<In**>(all->in), reinterpret_cast<Out**>(all->out));
        part();
    }
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

template <class T>
static inline T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
static inline T max(T a, T b) {
    return a < b ? b : a;
}
static inline unsigned min(unsigned a, int b) { return min(a, static_cast<unsigned>(b)); }
static inline unsigned max(unsigned a, int b) { return max(a, static_cast<unsigned>(b)); }
extern "C" {  // as <math.h> has them
float fmaxf(float, float) noexcept;
float fminf(float, float) noexcept;
float rintf(float) noexcept;
float exp2f(float) noexcept;
float sqrtf(float) noexcept;
float fabsf(float) noexcept;
float exp2f(float) noexcept;
}
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
static inline float rsqrtf(float a) { return 1.0f / __builtin_sqrtf(a); }
static inline float __frcp_rn(float a) { return 1.0f / a; }
float __fmaf_rn(float a, float b, float c);
static inline float __int2float_rn(int a) { return static_cast<float>(a); }
int __float2int_rn(float a);  // NaN becomes 0 and what does not fit saturates, as on the GPU

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

float __half2float(__half a);
__half __float2half_rn(float a);
__nv_bfloat16 __float2bfloat16_rn(float a);
static inline float __bfloat162float(__nv_bfloat16 a) { return bits_as<float>(static_cast<unsigned>(a.bits) << 16); }

static inline __half __float2half(float a) { return __float2half_rn(a); }
static inline __nv_bfloat16 __float2bfloat16(float a) { return __float2bfloat16_rn(a); }
static inline float2 __half22float2(__half2 a) { return {__half2float(a.x), __half2float(a.y)}; }
static inline float2 __bfloat1622float2(__nv_bfloat162 a) { return {__bfloat162float(a.x), __bfloat162float(a.y)}; }
static inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
static inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
    return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)};
}
// ---- Barriers and shuffles

void __syncthreads();
void __syncwarp(unsigned mask = 0xffffffffu);

// The value of the lane `from`; a lane outside the warp leaves each its own.
template <class T>
static inline T shuffle(const char* operation, unsigned mask, T value, int width, int from) {
    if (mask != 0xffffffffu || width != 32) emulate::fail(operation, ": only whole warps are emulated");
    const int lanes = emulate::lanes();
    struct Request {
        T value;
        int from;
    } request = {value, from < 0 || from >= lanes ? emulate::lane() : from};
    T result;
    emulate::collective(operation, request, result, [lanes](Request** in, T** out) {
        for (int lane = 0; lane < lanes; ++lane) *out[lane] = in[in[lane]->from]->value;
    });
    return result;
}
template <class T>
static inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
    return shuffle("__shfl_xor_sync", mask, value, width, emulate::lane() ^ lanes);
}
template <class T>
static inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
    return shuffle("__shfl_down_sync", mask, value, width, emulate::lane() + static_cast<int>(by));
}
template <class T>
static inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
    return shuffle("__shfl_up_sync", mask, value, width, emulate::lane() - static_cast<int>(by));
}
template <class T>
static inline T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
    return shuffle("__shfl_sync", mask, value, width, from % 32);
}

// ---- The functions of cuda/include/ptx.cuh

static inline int opaque(int value) { return value; }
// The read is for an address that is no array's.
static inline void prefetch_l2(const void* global) { static_cast<void>(*static_cast<const volatile char*>(global)); }

unsigned shared_address(const void* pointer);
void cp_async_16(void* shared, const void* global, bool valid);
void cp_async_16_or_0(void* shared, const void* global, int bytes);
void cp_async_commit();
void ldmatrix_x4(unsigned (&d)[4], const void* row);
void mma_s8(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
void mma_f16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
void mma_bf16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);

namespace emulate {
void wait_for_copies(size_t groups);
}
template <int GROUPS>
static inline void cp_async_wait() {
    emulate::wait_for_copies(GROUPS);
}
