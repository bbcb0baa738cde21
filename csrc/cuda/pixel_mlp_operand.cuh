// What tensor cores multiply in pixel_mlp: half types as they are, float32 as TF32. 16 inputs are one product of
// halves, or two of TF32; of each such step a lane holds four registers of the activations of 16 pixels and, of the
// weights of 16 units, 16 bytes: those of the lower eight units first.
#pragma once

#include "cuda/mma.cuh"

namespace fastroute::pixel_mlp {

struct Tf32 {
    uint32_t bits;

    Tf32() = default;
    __device__ __forceinline__ explicit Tf32(float x) : bits(to_tf32(x)) {}
};

template <typename T>
using Element = std::conditional_t<std::is_same_v<T, float>, Tf32, T>;

template <typename T>
inline constexpr int kSteps = std::is_same_v<T, float> ? 2 : 1;  // of 16 inputs

template <typename T>
inline constexpr int kTileBytes = kSteps<T> * 512;  // 16 x 16 weights

// Of 16 x 16 weights, packed as [step][lane][16 bytes], which one element `i` is. A product of TF32 takes its inputs in
// the order 0 2 4 6 1 3 5 7: the sums of one layer are then in place as the operand of the next.
struct FragmentPlace {
    int32_t unit, input;
};

template <typename T>
__device__ __forceinline__ FragmentPlace fragment_place(int32_t i) {
    if constexpr (kSteps<T> == 2) {
        const int32_t element = i % 4, lane = i / 4 % 32, step = i / 128;
        return {element / 2 * 8 + lane / 4, step * 8 + lane % 4 * 2 + element % 2};
    } else {
        const int32_t element = i % 8, lane = i / 8;
        return {element / 4 * 8 + lane / 4, lane % 4 * 2 + element % 2 + element % 4 / 2 * 8};
    }
}

// sum += activations · weights of eight units, one step.
template <typename T>
__device__ __forceinline__ void multiply_step(float (&sum)[4], const uint32_t (&x)[4], uint32_t w0, uint32_t w1) {
    if constexpr (kSteps<T> == 2) {
        mma_m16n8k8(sum, x, w0, w1);
    } else {
        mma_m16n8k16<T>(sum, x, w0, w1);
    }
}

// The steps x[0 .. kSteps) of 16 inputs, of row g (half 0) or g + 8 (half 1): ReLU of the sums of units 2q, 2q + 1,
// which are a and b, and 2q + 8, 2q + 9.
template <typename T>
__device__ __forceinline__ void set_operand(uint32_t (*x)[4], int half, float a, float b, float c, float d) {
    if constexpr (kSteps<T> == 2) {
        x[0][half] = to_tf32_relu(a), x[0][half + 2] = to_tf32_relu(b);
        x[1][half] = to_tf32_relu(c), x[1][half + 2] = to_tf32_relu(d);
    } else {
        x[0][half] = pack2_relu<T>(a, b), x[0][half + 2] = pack2_relu<T>(c, d);
    }
}

// One step read from rows of numbers: `from` is number 2q of row g, and row g + 8 lies `below`.
template <typename T>
__device__ __forceinline__ void load_operand(const Element<T>* from, int below, uint32_t (&x)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if constexpr (kSteps<T> == 2) {
            const uint2 pair = *reinterpret_cast<const uint2*>(from + half * below);
            x[half] = pair.x, x[half + 2] = pair.y;
        } else {
            x[half] = *reinterpret_cast<const uint32_t*>(from + half * below);
            x[half + 2] = *reinterpret_cast<const uint32_t*>(from + half * below + 8);
        }
    }
}

}  // namespace fastroute::pixel_mlp
