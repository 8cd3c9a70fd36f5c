// The functions of emulate.h that are no one-liners.
#include "machine.h"

float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

int __float2int_rn(float a) {
    if (std::isnan(a)) return 0;
    const double rounded = std::nearbyint(static_cast<double>(a));
    return static_cast<int>(std::min(2147483647.0, std::max(-2147483648.0, rounded)));
}

float __half2float(__half a) {
    const int exponent = a.bits >> 10 & 31, mantissa = a.bits & 1023;
    float value;
    if (exponent == 31) {
        value = mantissa ? NAN : INFINITY;
    } else {
        value = std::ldexp(mantissa + (exponent ? 1024.0f : 0.0f), std::max(exponent, 1) - 25);
    }
    return a.bits & 0x8000 ? -value : value;
}

__half __float2half_rn(float a) {
    const unsigned short sign = std::signbit(a) ? 0x8000 : 0;
    const float magnitude = std::fabs(a);
    if (std::isnan(a)) return {0x7fff};
    if (magnitude >= 65520.0f) return {static_cast<unsigned short>(sign | 0x7c00)};
    int exponent = magnitude < 6.103515625e-05f ? -14 : std::ilogb(magnitude);
    // In units of the last place; a carry into the next power of two runs into the exponent as it should.
    const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
    return {static_cast<unsigned short>(sign | ((exponent + 14) * 1024 + units))};
}

__nv_bfloat16 __float2bfloat16_rn(float a) {
    if (std::isnan(a)) return {0x7fff};
    const unsigned bits = bits_as<unsigned>(a);
    return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

void __syncthreads() {
    emulate::self->state = emulate::Fiber::IN_BLOCK;
    emulate::pause();
}

void __syncwarp(unsigned) {
    int none = 0;
    emulate::collective("__syncwarp", none, none, [](int**, int**) {});
}

unsigned shared_address(const void* pointer) {
    emulate::check_shared(pointer, 1, "shared_address");
    const emulate::Block& block = emulate::blocks[emulate::self->block];
    const auto offset = static_cast<const unsigned char*>(pointer) - block.shared;
    return static_cast<unsigned>(emulate::self->block << emulate::RANK_SHIFT) + emulate::SHARED_BASE + offset;
}

void cp_async_16_or_0(void* shared, const void* global, int bytes) { cp_async_16(shared, global, bytes != 0); }

void cp_async_16(void* shared, const void* global, bool valid) {
    emulate::check_shared(shared, 16, "cp.async");
    if (reinterpret_cast<uintptr_t>(global) % 16) emulate::fail("cp.async: misaligned global address");
    auto* to = static_cast<unsigned char*>(shared);
    std::memset(to, 0x5a, 16);
    emulate::self->open.push_back({to, static_cast<const unsigned char*>(global), valid});
}

void cp_async_commit() {
    emulate::self->groups.push_back(std::move(emulate::self->open));
    emulate::self->open.clear();
}

void emulate::wait_for_copies(size_t count) {
    auto& groups = self->groups;
    for (; groups.size() > count; groups.pop_front()) {
        for (const Copy& copy : groups.front()) {
            if (copy.valid) {
                std::memcpy(copy.to, copy.from, 16);
            } else {
                std::memset(copy.to, 0, 16);
            }
        }
    }
}

void ldmatrix_x4(unsigned (&d)[4], const void* row) {
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

void mma_s8(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    emulate::mma<signed char, int, int>("mma_s8", d, a, b0, b1, [](signed char code) { return int(code); });
}
void mma_f16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    auto value = [](unsigned short bits) { return static_cast<double>(__half2float({bits})); };
    emulate::mma<unsigned short, float, double>("mma_f16", d, a, b0, b1, value);
}
void mma_bf16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    auto value = [](unsigned short bits) { return static_cast<double>(__bfloat162float({bits})); };
    emulate::mma<unsigned short, float, double>("mma_bf16", d, a, b0, b1, value);
}
