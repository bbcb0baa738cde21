// Tensors beside an image: of its type, or numbers of channels, which may be float32 as well.
#pragma once

#include <type_traits>

#include "common/checks.h"
#include "common/dispatch.h"

namespace fastroute {

// `x` is a CPU tensor of `rank` dimensions and of the type of `image`, which errors name so.
inline void check_like(const char* op, const char* name, const Tensor& x, ScalarType type, const char* image,
                       int64_t rank) {
    check_cpu(op, name, x), check_rank(op, name, x, rank);
    FASTROUTE_CHECK(x.scalar_type() == type, op, ": ", name, " must have the dtype of ", image);
}

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
