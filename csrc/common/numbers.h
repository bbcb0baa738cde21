// Numbers of a vector, one for each channel, that are float32 or have the type of an image.
#pragma once

#include <type_traits>

#include "common/checks.h"
#include "common/dispatch.h"

namespace fastroute {

// Calls f(index, value) for each number of `x`, of type T or float32.
template <typename T, typename F>
void read_numbers(const char* op, const char* name, const Tensor& x, const F& f) {  // [N]
    check_cpu(op, name, x);
    const auto read = [&](const auto* from) {
        // Each is a call into torch.
        const int64_t count = x.size(0), step = x.stride(0);
        for (int64_t i = 0; i < count; ++i) f(i, static_cast<float>(from[i * step]));
    };
    if (x.scalar_type() == ScalarType::Float) return read(x.const_data_ptr<float>());
    if constexpr (std::is_same_v<T, BFloat16>) {
        if (x.scalar_type() == ScalarType::BFloat16) return read(x.const_data_ptr<T>());
    }
    fail(op, ": ", name, " must be float32, or have the dtype of the image");
}

}  // namespace fastroute
