// What the kernels of extract_patches and its adjoint check before they run, and the types that they run for.
#pragma once

#include "common/dispatch.h"
#include "common/geometry.h"

namespace fastroute {
namespace {

constexpr const char* kOp = "extract_patches";

// The patches of all images, and those of them that are asked for, in their order.
struct Selection {
    TileGrid grid;
    int64_t patches, count;
    std::optional<Tensor> order;  // [count] contiguous, or all of them

    const int64_t* numbers() const { return order.has_value() ? order->const_data_ptr<int64_t>() : nullptr; }
};

Selection checked_selection(const Tensor& image,                 // [B, C, H, W]
                            const std::optional<Tensor>& order,  // [M]
                            int64_t patch, int64_t stride, bool crop) {
    check_rank(kOp, "image", image, 4);
    const int64_t height = image.size(2), width = image.size(3);
    FASTROUTE_CHECK(image.size(1) > 0 && height > 0 && width > 0, kOp,
                    ": image must have at least one channel and one pixel");
    FASTROUTE_CHECK(patch > 0 && stride > 0 && stride <= patch, kOp, ": stride must lie in [1, patch]");
    const TileGrid grid{{height, patch, stride, crop}, {width, patch, stride, crop}};
    const int64_t patches = image.size(0) * grid.num_patches();
    const std::optional<Tensor> numbers = checked_index(kOp, "order", order, image);
    return {grid, patches, numbers.has_value() ? numbers->size(0) : patches, numbers};
}

// The same of the patches whose gradients are given.
Selection checked_gradients(const Tensor& grad,                  // [M, C, p, p]
                            const std::optional<Tensor>& order,  // [M]
                            int64_t batch, int64_t height, int64_t width, int64_t patch, int64_t stride, bool crop) {
    check_rank(kOp, "grad", grad, 4);
    const TileGrid grid{{height, patch, stride, crop}, {width, patch, stride, crop}};
    const int64_t patches = grid.num_patches() * batch, count = grad.size(0);
    const std::optional<Tensor> numbers = checked_index(kOp, "order", order, grad);
    FASTROUTE_CHECK(numbers.has_value() ? numbers->size(0) == count : patches == count, kOp,
                    ": grad must have one row per extracted patch; got ", count);
    return {grid, patches, count, numbers};
}

// One number per channel, of any floating type.
void check_statistic(const char* name, const Tensor& values,  // [C]
                     const Tensor& image) {                   // [B, C, H, W]
    check_same_device(kOp, name, values, image);
    check_rank(kOp, name, values, 1);
    FASTROUTE_CHECK(values.size(0) == image.size(1), kOp, ": ", name, " must have ", image.size(1), " entries; got ",
                    values.size(0));
}

Tensor empty_patches(const Tensor& image, int64_t count, int64_t patch, ScalarType dtype,
                     bool channels_last) {  // [M, C, p, p]
    const int64_t size[] = {count, image.size(1), patch, patch};
    return torch::stable::empty(
        {size, 4}, dtype, std::nullopt, image.device(), std::nullopt,
        channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous);
}

// f(pixel of the image, pixel of a patch): a value of each type. Integers are written only as they were read.
template <typename F>
void dispatch_extract(ScalarType image, ScalarType target, F&& f) {
    dispatch_image(kOp, image, [&](auto in_zero) {
        using In = decltype(in_zero);
        dispatch_image(kOp, target, [&](auto out_zero) {
            using Out = decltype(out_zero);
            if constexpr (std::is_integral_v<Out> && !std::is_same_v<In, Out>) {
                fail("fastroute error: ", kOp, ": dtype must be floating to convert");
            } else {
                f(In{}, out_zero);
            }
        });
    });
}

}  // namespace
}  // namespace fastroute
