// Runs of float16 from and to float32, eight at a time by instructions that the compiler makes no use of by itself.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "cpu/intrinsics.h"
#include "cpu/isa.h"

namespace fastroute {

// Whether the processor has these instructions; else the functions below must not be called.
inline bool has_halves() { return FASTROUTE_X86 && active_isa() != Isa::baseline; }

#if FASTROUTE_X86
FASTROUTE_AVX2 __attribute__((noinline)) inline void widen_halves(const Half* from, int64_t count, float* to) {
    int64_t l = 0;
    for (; l + 8 <= count; l += 8) {
        _mm256_storeu_ps(to + l, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + l))));
    }
    for (; l < count; ++l) to[l] = static_cast<float>(from[l]);
}

FASTROUTE_AVX2 __attribute__((noinline)) inline void narrow_halves(const float* from, int64_t count, Half* to) {
    int64_t l = 0;
    for (; l + 8 <= count; l += 8) {
        const __m128i halves =
            _mm256_cvtps_ph(_mm256_loadu_ps(from + l), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + l), halves);
    }
    for (; l < count; ++l) to[l] = static_cast<Half>(from[l]);
}
#else
inline void widen_halves(const Half*, int64_t, float*) {}
inline void narrow_halves(const float*, int64_t, Half*) {}
#endif

}  // namespace fastroute
