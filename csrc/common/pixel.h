// Pixel types: what an integer's maximum is, and how sums become pixels.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dispatch.h"
#include "common/host_device.h"

namespace fastroute {

template <typename T>
inline constexpr float kMaximum = 0.0f;  // 0: a floating type, used as it is
template <>
inline constexpr float kMaximum<uint8_t> = 255.0f;
template <>
inline constexpr float kMaximum<uint16_t> = 65535.0f;

// A number in [0, 1] as an integer pixel, rounded half to even.
template <typename T, typename W>
FASTROUTE_HOST_DEVICE T round_pixel(W value) {
    // Adding 1.5 · 2^m pushes the fraction out of the mantissa, so the addition itself rounds half to even.
    constexpr W shift = std::is_same_v<W, double> ? W(6755399441055744.0) : W(12582912.0);
    return static_cast<T>(static_cast<int32_t>(add(multiply(value, W(kMaximum<T>)), shift) - shift));
}

// A sum as an output pixel: rounded to a float type; or [0, 1] scaled, clamped and rounded half to even, NaN being 0.
template <typename T, typename W>
FASTROUTE_HOST_DEVICE T to_pixel(W value) {
    if constexpr (std::is_integral_v<T>) {
        return round_pixel<T>(value > W(0) ? (value < W(1) ? value : W(1)) : W(0));
    } else {
        return static_cast<T>(value);
    }
}

// A pixel as the number that arithmetic uses: integers become [0, 1].
template <typename W, typename T>
FASTROUTE_HOST_DEVICE W from_pixel(T pixel) {
    if constexpr (std::is_integral_v<T>) return static_cast<W>(pixel) / W(kMaximum<T>);
    return static_cast<W>(pixel);
}

}  // namespace fastroute
