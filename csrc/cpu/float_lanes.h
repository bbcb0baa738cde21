// Vectors of float32 numbers, whole ones and parts, in memory also as bfloat16. Included once per instruction set, like
// simd.h.

#include "cpu/simd.h"

#define FASTROUTE_SIMD FASTROUTE_TARGET FASTROUTE_INLINE

using Floats = Vector<float>;
inline constexpr int kLanes = Simd<float>::lanes;

// A vector of bfloat16, the upper halves of float32 numbers.
typedef uint16_t Halves __attribute__((vector_size(FASTROUTE_BYTES / 2)));
typedef uint16_t UnalignedHalves __attribute__((vector_size(FASTROUTE_BYTES / 2), aligned(2), may_alias));

// GCC takes three times as many instructions for vectors of 64 bytes if it is not told which.
FASTROUTE_SIMD Floats widened(Halves x) {
#if FASTROUTE_BYTES == 64
    const auto numbers =
        reinterpret_cast<Vector<uint32_t>>(_mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(x)));
#else
    const auto numbers = __builtin_convertvector(x, Vector<uint32_t>);
#endif
    return reinterpret_cast<Floats>(numbers << 16);
}

// To the nearest number, of two the even one. NaN stays NaN.
FASTROUTE_SIMD Halves rounded(Floats x) {
    const auto bits = reinterpret_cast<Vector<uint32_t>>(x);
    const Vector<uint32_t> nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Vector<uint32_t> numbers = x == x ? nearest : Vector<uint32_t>{} + 0x7fc0;
#if FASTROUTE_BYTES == 64
    return reinterpret_cast<Halves>(_mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(numbers)));
#else
    return __builtin_convertvector(numbers, Halves);
#endif
}

FASTROUTE_SIMD Floats load_floats(const float* from) { return load(from); }
FASTROUTE_SIMD Floats load_floats(const c10::BFloat16* from) {
    return widened(*reinterpret_cast<const UnalignedHalves*>(from));
}
FASTROUTE_SIMD void store_floats(float* to, Floats x) { store(to, x); }
FASTROUTE_SIMD void store_floats(c10::BFloat16* to, Floats x) { *reinterpret_cast<UnalignedHalves*>(to) = rounded(x); }

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

FASTROUTE_SIMD Floats load_lanes(const c10::BFloat16* from, Lanes lanes) {
#if FASTROUTE_BYTES == 64
    return widened(reinterpret_cast<Halves>(_mm256_maskz_loadu_epi16(lanes, from)));
#else
#if FASTROUTE_BYTES == 32
    const int64_t count = __builtin_popcount(_mm256_movemask_ps(_mm256_castsi256_ps(lanes)));
#else
    const int64_t count = lanes;
#endif
    c10::BFloat16 found[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) found[i] = from[i];
    return load_floats(found);
#endif
}

// The first `count` of a vector's numbers, `step` apart.
template <typename T>
FASTROUTE_SIMD Floats load_some(const T* from, int64_t step, int64_t count) {
    if (step == 1) return count == kLanes ? load_floats(from) : load_lanes(from, first_lanes(count));
    T found[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) found[i] = from[i * step];
    return load_floats(found);
}

template <typename T>
FASTROUTE_SIMD void store_some(T* to, Floats x, int64_t count) {
    if (count == kLanes) return store_floats(to, x);
#if FASTROUTE_BYTES == 64
    if constexpr (sizeof(T) == 4) {
        _mm512_mask_storeu_ps(to, first_lanes(count), x);
    } else {
        _mm256_mask_storeu_epi16(to, first_lanes(count), reinterpret_cast<__m256i>(rounded(x)));
    }
#else
    T numbers[kLanes];
    store_floats(numbers, x);
    for (int64_t i = 0; i < count; ++i) to[i] = numbers[i];
#endif
}

#undef FASTROUTE_SIMD
