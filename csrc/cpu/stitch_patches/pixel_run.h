// Runs of pixels.
#pragma once

#include <cstdint>

#include "common/pixel.h"
#include "cpu/halves.h"
#include "cpu/isa.h"

namespace fastroute {

// A run of sums as pixels.
template <typename T, typename W>
FASTROUTE_INLINE void to_pixels(T* __restrict to, const W* __restrict from, int64_t count) {
    if constexpr (std::is_same_v<T, Half> && std::is_same_v<W, float>) {
        if (has_halves()) return narrow_halves(from, count, to);
    }
    if constexpr (std::is_integral_v<T>) {
        // Bounds that the compiler does not know: it would turn comparisons with constants into masks, not into minima.
        W zero = 0, one = 1;
        asm("" : "+m"(zero), "+m"(one));
        for (int64_t i = 0; i < count; ++i) {
            W value = from[i];
            value = value > zero ? value : zero;
            value = value < one ? value : one;
            to[i] = round_pixel<T>(value);
        }
    } else {
        for (int64_t i = 0; i < count; ++i) to[i] = to_pixel<T>(from[i]);
    }
}

}  // namespace fastroute
