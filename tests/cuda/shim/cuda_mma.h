// The matrix products of a warp by their definition: every lane gathers the rows of A and the columns of B that its
// sums need from the registers of the lanes that hold them. Lanes and registers: csrc/cuda/mma.cuh.
#pragma once

#include "cuda_shim.h"

namespace shim {

template <typename T>
uint32_t pack2(float low, float high) {
    const T values[2] = {T(low), T(high)};
    return std::bit_cast<uint32_t>(values);
}

template <typename T>
uint32_t pack2_relu(float low, float high) {
    return pack2<T>(low < 0 ? 0.0f : low, high < 0 ? 0.0f : high);
}

// The low 13 bits go; half of what they can hold is added before, which carries. NaN would carry too far.
inline uint32_t to_tf32(float x) { return x != x ? 0x7fffffffu : (std::bit_cast<uint32_t>(x) + 0x1000u) & ~0x1fffu; }

inline uint32_t to_tf32_relu(float x) { return to_tf32(x < 0 ? 0.0f : x); }

// Half 0 or 1 of a register.
template <typename T>
float half_of(uint32_t pair, int which) {
    T values[2];
    std::memcpy(values, &pair, sizeof(pair));
    return static_cast<float>(values[which]);
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const auto all_a = exchange(0xffffffffu, uint4{a[0], a[1], a[2], a[3]});
    const auto all_b = exchange(0xffffffffu, uint2{b0, b1});
    const int g = lane() / 4, q = lane() % 4;
    for (int at = 0; at < 4; ++at) {
        const int column = 2 * q + at % 2;
        for (int k = 0; k < 16; ++k) {
            const int holder = k % 8 / 2;
            const uint4 row = all_a.value[4 * g + holder];
            const uint2 col = all_b.value[4 * column + holder];
            const uint32_t left = at < 2 ? (k < 8 ? row.x : row.z) : (k < 8 ? row.y : row.w);
            d[at] += half_of<T>(left, k % 2) * half_of<T>(k < 8 ? col.x : col.y, k % 2);
        }
    }
}

// The product does not look at the low 13 bits of its operands: what was not rounded is cut off.
inline float tf32_of(uint32_t bits) { return std::bit_cast<float>(bits & ~0x1fffu); }

inline void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const auto all_a = exchange(0xffffffffu, uint4{a[0], a[1], a[2], a[3]});
    const auto all_b = exchange(0xffffffffu, uint2{b0, b1});
    const int g = lane() / 4, q = lane() % 4;
    for (int at = 0; at < 4; ++at) {
        const int column = 2 * q + at % 2;
        for (int k = 0; k < 8; ++k) {
            const uint4 row = all_a.value[4 * g + k % 4];
            const uint2 col = all_b.value[4 * column + k % 4];
            const uint32_t left = at < 2 ? (k < 4 ? row.x : row.z) : (k < 4 ? row.y : row.w);
            d[at] += tf32_of(left) * tf32_of(k < 4 ? col.x : col.y);
        }
    }
}

}  // namespace shim
