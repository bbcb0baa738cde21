// What the kernels of extract_patches and its adjoint check before they run, and the types that they run for.
#pragma once

#include "common/dispatch.h"
#include "common/grid.h"

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
    check_at_least(kOp, "the number of channels", image.size(1), 1);
    const TileGrid grid = checked_grid(kOp, image.size(2), image.size(3), patch, stride, crop);
    checked_product(kOp, "the number of patches", {image.size(0), grid.y.count(), grid.x.count()});
    const int64_t patches = image.size(0) * grid.num_patches();
    const std::optional<Tensor> numbers = checked_index(kOp, "order", order, image);
    return {grid, patches, numbers.has_value() ? numbers->size(0) : patches, numbers};
}

// The same of the patches whose gradients are given.
Selection checked_gradients(const Tensor& grad,                  // [M, C, p, p]
                            const std::optional<Tensor>& order,  // [M]
                            int64_t batch, int64_t height, int64_t width, int64_t patch, int64_t stride, bool crop) {
    check_rank(kOp, "grad", grad, 4);
    const TileGrid grid = checked_grid(kOp, height, width, patch, stride, crop);
    check_at_least(kOp, "batch", batch, 0);
    FASTROUTE_CHECK(grad.size(2) == patch && grad.size(3) == patch, kOp, ": grad must be ", patch, " x ", patch,
                    " pixels wide, as the patches are; got ", grad.size(2), " x ", grad.size(3));
    checked_product(kOp, "the number of patches", {batch, grid.y.count(), grid.x.count()});
    checked_product(kOp, "the image", {batch, grad.size(1), height, width});
    const int64_t patches = grid.num_patches() * batch, count = grad.size(0);
    const std::optional<Tensor> numbers = checked_index(kOp, "order", order, grad);
    FASTROUTE_CHECK(numbers.has_value() ? numbers->size(0) == count : patches == count, kOp,
                    ": grad must have one row per extracted patch; got ", count);
    return {grid, patches, count, numbers};
}

// Rows and columns that are cut out from the first pixel of a patch on: those of a region hold at least a patch.
void check_extent(int64_t rows, int64_t cols, int64_t patch) {
    FASTROUTE_CHECK(rows >= patch && cols >= patch, kOp, ": size must be at least the patch, ", patch, " x ", patch,
                    "; got ", rows, " x ", cols);
}

// One number per channel, of any floating type.
void check_statistic(const char* name, const Tensor& values,  // [C]
                     const Tensor& image) {                   // [B, C, H, W]
    check_same_device(kOp, name, values, image);
    check_rank(kOp, name, values, 1);
    FASTROUTE_CHECK(values.size(0) == image.size(1), kOp, ": ", name, " must have ", image.size(1), " entries; got ",
                    values.size(0));
}

Tensor empty_patches(const Tensor& image, int64_t count, int64_t rows, int64_t cols, ScalarType dtype,
                     bool channels_last) {  // [M, C, rows, cols]
    return empty_tensor(
        kOp, "the patches", {count, image.size(1), rows, cols}, dtype, image,
        channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous);
}

// Integers keep their values: what is to be normalised becomes floating.
void check_conversion(const Tensor& image, ScalarType target, const std::optional<Tensor>& mean,
                      const std::optional<Tensor>& std) {
    const bool floating = target != ScalarType::Byte && target != ScalarType::UInt16;
    FASTROUTE_CHECK(floating || (target == image.scalar_type() && !mean.has_value() && !std.has_value()), kOp,
                    ": dtype must be floating to convert or normalise");
    if (mean.has_value()) check_statistic("mean", *mean, image);
    if (std.has_value()) check_statistic("std", *std, image);
}

// f(pixel of the image, pixel of a patch): a value of each type. Integers are written only as they were read.
template <typename F>
void dispatch_extract(ScalarType image, ScalarType target, F&& f) {
    dispatch_image(kOp, image, [&](auto in_zero) {
        using In = decltype(in_zero);
        dispatch_image(kOp, target, [&](auto out_zero) {
            using Out = decltype(out_zero);
            if constexpr (std::is_integral_v<Out> && !std::is_same_v<In, Out>) {
                fail(kOp, ": dtype must be floating to convert or normalise");
            } else {
                f(In{}, out_zero);
            }
        });
    });
}

}  // namespace
}  // namespace fastroute
