// The layers behind the first in bfloat16, with AVX-512 BF16: one instruction multiplies two pairs of numbers and adds
// both products to a float32 sum.
//
// Activations lie as [pairs of units][pixels], each the 32 bits of a float: an even unit's number below the next one's.
// They are rounded to bfloat16 behind each ReLU, as layers of that type round them; the last layer's sums are not.
#pragma once

#include <cstdint>

#include "cpu/intrinsics.h"
#include "cpu/isa.h"
#include "cpu/pixel_mlp/plan.h"

#if FASTROUTE_X86
#define FASTROUTE_SIMD FASTROUTE_AVX512_BF16 FASTROUTE_INLINE

namespace fastroute::pixel_mlp::bf16 {

inline constexpr int64_t kLanes = 16;
// As many vectors of pixels beside kUnits as the registers hold.
inline constexpr int kVectors = 4;

// relu of 16 numbers, rounded, each in the lower half of its lane; NaN stays: the maximum returns its second operand
// when two do not compare. Without masks g++ warns of values that its own intrinsics leave undefined.
FASTROUTE_SIMD __m512i rounded(__m512 x) {
    const __m512 positive = _mm512_maskz_max_ps(0xffff, _mm512_setzero_ps(), x);
    return _mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)_mm512_cvtneps_pbh(positive));
}

// The same of two units of 16 pixels, as pairs.
FASTROUTE_SIMD __m512 pairs_of(__m512 even, __m512 odd) {
    const __m512i high = _mm512_maskz_slli_epi32(0xffff, rounded(odd), 16);
    return _mm512_castsi512_ps(_mm512_or_si512(rounded(even), high));
}

// y[u] = bias[u] + Σ_k weight[k][u] · x[k] for Units units and Count vectors of pixels, k counting pairs.
template <int Units, int Count, bool Last>
FASTROUTE_SIMD void multiply_block(const float* weight, const float* bias, const float* x, int64_t pairs, float* y) {
    __m512 sum[Units][Count];
#pragma GCC unroll 8
    for (int u = 0; u < Units; ++u) {
#pragma GCC unroll 4
        for (int v = 0; v < Count; ++v) sum[u][v] = _mm512_set1_ps(bias[u]);
    }
    for (int64_t k = 0; k < pairs; ++k) {
        __m512 pixels[Count];
#pragma GCC unroll 4
        for (int v = 0; v < Count; ++v) pixels[v] = _mm512_loadu_ps(x + k * kTile + v * kLanes);
#pragma GCC unroll 8
        for (int u = 0; u < Units; ++u) {
            const __m512bh w = (__m512bh)_mm512_set1_ps(weight[k * Units + u]);
#pragma GCC unroll 4
            for (int v = 0; v < Count; ++v) sum[u][v] = _mm512_dpbf16_ps(sum[u][v], w, (__m512bh)pixels[v]);
        }
    }
#pragma GCC unroll 8
    for (int u = 0; u < Units; u += Last ? 1 : 2) {
#pragma GCC unroll 4
        for (int v = 0; v < Count; ++v) {
            float* to = y + (Last ? u : u / 2) * kTile + v * kLanes;
            _mm512_storeu_ps(
                to, Last ? sum[u][v] : pairs_of(sum[u][v], u + 1 < Units ? sum[u + 1][v] : _mm512_setzero_ps()));
        }
    }
}

// One layer for Count vectors of pixels.
template <int Count, bool Last>
FASTROUTE_AVX512_BF16 __attribute__((noinline)) inline void multiply_layer(const Layer<float>& layer, const float* x,
                                                                           float* y) {
    const float *weight = layer.weight, *bias = layer.bias;
    const int64_t pairs = (layer.in + 1) / 2;
    constexpr int64_t step = kTile / (Last ? 1 : 2);
    int64_t u = 0;
    for (; u + kUnits <= layer.out; u += kUnits) {
        multiply_block<kUnits, Count, Last>(weight, bias + u, x, pairs, y + u * step);
        weight += kUnits * pairs;
    }
    switch (layer.out - u) {
        case 5: return multiply_block<5, Count, Last>(weight, bias + u, x, pairs, y + u * step);
        case 4: return multiply_block<4, Count, Last>(weight, bias + u, x, pairs, y + u * step);
        case 3: return multiply_block<3, Count, Last>(weight, bias + u, x, pairs, y + u * step);
        case 2: return multiply_block<2, Count, Last>(weight, bias + u, x, pairs, y + u * step);
        case 1: return multiply_block<1, Count, Last>(weight, bias + u, x, pairs, y + u * step);
        default: return;
    }
}

template <bool Last>
FASTROUTE_SIMD void run_layer(const Layer<float>& layer, const float* x, int64_t vectors, float* y) {
    int64_t v = 0;
    for (; v + kVectors <= vectors; v += kVectors)
        multiply_layer<kVectors, Last>(layer, x + v * kLanes, y + v * kLanes);
    for (; v < vectors; ++v) multiply_layer<1, Last>(layer, x + v * kLanes, y + v * kLanes);
}

// All layers behind the first, from its sums `x`, [units][kTile], to those of the last layer, in `x` or `y` as
// returned.
FASTROUTE_AVX512_BF16 __attribute__((noinline)) inline float* run_layers(const Mlp<float>& mlp, int64_t vectors,
                                                                         float* x, float* y) {
    for (int64_t u = 0; u < mlp.units; u += 2) {
        for (int64_t p = 0; p < vectors * kLanes; p += kLanes) {
            const __m512 even = _mm512_loadu_ps(x + u * kTile + p);
            const __m512 odd = u + 1 < mlp.units ? _mm512_loadu_ps(x + (u + 1) * kTile + p) : _mm512_setzero_ps();
            _mm512_storeu_ps(y + u / 2 * kTile + p, pairs_of(even, odd));
        }
    }
    for (size_t n = 0; n + 1 < mlp.layers.size(); ++n) {
        std::swap(x, y);
        run_layer<false>(mlp.layers[n], x, vectors, y);
    }
    run_layer<true>(mlp.layers.back(), y, vectors, x);
    return x;
}

}  // namespace fastroute::pixel_mlp::bf16

#undef FASTROUTE_SIMD
#endif
