// Eight scores as doubles with AVX-512, for sums in eight lanes: the compiler does not see by itself that a lane of the
// sums is a lane of a vector. Other instruction sets take the general way, with the same bits.
#pragma once

#include "common/dispatch.h"
#include "cpu/intrinsics.h"
#include "cpu/isa.h"

#if FASTROUTE_X86
namespace fastroute {

FASTROUTE_AVX512 FASTROUTE_INLINE __m512d eight_doubles(const double* from) { return _mm512_loadu_pd(from); }

FASTROUTE_AVX512 FASTROUTE_INLINE __m512d eight_doubles(const float* from) {
    return _mm512_cvtps_pd(_mm256_loadu_ps(from));
}

FASTROUTE_AVX512 FASTROUTE_INLINE __m512d eight_doubles(const Half* from) {
    return _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

FASTROUTE_AVX512 FASTROUTE_INLINE __m512d eight_doubles(const BFloat16* from) {
    const __m256i halves = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(halves, 16)));
}

}  // namespace fastroute
#endif
