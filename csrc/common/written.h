// What is written in place: a tensor each of whose elements has an address of its own, which no input has.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include "common/checks.h"

namespace fastroute {

// Dimensions with more than one element, by stride, the largest first.
inline std::vector<std::array<int64_t, 2>> sorted_axes(const Tensor& x) {  // (stride, size)
    std::vector<std::array<int64_t, 2>> axes;
    for (int64_t d = 0; d < x.dim(); ++d) {
        if (x.size(d) > 1) axes.push_back({x.stride(d), x.size(d)});
    }
    std::sort(axes.begin(), axes.end(), std::greater<>());
    return axes;
}

// Whether no two elements share an address, as in every slice of a tensor that is not expanded.
inline bool is_injective(const Tensor& x) {
    if (x.numel() == 0) return true;  // whatever its strides are
    const auto axes = sorted_axes(x);
    int64_t extent = 1;
    for (size_t i = axes.size(); i-- > 0;) {
        if (axes[i][0] < extent) return false;
        extent += (axes[i][1] - 1) * axes[i][0];
    }
    return true;
}

// Whether elements of `x` and `y` may share addresses. Slices of one tensor are told apart; anything else that reaches
// into the same stretch of memory counts as shared.
inline bool may_overlap(const Tensor& x, const Tensor& y) {
    if (x.numel() == 0 || y.numel() == 0) return false;
    auto axes_x = sorted_axes(x), axes_y = sorted_axes(y);
    const auto bytes_of = [](const Tensor& t, const auto& axes) {
        int64_t last = 0;
        for (const auto& [stride, size] : axes) last += stride * (size - 1);
        return (last + 1) * static_cast<int64_t>(t.element_size());
    };
    auto at_x = reinterpret_cast<int64_t>(x.const_data_ptr()), at_y = reinterpret_cast<int64_t>(y.const_data_ptr());
    if (at_x + bytes_of(x, axes_x) <= at_y || at_y + bytes_of(y, axes_y) <= at_x) return false;
    const auto item = static_cast<int64_t>(x.element_size());
    if (item != static_cast<int64_t>(y.element_size())) return true;
    if (at_x > at_y) std::swap(at_x, at_y), std::swap(axes_x, axes_y);
    if ((at_y - at_x) % item != 0) return true;
    // Where y begins, in digits along the strides of both. One digit whose ranges do not meet keeps them apart, as long
    // as no digit is carried into the next.
    int64_t rest = (at_y - at_x) / item, above = 0;
    bool apart = false;
    for (auto a = axes_x.begin(), b = axes_y.begin(); a != axes_x.end() || b != axes_y.end();) {
        // One element along a stride that only the other has.
        const int64_t stride = std::max(a == axes_x.end() ? 0 : (*a)[0], b == axes_y.end() ? 0 : (*b)[0]);
        if (stride <= 0) return true;
        const int64_t size_x = a != axes_x.end() && (*a)[0] == stride ? (*a++)[1] : 1;
        const int64_t size_y = b != axes_y.end() && (*b)[0] == stride ? (*b++)[1] : 1;
        const int64_t digit = rest / stride, end = std::max(size_x, digit + size_y);
        if (above > 0 && end > above / stride) return true;
        rest %= stride, above = stride;
        apart |= digit >= size_x;
    }
    return rest != 0 || !apart;
}

// `out` can be written while `inputs` are read.
inline void check_written(const char* op, const char* name, const Tensor& out, const std::vector<Tensor>& inputs) {
    FASTROUTE_CHECK(is_injective(out), op, ": ", name,
                    " must not share memory between its own elements, as an expanded tensor does; give a .contiguous() "
                    "one");
    for (const Tensor& input : inputs) {
        FASTROUTE_CHECK(!may_overlap(out, input), op, ": ", name,
                        " must not share memory with an input, which is read while it is written; give a tensor of "
                        "its own");
    }
}

// `inputs` and those of `more` that are given.
inline std::vector<Tensor> with_given(std::vector<Tensor> inputs,
                                      std::initializer_list<const std::optional<Tensor>*> more) {
    for (const auto* x : more) {
        if (x->has_value()) inputs.push_back(**x);
    }
    return inputs;
}

}  // namespace fastroute
