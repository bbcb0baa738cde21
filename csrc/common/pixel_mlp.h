// pixel_mlp: y = residual + W_n relu(... relu(W_1 [feature | rel | cell] + b_1) ...) + b_n for each output pixel, by
// the MLP of its class. What every device checks and allocates, and the sizes of a call.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/dispatch.h"
#include "common/huge_pages.h"

namespace fastroute::pixel_mlp {

inline constexpr const char* kOp = "pixel_mlp";

namespace {

struct Sizes {
    int64_t batch, dim, h, w, channels;
    int64_t height, width, row_begin, rows;
    int64_t widest;  // units of any layer, at least 1
};

// A call, checked but for the values of the class map.
struct Call {
    Sizes sizes;
    Tensor features;                  // [B, D, h, w]
    std::vector<Tensor> weights;      // [F_out, F_in] each
    std::vector<Tensor> biases;       // [F_out] each
    std::vector<int64_t> depths;      // [K]
    std::optional<Tensor> class_map;  // [B, H, W]
    std::optional<Tensor> residual;   // [B, C, h, w]
    std::optional<Tensor> relative;   // [H + W] contiguous
    bool tf32;                        // products of float32 layers may be made as TF32
};

// Each device defines the kernel; S is the type of the features. There are pixels.
template <typename S>
void run_pixel_mlp(const Call& call, const Tensor& out);  // [B, C, rows, W]

// Sets C and the widest layer.
void check_layers(const Tensor& features,              // [B, D, h, w]
                  const std::vector<Tensor>& weights,  // [F_out, F_in] each
                  const std::vector<Tensor>& biases,   // [F_out] each
                  const std::vector<int64_t>& depths,  // [K]
                  Sizes& sizes) {
    FASTROUTE_CHECK(!depths.empty() && depths.size() <= 256, kOp, ": mlps must hold 1 to 256 MLPs; got ",
                    depths.size());
    const auto layers = static_cast<int64_t>(weights.size());
    int64_t total = 0;
    for (const int64_t depth : depths) {
        // As many as there are layers at most, so that the sum cannot wrap.
        FASTROUTE_CHECK(0 <= depth && depth <= layers, kOp, ": depths must lie in [0, ", layers, "]; got ", depth);
        total += depth;
    }
    FASTROUTE_CHECK(layers == total && weights.size() == biases.size(), kOp,
                    ": depths must add up to the number of layers, ", weights.size());
    if (total > 0) {
        check_rank(kOp, "a weight", weights.back(), 2);
        sizes.channels = weights.back().size(0);
    }
    int64_t at = 0;
    for (const int64_t depth : depths) {
        for (int64_t n = 0, in = sizes.dim + 4; n < depth; ++n, ++at) {
            check_same_device(kOp, "mlps", weights[at], features), check_same_device(kOp, "mlps", biases[at], features);
            check_rank(kOp, "a weight", weights[at], 2), check_rank(kOp, "a bias", biases[at], 1);
            const int64_t out = weights[at].size(0);
            FASTROUTE_CHECK(weights[at].size(1) == in && biases[at].size(0) == out, kOp, ": layer ", at, " must map ",
                            in, " numbers, its bias as long as its output");
            FASTROUTE_CHECK(1 <= out && out <= 256, kOp, ": layer ", at, " must have 1 to 256 rows; got ", out);
            FASTROUTE_CHECK(n + 1 < depth || out == sizes.channels, kOp, ": each MLP must end in ", sizes.channels,
                            " channels");
            sizes.widest = std::max(sizes.widest, out), in = out;
        }
    }
}

Sizes checked_sizes(const Tensor& features,              // [B, D, h, w]
                    const std::vector<Tensor>& weights,  // [F_out, F_in] each
                    const std::vector<Tensor>& biases,   // [F_out] each
                    const std::vector<int64_t>& depths,  // [K]
                    int64_t height, int64_t width,
                    const std::optional<Tensor>& class_map,  // [B, H, W]
                    const std::optional<Tensor>& residual,   // [B, C, h, w]
                    int64_t row_begin, int64_t row_end) {
    check_rank(kOp, "features", features, 4);
    check_at_least(kOp, "height", height, 0), check_at_least(kOp, "width", width, 0);
    check_rows(kOp, row_begin, row_end, height);
    const int64_t batch = features.size(0), h = features.size(2), w = features.size(3);
    Sizes sizes{.batch = batch,
                .dim = features.size(1),
                .h = h,
                .w = w,
                .channels = 0,
                .height = height,
                .width = width,
                .row_begin = row_begin,
                .rows = row_end - row_begin,
                .widest = 1};
    if (residual.has_value()) {
        check_same_device(kOp, "residual", *residual, features), check_rank(kOp, "residual", *residual, 4);
        FASTROUTE_CHECK(residual->scalar_type() == features.scalar_type(), kOp,
                        ": residual must have the dtype of features");
        sizes.channels = residual->size(1);
    }
    check_layers(features, weights, biases, depths, sizes);
    FASTROUTE_CHECK(class_map.has_value() || depths.size() == 1, kOp, ": class_map must be given for several MLPs");
    if (class_map.has_value()) {
        check_same_device(kOp, "class_map", *class_map, features), check_rank(kOp, "class_map", *class_map, 3);
        FASTROUTE_CHECK(class_map->scalar_type() == ScalarType::Byte || class_map->scalar_type() == ScalarType::Long,
                        kOp, ": class_map must be uint8 or int64");
        FASTROUTE_CHECK(class_map->size(0) == batch && class_map->size(1) == height && class_map->size(2) == width, kOp,
                        ": class_map must be [B, H, W]");
    }
    if (residual.has_value()) {
        const Tensor& r = *residual;
        FASTROUTE_CHECK(r.size(0) == batch && r.size(1) == sizes.channels && r.size(2) == h && r.size(3) == w, kOp,
                        ": residual must be [B, C, h, w], C as the MLPs end in");
    }
    // Coordinates are fractions of 2 · size · features; features and pixels are counted in 32 bits.
    constexpr int64_t kMostFeatures = int64_t{1} << 31;
    FASTROUTE_CHECK(h < kMostFeatures && w < kMostFeatures, kOp,
                    ": features must be below 2^31 in height and width; got ", h, " x ", w);
    checked_product(kOp, "size",
                    {4, std::max<int64_t>(std::max(h, w), 1), std::max<int64_t>(std::max(height, width), 1)});
    checked_product(kOp, "the image", {batch, sizes.channels, sizes.rows, width});
    const bool nothing = batch == 0 || sizes.channels == 0 || sizes.rows == 0 || width == 0;
    FASTROUTE_CHECK(nothing || (h > 0 && w > 0), kOp, ": features must have at least one pixel");
    return sizes;
}

// The coordinates as a contiguous vector, or nothing.
std::optional<Tensor> checked_relative(const std::optional<Tensor>& relative,  // [H + W]
                                       const Tensor& features, const Sizes& sizes) {
    if (!relative.has_value()) return std::nullopt;
    check_same_device(kOp, "relative", *relative, features), check_rank(kOp, "relative", *relative, 1);
    const auto sums = features.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    FASTROUTE_CHECK(relative->scalar_type() == sums && relative->size(0) == sizes.height + sizes.width, kOp,
                    ": relative must be [H + W], of the type of the sums");
    return as_contiguous(*relative);
}

Tensor run(const Tensor& features, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
           const std::vector<int64_t>& depths, int64_t height, int64_t width, const std::optional<Tensor>& class_map,
           const std::optional<Tensor>& residual, const std::optional<Tensor>& relative, int64_t row_begin,
           int64_t row_end, bool tf32) {
    const Sizes sizes =
        checked_sizes(features, weights, biases, depths, height, width, class_map, residual, row_begin, row_end);
    const Call call{.sizes = sizes,
                    .features = features,
                    .weights = weights,
                    .biases = biases,
                    .depths = depths,
                    .class_map = class_map,
                    .residual = residual,
                    .relative = checked_relative(relative, features, sizes),
                    .tf32 = tf32};
    const Tensor out = prefer_huge_pages(empty_tensor(
        kOp, "the image", {sizes.batch, sizes.channels, sizes.rows, sizes.width}, features.scalar_type(), features));
    if (out.numel() == 0) return out;
    dispatch_floating(kOp, features.scalar_type(), [&](auto zero) { run_pixel_mlp<decltype(zero)>(call, out); });
    return out;
}

Tensor pixel_mlp(const Tensor& features,              // [B, D, h, w]
                 const std::vector<Tensor>& weights,  // [F_out, F_in] each
                 const std::vector<Tensor>& biases,   // [F_out] each
                 const std::vector<int64_t>& depths,  // [K]
                 int64_t height, int64_t width,
                 const std::optional<Tensor>& class_map,  // [B, H, W]
                 const std::optional<Tensor>& residual,   // [B, C, h, w]
                 const std::optional<Tensor>& relative,   // [H + W]
                 int64_t row_begin, int64_t row_end) {
    return run(features, weights, biases, depths, height, width, class_map, residual, relative, row_begin, row_end,
               false);
}

// The products of float32 layers may be made as TF32, where a device has such.
Tensor pixel_mlp_tf32(const Tensor& features, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                      const std::vector<int64_t>& depths, int64_t height, int64_t width,
                      const std::optional<Tensor>& class_map, const std::optional<Tensor>& residual,
                      const std::optional<Tensor>& relative, int64_t row_begin, int64_t row_end) {
    return run(features, weights, biases, depths, height, width, class_map, residual, relative, row_begin, row_end,
               true);
}

}  // namespace
}  // namespace fastroute::pixel_mlp
