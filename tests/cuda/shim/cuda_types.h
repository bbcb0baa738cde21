// Types and scalar functions of CUDA that the kernels use.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

#define SHIM_VECTORS(scalar, name, bytes)                                           \
    struct alignas(2 * (bytes)) name##2 { scalar x, y; };                           \
    struct alignas((bytes) == 8 ? 16 : 4 * (bytes)) name##4 { scalar x, y, z, w; }; \
    inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }            \
    inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
SHIM_VECTORS(float, float, 4)
SHIM_VECTORS(double, double, 8)
SHIM_VECTORS(int, int, 4)
SHIM_VECTORS(unsigned, uint, 4)
SHIM_VECTORS(short, short, 2)
SHIM_VECTORS(unsigned short, ushort, 2)
SHIM_VECTORS(unsigned char, uchar, 1)
SHIM_VECTORS(long long, longlong, 8)
SHIM_VECTORS(unsigned long long, ulonglong, 8)
#undef SHIM_VECTORS

using __half = c10::Half;
using __nv_bfloat16 = c10::BFloat16;
struct alignas(4) __half2 {
    __half x, y;
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

inline __half __float2half_rn(float x) { return {x}; }
inline __half __float2half(float x) { return {x}; }
inline float __half2float(__half x) { return x; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
// A product of two halves is exact in float, so that it is rounded once.
inline __half2 __hmul2(__half2 a, __half2 b) { return {float{a.x} * float{b.x}, float{a.y} * float{b.y}}; }
inline __half __half_sat(__half x) { return float{x} > 0 ? (float{x} < 1 ? float{x} : 1.0f) : 0.0f; }
inline __half2 __hmul2_sat(__half2 a, __half2 b) {
    const __half2 product = __hmul2(a, b);
    return {__half_sat(product.x), __half_sat(product.y)};
}
// Byte n is that which the n-th digit of `select` numbers in the eight bytes of a and b.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned select) {
    const uint64_t bytes = uint64_t{b} << 32 | a;
    unsigned result = 0;
    for (int n = 0; n < 4; ++n) result |= (bytes >> (select >> 4 * n & 7u) * 8 & 0xffu) << 8 * n;
    return result;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {x}; }
inline __nv_bfloat16 __float2bfloat16(float x) { return {x}; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }

// Each rounds once: the build forbids contraction.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
// As far from the logarithm as that of a device may be.
inline float __log2f(float x) {
    const float log = std::log2(x), off = 0x1p-22f * std::max(1.0f, std::fabs(log));
    return std::isfinite(log) ? log + ((std::bit_cast<uint32_t>(x) >> 3 & 1u) != 0 ? off : -off) : log;
}
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __double2int_rn(double x) { return static_cast<int>(std::nearbyint(x)); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }

template <typename T>
T min(T a, T b) {
    return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
    return a < b ? b : a;
}

template <typename T>
T __ldg(const T* p) {
    return *p;
}
template <typename T>
T __ldcs(const T* p) {
    return *p;
}
template <typename T>
void __stcs(T* p, T value) {
    *p = value;
}

// Of integers alone: sums of floats must not depend on the order of threads.
template <typename T, typename V>
T atomicAdd(T* p, V value) {
    static_assert(std::is_integral_v<T>);
    return __atomic_fetch_add(p, static_cast<T>(value), __ATOMIC_RELAXED);
}
template <typename T, typename V>
T atomicOr(T* p, V value) {
    return __atomic_fetch_or(p, static_cast<T>(value), __ATOMIC_RELAXED);
}
template <typename T, typename V>
T atomicExch(T* p, V value) {
    return __atomic_exchange_n(p, static_cast<T>(value), __ATOMIC_RELAXED);
}
template <typename T>
T atomicCAS(T* p, T expected, T value) {
    __atomic_compare_exchange_n(p, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}
template <typename T, typename V>
T atomicMax(T* p, V value) {
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (old < static_cast<T>(value) &&
           !__atomic_compare_exchange_n(p, &old, static_cast<T>(value), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}
template <typename T, typename V>
T atomicMin(T* p, V value) {
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (static_cast<T>(value) < old &&
           !__atomic_compare_exchange_n(p, &old, static_cast<T>(value), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
