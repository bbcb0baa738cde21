// extract_patches: the patches of an image, or the regions that begin with them, read where they lie, converted and
// normalised. What every device checks and allocates, and the types that kernels run for.
#pragma once

#include "common/checked_geometry.h"
#include "common/dispatch.h"
#include "common/huge_pages.h"

namespace fastroute {
namespace {

constexpr const char* kOp = "extract_patches";

// The patches of all images, and those of them that are asked for, in their order.
struct Selection {
    Geometry geometry;
    int64_t patches, count;
    std::optional<Tensor> order;  // [count] contiguous, or all of them

    const int64_t* numbers() const { return order.has_value() ? order->const_data_ptr<int64_t>() : nullptr; }
};

// A call, checked but for the values of `order`.
struct Extraction {
    Tensor image;  // [B, C, H, W]
    Selection selected;
    std::optional<Tensor> mean, std;  // [C]
    int64_t rows, cols;               // that are cut out
    bool channels_last;
};

// The same of the adjoint.
struct ExtractionBackward {
    Tensor grad;  // [M, C, p, p]
    Selection selected;
};

// Each device defines these: what it alone can check, before memory is taken; and the kernels, In being the type of the
// image's pixels, Out that of the patches', T that of the gradients.
void check_on_device(const Extraction& call);
template <typename In, typename Out>
void run_extract_patches(const Extraction& call, const Tensor& out);  // [M, C, rows, cols]
void check_on_device(const ExtractionBackward& call);
template <typename T>
void run_extract_patches_backward(const ExtractionBackward& call, const Tensor& out);  // [B, C, H, W]

Selection checked_selection(const Tensor& image,                 // [B, C, H, W]
                            const std::optional<Tensor>& order,  // [M]
                            int64_t patch, int64_t stride, bool crop) {
    check_rank(kOp, "image", image, 4);
    check_at_least(kOp, "the number of channels", image.size(1), 1);
    const Geometry geometry = checked_geometry(kOp, image.size(2), image.size(3), patch, stride, 1, crop);
    checked_product(kOp, "the number of patches", {image.size(0), geometry.y.count(), geometry.x.count()});
    const int64_t patches = image.size(0) * geometry.num_patches();
    const std::optional<Tensor> numbers = checked_index(kOp, "order", order, image);
    return {.geometry = geometry,
            .patches = patches,
            .count = numbers.has_value() ? numbers->size(0) : patches,
            .order = numbers};
}

// The same of the patches whose gradients are given.
Selection checked_gradients(const Tensor& grad,                  // [M, C, p, p]
                            const std::optional<Tensor>& order,  // [M]
                            int64_t batch, const Geometry& geometry) {
    check_rank(kOp, "grad", grad, 4);
    const int64_t patch = geometry.y.patch;
    check_at_least(kOp, "batch", batch, 0);
    FASTROUTE_CHECK(grad.size(2) == patch && grad.size(3) == patch, kOp, ": grad must be ", patch, " x ", patch,
                    " pixels wide, as the patches are; got ", grad.size(2), " x ", grad.size(3));
    checked_product(kOp, "the number of patches", {batch, geometry.y.count(), geometry.x.count()});
    checked_product(kOp, "the image", {batch, grad.size(1), geometry.y.size, geometry.x.size});
    const int64_t patches = geometry.num_patches() * batch, count = grad.size(0);
    const std::optional<Tensor> numbers = checked_index(kOp, "order", order, grad);
    FASTROUTE_CHECK(numbers.has_value() ? numbers->size(0) == count : patches == count, kOp,
                    ": grad must have one row per extracted patch; got ", count);
    return {.geometry = geometry, .patches = patches, .count = count, .order = numbers};
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

Tensor extract_patches(const Tensor& image,                 // [B, C, H, W]
                       const std::optional<Tensor>& order,  // [M]
                       const std::optional<Tensor>& mean,   // [C]
                       const std::optional<Tensor>& std,    // [C]
                       int64_t patch, int64_t stride, bool crop, std::optional<ScalarType> dtype, bool channels_last,
                       int64_t rows, int64_t cols) {
    using torch::headeronly::MemoryFormat;
    check_extent(rows, cols, patch);
    const Extraction call{.image = image,
                          .selected = checked_selection(image, order, patch, stride, crop),
                          .mean = mean,
                          .std = std,
                          .rows = rows,
                          .cols = cols,
                          .channels_last = channels_last};
    const ScalarType target = dtype.value_or(image.scalar_type());
    check_conversion(image, target, mean, std);
    check_on_device(call);
    const Tensor out =
        prefer_huge_pages(empty_tensor(kOp, "the patches", {call.selected.count, image.size(1), rows, cols}, target,
                                       image, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous));
    dispatch_extract(image.scalar_type(), target, [&](auto in_zero, auto out_zero) {
        run_extract_patches<decltype(in_zero), decltype(out_zero)>(call, out);
    });
    return out;
}

Tensor _extract_patches_backward(const Tensor& grad,                  // [M, C, p, p]
                                 const std::optional<Tensor>& order,  // [M]
                                 int64_t batch, int64_t height, int64_t width, int64_t patch, int64_t stride,
                                 bool crop) {
    const Geometry geometry = checked_geometry(kOp, height, width, patch, stride, 1, crop);
    const Selection selected = checked_gradients(grad, order, batch, geometry);
    const ExtractionBackward call{.grad = torch::stable::contiguous(grad), .selected = selected};
    check_on_device(call);
    const Tensor out = empty_tensor(kOp, "the image", {batch, grad.size(1), height, width}, grad.scalar_type(), grad);
    if (out.numel() == 0) return out;
    dispatch_floating(kOp, grad.scalar_type(),
                      [&](auto zero) { run_extract_patches_backward<decltype(zero)>(call, out); });
    return out;
}

}  // namespace
}  // namespace fastroute
