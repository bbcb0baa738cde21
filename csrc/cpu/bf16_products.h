// Products of bfloat16 with AVX-512 BF16: one instruction multiplies two channels of a pixel by the weights of 16
// outputs and adds both products to float32 sums.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>
#include <cstring>

#include "cpu/intrinsics.h"
#include "cpu/isa.h"

#if FASTROUTE_X86
#define FASTROUTE_SIMD FASTROUTE_AVX512_BF16 FASTROUTE_INLINE

namespace fastroute::bf16 {

using Number = c10::BFloat16;

inline constexpr int64_t kLanes = 16;
// Vectors of outputs in a block of registers.
inline constexpr int kMostVectors = 4;
// Pixels beside them: what is left of 32 registers, but for a vector of weights each and the broadcast.
template <int Vectors>
inline constexpr int kPixels = Vectors == 4   ? 6
                               : Vectors == 3 ? 8
                                              : 12;

// Pairs of channels of one image: those of a pixel follow each other, pixels are `step` numbers apart.
struct Pairs {
    const Number* first;
    int64_t count, step;
    const float* weight;  // [count][columns] pairs of numbers
};

// Two numbers in every lane.
FASTROUTE_SIMD __m512bh broadcast_pair(const Number* from) {
    int32_t pair;
    std::memcpy(&pair, from, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

// sum[i][v] = bias[column] + Σ weight · pixel over all `sources`, for pixels `offset` + i and columns from `first` on.
template <int Pixels, int Vectors>
FASTROUTE_SIMD void multiply(const Pairs* sources, int64_t number, int64_t offset, int64_t columns, int64_t first,
                             const float* bias, __m512 (&sum)[Pixels][Vectors]) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
        const __m512 added = _mm512_loadu_ps(bias + first + v * kLanes);
#pragma GCC unroll 12
        for (int i = 0; i < Pixels; ++i) sum[i][v] = added;
    }
    for (const Pairs* source = sources; source < sources + number; ++source) {
        const Number* a = source->first + offset * source->step;
        const float* b = source->weight + first;
        for (int64_t k = 0; k < source->count; ++k, a += 2, b += columns) {
            __m512bh weight[Vectors];
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) weight[v] = (__m512bh)_mm512_loadu_ps(b + v * kLanes);
#pragma GCC unroll 12
            for (int i = 0; i < Pixels; ++i) {
                const __m512bh x = broadcast_pair(a + i * source->step);
#pragma GCC unroll 4
                for (int v = 0; v < Vectors; ++v) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], x, weight[v]);
            }
        }
    }
}

// The first `count` lanes.
FASTROUTE_SIMD __mmask16 lanes_of(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

// `count` numbers, `step` apart, as float32.
FASTROUTE_SIMD __m512 widened(const Number* from, int64_t step, int64_t count) {
    Number found[kLanes] = {};
    if (step != 1) {
        for (int64_t i = 0; i < count; ++i) found[i] = from[i * step];
        from = found;
    }
    const __m256i halves = _mm256_maskz_loadu_epi16(lanes_of(count), from);
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, halves), 16));
}

// Negative numbers, and NaN, times `slope`.
FASTROUTE_SIMD __m512 rectified(__m512 x, __m512 slope) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ), x * slope, x);
}

// The first `count` numbers, rounded.
FASTROUTE_SIMD void store_rounded(Number* to, __m512 x, int64_t count) {
    _mm256_mask_storeu_epi16(to, lanes_of(count), (__m256i)_mm512_cvtneps_pbh(x));
}

}  // namespace fastroute::bf16

#undef FASTROUTE_SIMD
#endif
