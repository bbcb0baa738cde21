// One list of dtypes: calls a generic lambda with a value of the C++ type that stands for a ScalarType.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "common/checks.h"

namespace fastroute {

using Half = c10::Half;
using BFloat16 = c10::BFloat16;

// Sums are kept in float, and in double for double.
template <typename T>
using Work = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Whether one of the types is there for precision, not for speed.
template <typename... T>
inline constexpr bool kPrecise = (std::is_same_v<T, double> || ...);

template <typename F>
auto dispatch_floating(const char* op, ScalarType type, F&& f) {
    switch (type) {
        case ScalarType::Float: return f(float{});
        case ScalarType::Half: return f(Half{});
        case ScalarType::BFloat16: return f(BFloat16{});
        case ScalarType::Double: return f(double{});
        default: fail(op, ": the dtype must be float32, float16, bfloat16 or float64");
    }
}

template <typename F>
auto dispatch_image(const char* op, ScalarType type, F&& f) {
    switch (type) {
        case ScalarType::Byte: return f(uint8_t{});
        case ScalarType::UInt16: return f(uint16_t{});
        default: return dispatch_floating(op, type, std::forward<F>(f));
    }
}

// The type of class ids by its size.
inline ScalarType id_type(const char* op, int64_t bytes) {
    FASTROUTE_CHECK(bytes == 8 || bytes == 4 || bytes == 1, op, ": id_bytes must be 8, 4 or 1; got ", bytes);
    return bytes == 8 ? ScalarType::Long : bytes == 4 ? ScalarType::Int : ScalarType::Byte;
}

template <typename F>
auto dispatch_index(const char* op, ScalarType type, F&& f) {
    switch (type) {
        case ScalarType::Long: return f(int64_t{});
        case ScalarType::Int: return f(int32_t{});
        case ScalarType::Short: return f(int16_t{});
        case ScalarType::Byte: return f(uint8_t{});
        default: fail(op, ": the dtype must be int64, int32, int16 or uint8");
    }
}

}  // namespace fastroute
