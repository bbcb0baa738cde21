// conv3x3: out[b, o, y, x] = residual[b, o, y, x] + rectify(bias[o] + Σ_{c, i, j} w[o, c, i, j] · image[b, c, y - 1 +
// i, x - 1 + j]), pixels outside of the image being 0 and the sum over the channels of o's group, by Winograd's minimal
// filtering F(4 x 4, 3 x 3): 36 products for every 16 outputs and input channel instead of 144, in float32 also where
// images are bfloat16, whose numbers are too short for it. Weights that stayed bfloat16 ask for direct sums: direct.h.
// Work mapping: tiles of 4 x 4 outputs are numbered over all images; blocks of them are transformed, multiplied at one
// point after the other, and transformed back inside the caches. One item per block.
#include "cpu/conv3x3/plan.h"

#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/checks.h"
#include "common/dispatch.h"
#include "common/huge_pages.h"
#include "common/numbers.h"
#include "common/written.h"
#include "cpu/conv3x3/direct.h"
#include "cpu/intrinsics.h"
#include "cpu/isa.h"

namespace fastroute::conv3x3 {

#define FASTROUTE_BODY "cpu/conv3x3/block.h"
#include "cpu/each_isa.h"

namespace {

constexpr const char* kOp = "conv3x3";

template <typename T>
decltype(&baseline::run_block<T>) active_block() {
#if FASTROUTE_X86
    if (active_isa() == Isa::avx512) return avx512::run_block<T>;
    if (active_isa() == Isa::avx2) return avx2::run_block<T>;
#endif
    return baseline::run_block<T>;
}

template <typename T>
View<T> view_of(const Tensor& x) {  // [B, C, H, W]
    View<T> view{nullptr, x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
    if constexpr (std::is_const_v<T>) {
        view.data = x.const_data_ptr<std::remove_const_t<T>>();
    } else {
        view.data = x.mutable_data_ptr<T>();
    }
    return view;
}

// `x` has the shape of the result.
void check_shape(const char* name, const Tensor& x, const Shape& p) {  // [B, O / s / s, H s, W s]
    const int64_t channels = p.groups * p.shown, height = p.height * p.shuffle, width = p.width * p.shuffle;
    FASTROUTE_CHECK(x.size(0) == p.images && x.size(1) == channels && x.size(2) == height && x.size(3) == width, kOp,
                    ": ", name, " must have the shape of the result, (", p.images, ", ", channels, ", ", height, ", ",
                    width, ")");
}

// One number per output in the order of a weight's columns: `x` or, where there is none, `otherwise`.
template <typename T>
std::vector<float> per_column(const char* name, const std::optional<Tensor>& x, float otherwise, const Shape& p) {
    std::vector<float> found(p.groups * p.columns, otherwise);
    if (!x.has_value()) return found;
    const int64_t parts = p.shuffle * p.shuffle, outputs = p.groups * p.shown * parts;
    FASTROUTE_CHECK(x->dim() == 1 && x->size(0) == outputs, kOp, ": ", name, " must have one number for each of the ",
                    outputs, " output channels");
    read_numbers<T>(kOp, name, *x, [&](int64_t o, float value) {
        const int64_t channel = o / parts, column = o % parts * p.lanes + channel % p.shown;
        found[channel / p.shown * p.columns + column] = value;
    });
    return found;
}

// The shape of a call, checked, `direct` for sums of bfloat16.
Shape checked(const Tensor& image,   // [B, C, H, W]
              const Tensor& weight,  // [36, G, C / G, P] or [9, G, pairs, P, 2]
              bool direct, int64_t channels, int64_t shuffle, int64_t context) {
    check_cpu(kOp, "weight", weight), check_rank(kOp, "weight", weight, direct ? 5 : 4);
    FASTROUTE_CHECK(weight.scalar_type() == (direct ? ScalarType::BFloat16 : ScalarType::Float), kOp,
                    ": weight must be ", direct ? "bfloat16" : "float32", ", as conv3x3_weight gives it");
    check_at_least(kOp, "channels", channels, 1), check_at_least(kOp, "shuffle", shuffle, 1);
    FASTROUTE_CHECK(context == 0 || (context == 1 && image.size(2) >= 2), kOp,
                    ": context must be 0, or 1 for an image of at least 2 rows; got ", context);
    const int64_t groups = weight.size(1), parts = checked_product(kOp, "a pixel", {shuffle, shuffle});
    FASTROUTE_CHECK(groups >= 1 && channels % groups == 0 && channels / groups % parts == 0, kOp, ": the ", channels,
                    " output channels must be a multiple of groups * shuffle * shuffle, ", groups, " * ", parts);
    const int64_t shown = channels / groups / parts, in = image.size(1) / groups;
    FASTROUTE_CHECK(shown <= std::numeric_limits<int64_t>::max() - kPad, kOp, ": channels is too large; got ",
                    channels);
    const int64_t columns = checked_product(kOp, "weight", {parts, padded(shown)});
    const bool whole = image.size(1) >= 1 && image.size(1) % groups == 0 && weight.size(3) == columns;
    const bool fits = direct ? weight.size(0) == 9 && weight.size(2) == in / 2 + in % 2 && weight.size(4) == 2
                             : weight.size(0) == kPoints && weight.size(2) == in;
    FASTROUTE_CHECK(whole && fits, kOp, ": weight must be ",
                    direct ? "(9, groups, pairs of C / groups, " : "(36, groups, C / groups, ", columns,
                    direct ? ", 2)" : ")", " for this image, as conv3x3_weight gives it");
    const Shape p{.images = image.size(0),
                  .height = image.size(2) - 2 * context,
                  .width = image.size(3),
                  .channels = image.size(1),
                  .context = context,
                  .groups = groups,
                  .in = in,
                  .shuffle = shuffle,
                  .shown = shown,
                  .lanes = padded(shown),
                  .columns = columns,
                  .rectified = false,
                  .weight = nullptr,
                  .bias = nullptr,
                  .slope = nullptr};
    checked_product(kOp, "the result", {p.images, channels, p.height, p.width});
    // Each alone too: where there is no image, the product is 0.
    checked_product(kOp, "its height", {p.height, shuffle}), checked_product(kOp, "its width", {p.width, shuffle});
    return p;
}

template <typename T>
void run(Winograd<T>& p) {
    p.down = p.height / kTile + (p.height % kTile > 0), p.across = p.width / kTile + (p.width % kTile > 0);
    p.tiles = tiles_per_block(p.channels);
    const int64_t total = p.images * p.down * p.across, blocks = (total + p.tiles - 1) / p.tiles;
    const auto run_block = active_block<T>();
    in_turn(blocks, [&](const auto& next) {
        static thread_local Workspace ws;
        ws.reserve(p);
        for (int64_t n = next(); n < blocks; n = next())
            run_block(p, n * p.tiles, std::min(p.tiles, total - n * p.tiles), ws);
    });
}

void run(Direct& p) {
    p.pairs = p.in / 2 + p.in % 2;
    run_direct(p);
}

// Everything but the check of `out` where it is given. P is Winograd<T> or Direct, T the numbers of the images.
template <typename P, typename T>
Tensor convolved(const Tensor& image,                    // [B, C, H, W]
                 const Tensor& weight,                   // [36, G, C / G, P] or [9, G, pairs, P, 2]
                 const std::optional<Tensor>& bias,      // [O]
                 const std::optional<Tensor>& slope,     // [O]
                 const std::optional<Tensor>& residual,  // [B, O / s / s, H s, W s]
                 int64_t channels, int64_t shuffle, int64_t context,
                 const std::optional<Tensor>& given) {  // [B, O / s / s, H s, W s]
    P p{};
    const ScalarType type = image.scalar_type();
    static_cast<Shape&>(p) = checked(image, weight, std::is_same_v<P, Direct>, channels, shuffle, context);
    p.x = view_of<const T>(image);
    p.x.data += context * p.x.row;
    if (residual.has_value()) {
        check_like(kOp, "residual", *residual, type, "the image", 4);
        check_shape("residual", *residual, p);
        p.residual = view_of<const T>(*residual);
    }
    if (given.has_value()) {
        check_like(kOp, "out", *given, type, "the image", 4);
        check_shape("out", *given, p);
        FASTROUTE_CHECK(given->stride(1) == 1 || given->size(1) == 1 || given->numel() == 0, kOp,
                        ": out must have its channels side by side");
        check_written(kOp, "out", *given, with_given({image, weight}, {&bias, &slope, &residual}));
    }
    const auto biases = per_column<T>("bias", bias, 0, p), slopes = per_column<T>("slope", slope, 1, p);
    const Tensor out =
        given.has_value()
            ? *given
            : prefer_huge_pages(empty_tensor(kOp, "the result",
                                             {p.images, p.groups * p.shown, p.height * shuffle, p.width * shuffle},
                                             type, image, torch::headeronly::MemoryFormat::ChannelsLast));
    if (out.numel() == 0) return out;
    const Tensor dense = as_contiguous(weight);
    p.rectified = slope.has_value();
    p.weight = static_cast<const float*>(dense.const_data_ptr());
    p.bias = biases.data(), p.slope = slopes.data();
    p.y = view_of<T>(out);
    run(p);
    return out;
}

Tensor by_type(const Tensor& image,                    // [B, C, H, W]
               const Tensor& weight,                   // [36, G, C / G, P] or [9, G, pairs, P, 2]
               const std::optional<Tensor>& bias,      // [O]
               const std::optional<Tensor>& slope,     // [O]
               const std::optional<Tensor>& residual,  // [B, O / s / s, H s, W s]
               int64_t channels, int64_t shuffle, int64_t context,
               const std::optional<Tensor>& out) {  // [B, O / s / s, H s, W s]
    check_cpu(kOp, "image", image), check_rank(kOp, "image", image, 4);
    const auto run_as = [&](auto convolve) {
        return convolve(image, weight, bias, slope, residual, channels, shuffle, context, out);
    };
    switch (image.scalar_type()) {
        case ScalarType::Float: return run_as(convolved<Winograd<float>, float>);
        case ScalarType::BFloat16:
            return weight.dim() == 5 ? run_as(convolved<Direct, BFloat16>)
                                     : run_as(convolved<Winograd<BFloat16>, BFloat16>);
        default: fail(kOp, ": image must be float32 or bfloat16");
    }
}

Tensor conv3x3(const Tensor& image,                    // [B, C, H, W]
               const Tensor& weight,                   // [36, G, C / G, P] or [9, G, pairs, P, 2]
               const std::optional<Tensor>& bias,      // [O]
               const std::optional<Tensor>& slope,     // [O]
               const std::optional<Tensor>& residual,  // [B, O / s / s, H s, W s]
               int64_t channels, int64_t shuffle, int64_t context) {
    return by_type(image, weight, bias, slope, residual, channels, shuffle, context, std::nullopt);
}

void conv3x3_out(const Tensor& image,                    // [B, C, H, W]
                 const Tensor& weight,                   // [36, G, C / G, P] or [9, G, pairs, P, 2]
                 const std::optional<Tensor>& bias,      // [O]
                 const std::optional<Tensor>& slope,     // [O]
                 const std::optional<Tensor>& residual,  // [B, O / s / s, H s, W s]
                 int64_t channels, int64_t shuffle, int64_t context,
                 const Tensor& out) {  // [B, O / s / s, H s, W s]
    by_type(image, weight, bias, slope, residual, channels, shuffle, context, out);
}

}  // namespace
}  // namespace fastroute::conv3x3

namespace fastroute {

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, m) {
    FASTROUTE_IMPL(m, "conv3x3", conv3x3::conv3x3);
    FASTROUTE_IMPL(m, "conv3x3.out", conv3x3::conv3x3_out);
}

}  // namespace fastroute
