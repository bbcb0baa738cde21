// Vectors of float32 numbers, whole ones and parts. Included once per instruction set, like simd.h.

#include "cpu/simd.h"

#define FASTROUTE_SIMD FASTROUTE_TARGET FASTROUTE_INLINE

using Floats = Vector<float>;
inline constexpr int kLanes = Simd<float>::lanes;

// The first `count` of a vector's numbers, `step` apart; zeros behind them.
FASTROUTE_SIMD Floats load_some(const float* from, int64_t step, int64_t count) {
#if FASTROUTE_BYTES == 64
    if (step == 1) return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
#endif
    float lanes[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = from[i * step];
    return load(lanes);
}

FASTROUTE_SIMD void store_some(float* to, Floats x, int64_t count) {
    if (count == kLanes) return store(to, x);
#if FASTROUTE_BYTES == 64
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), x);
#else
    float lanes[kLanes];
    store(lanes, x);
    for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
#endif
}

#undef FASTROUTE_SIMD
