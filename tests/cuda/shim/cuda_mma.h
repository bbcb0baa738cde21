// The matrix product of a warp by its definition: every lane gathers the rows of A and the columns of B that its sums
// need from the registers of the lanes that hold them. Lanes and registers: csrc/cuda/mma.cuh.
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

}  // namespace shim
