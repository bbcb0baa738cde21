// Tensors for the programs of this folder: each calls one operator's host function, its kernels running as threads of
// the system under ThreadSanitizer.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "common/dispatch.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor empty(const std::vector<int64_t>& size, ScalarType type) {
    return torch::stable::empty({size.data(), size.size()}, type, std::nullopt,
                                torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

// value(0), value(1) ...
template <typename T, typename F>
Tensor tensor(const std::vector<int64_t>& size, ScalarType type, const F& value) {
    const Tensor x = empty(size, type);
    T* data = x.mutable_data_ptr<T>();
    for (int64_t n = 0; n < x.numel(); ++n) data[n] = static_cast<T>(value(n));
    return x;
}

inline Tensor floats(const std::vector<int64_t>& size) {
    return tensor<float>(size, ScalarType::Float, [](int64_t n) { return static_cast<float>(n % 97) / 97.0f; });
}

inline Tensor halves(const std::vector<int64_t>& size) {
    return tensor<fastroute::BFloat16>(size, ScalarType::BFloat16,
                                       [](int64_t n) { return static_cast<float>(n % 97) / 97.0f; });
}

inline Tensor integers(int64_t count, int64_t step, int64_t limit) {
    return tensor<int64_t>({count}, ScalarType::Long, [&](int64_t n) { return n * step % limit; });
}
