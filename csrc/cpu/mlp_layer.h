// A layer of an MLP as the kernels that run it read it: mlp_layer_tile.h, once per instruction set.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>

namespace fastroute {

// Units of one register block: 6 units by 4 vectors of pixels leave 8 of 32 AVX-512 registers for operands, and 6 by 2
// leave 4 of 16 AVX2 ones.
inline constexpr int64_t kUnits = 6;
// Pixels that go through all layers together: the activations of 80 units, twice, stay near the first-level cache.
inline constexpr int64_t kTile = 64;

// Units in groups of kUnits, weight [group][in][units of the group]; in bfloat16, pairs of inputs for single ones, two
// numbers in the 32 bits of a float.
template <typename T>
struct Layer {
    int64_t in, out;
    const T* weight;
    const T* bias;  // [out]
};

// Two numbers that bfloat16 holds, in the bits of one float.
template <typename T>
T pair_of(T low, T high) {
    if constexpr (std::is_same_v<T, float>) {
        return std::bit_cast<float>(std::bit_cast<uint32_t>(low) >> 16 | (std::bit_cast<uint32_t>(high) & 0xffff0000u));
    }
    return low;
}

// Numbers of a packed weight.
inline int64_t packed_size(int64_t out, int64_t in, bool pairs = false) { return out * (pairs ? (in + 1) / 2 : in); }

// weight [out, in] as a Layer holds it.
template <typename T>
void pack_layer(const T* weight, int64_t out, int64_t in, bool pairs, T* packed) {
    const int64_t step = pairs ? 2 : 1;
    for (int64_t u = 0; u < out; u += kUnits) {
        const int64_t units = std::min(kUnits, out - u);
        for (int64_t k = 0; k < in; k += step) {
            for (int64_t i = 0; i < units; ++i) {
                const T* from = weight + (u + i) * in + k;
                *packed++ = pairs ? pair_of(from[0], k + 1 < in ? from[1] : T(0)) : from[0];
            }
        }
    }
}

}  // namespace fastroute
