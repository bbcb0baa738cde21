// Vectors of float32 numbers, whole ones and parts. Included once per instruction set, like simd.h.

#include "cpu/simd.h"

#define FASTROUTE_SIMD FASTROUTE_TARGET FASTROUTE_INLINE

using Floats = Vector<float>;
inline constexpr int kLanes = Simd<float>::lanes;

// Which numbers of a vector are there: the first `count`, or none.
#if FASTROUTE_BYTES == 64
using Lanes = __mmask16;
FASTROUTE_SIMD Lanes first_lanes(int64_t count) { return static_cast<Lanes>((1u << count) - 1); }
#elif FASTROUTE_BYTES == 32
using Lanes = __m256i;
FASTROUTE_SIMD Lanes first_lanes(int64_t count) {
    const __m256i numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), numbers);
}
#else
using Lanes = int64_t;
FASTROUTE_SIMD Lanes first_lanes(int64_t count) { return count; }
#endif

// Zeros take the place of numbers that are not there, whose memory is not touched.
FASTROUTE_SIMD Floats load_lanes(const float* from, Lanes lanes) {
#if FASTROUTE_BYTES == 64
    return _mm512_maskz_loadu_ps(lanes, from);
#elif FASTROUTE_BYTES == 32
    return _mm256_maskload_ps(from, lanes);
#else
    if (lanes == kLanes) return load(from);
    float found[kLanes] = {};
    for (int64_t i = 0; i < lanes; ++i) found[i] = from[i];
    return load(found);
#endif
}

// The first `count` of a vector's numbers, `step` apart.
FASTROUTE_SIMD Floats load_some(const float* from, int64_t step, int64_t count) {
    if (step == 1) return count == kLanes ? load(from) : load_lanes(from, first_lanes(count));
    float found[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) found[i] = from[i * step];
    return load(found);
}

FASTROUTE_SIMD void store_some(float* to, Floats x, int64_t count) {
    if (count == kLanes) return store(to, x);
#if FASTROUTE_BYTES == 64
    _mm512_mask_storeu_ps(to, first_lanes(count), x);
#else
    float numbers[kLanes];
    store(numbers, x);
    for (int64_t i = 0; i < count; ++i) to[i] = numbers[i];
#endif
}

#undef FASTROUTE_SIMD
