// stitch_patches: overlapping patches, weighed by a window and summed into an image. What every device checks and
// allocates.
#pragma once

#include <vector>

#include "common/checked_geometry.h"
#include "common/dispatch.h"
#include "common/huge_pages.h"
#include "common/written.h"

namespace fastroute {
namespace {

constexpr const char* kOp = "stitch_patches";

// Patches in one tensor, or in several that stand for their concatenation.
using Batches = std::vector<Tensor>;

// Where patches lie: the row of `batches` that holds each, or its region, and the first patch of that region.
struct Places {
    std::optional<Tensor> inverse, region;  // [N] contiguous
};

// Rows of `patches`; and images, channels, rows and width of what is written.
struct Target {
    int64_t count, batch, channels, rows, width;
};

// A call in any of its forms; `target` follows from the rest.
struct Stitching {
    Geometry geometry;
    int64_t shuffle;             // factor of a fused pixel shuffle
    int64_t row_begin, row_end;  // output rows that are written
    Batches batches;             // [M_i, C·r·r, P / r, P / r] each, or regions
    Places places;
    Tensor window;  // [P] contiguous
    Target target{};

    // Whether batches hold regions of any height and width, of one memory format.
    bool regions() const { return places.region.has_value(); }
};

// The same of the adjoint.
struct StitchingBackward {
    Geometry geometry;
    Tensor grad;                    // [B, C, H·s, W·s] contiguous
    std::optional<Tensor> inverse;  // [N]
    Tensor window;                  // [P] contiguous
    int64_t num_patches;            // M
};

// Each device defines these: what it alone can check, before memory is taken; and the kernels, T being the type of the
// patches, or of the gradients.
void check_on_device(const Stitching& call);
template <typename T>
void run_stitch_patches(const Stitching& call, const Tensor& out);  // [B, C, rows, W·s]
void check_on_device(const StitchingBackward& call);
template <typename T>
void run_stitch_patches_backward(const StitchingBackward& call, const Tensor& out);  // [M, C, P, P]

// The factor of a fused pixel shuffle of patches that are `span` pixels wide.
void check_shuffle(int64_t span, int64_t shuffle) {
    check_at_least(kOp, "shuffle", shuffle, 1);
    FASTROUTE_CHECK(shuffle <= span && span % shuffle == 0, kOp, ": shuffle must divide the width of a patch, ", span,
                    "; got ", shuffle);
}

Places checked_places(const std::optional<Tensor>& inverse, const std::optional<Tensor>& region, const Tensor& first) {
    const Places places{.inverse = checked_index(kOp, "inverse", inverse, first),
                        .region = checked_index(kOp, "region", region, first)};
    FASTROUTE_CHECK(!region.has_value() || (inverse.has_value() && places.region->size(0) == places.inverse->size(0)),
                    kOp, ": region must have one entry per patch, as inverse has");
    return places;
}

// Batches of regions: each at least a patch, all contiguous or all channels_last.
void check_regions(const Batches& batches, const std::optional<Tensor>& inverse, int64_t span, int64_t scale,
                   int64_t shuffle) {
    FASTROUTE_CHECK(inverse.has_value(), kOp, ": inverse must be given with region");
    FASTROUTE_CHECK(shuffle >= 1 && scale % shuffle == 0, kOp, ": shuffle must divide the scale, ", scale,
                    ", for regions; got ", shuffle);
    const int64_t channels = batches.front().size(1);
    const bool planar = batches.front().is_contiguous();
    for (const Tensor& batch : batches) {
        FASTROUTE_CHECK(batch.size(1) == channels && batch.size(2) >= span / shuffle && batch.size(3) >= span / shuffle,
                        kOp, ": regions must have ", channels, " channels and at least ", span / shuffle,
                        " pixels a side; got ", batch.size(1), " x ", batch.size(2), " x ", batch.size(3));
        const bool pixels =
            batch.stride(1) == 1 && batch.stride(3) == channels && batch.stride(2) == channels * batch.size(3);
        FASTROUTE_CHECK(planar ? batch.is_contiguous() : pixels, kOp,
                        ": regions must all be contiguous or all channels_last");
    }
}

// What `batches`, some of those of a call, make: `shuffle` is their factor, `upsampled` the channels that the last
// layers make of them where those are computed on the way.
Target checked_target(const Stitching& call, const Batches& batches, int64_t shuffle, int64_t upsampled = 0) {
    FASTROUTE_CHECK(!batches.empty(), kOp, ": patches must hold at least one batch; got none");
    const Geometry& geometry = call.geometry;
    const std::optional<Tensor>& inverse = call.places.inverse;
    const Tensor& patches = batches.front();
    int64_t number = 0;
    for (const Tensor& batch : batches) {
        check_same_device(kOp, "patches", batch, patches);
        check_rank(kOp, "patches", batch, 4);
        FASTROUTE_CHECK(batch.scalar_type() == patches.scalar_type(), kOp, ": patches must have one dtype");
        for (int64_t d = 1; d < 4 && !call.regions(); ++d) {
            FASTROUTE_CHECK(batch.size(d) == patches.size(d) && batch.stride(d) == patches.stride(d), kOp,
                            ": all batches of patches must have one shape and memory format");
        }
        number += batch.size(0);
    }
    const int64_t span = geometry.span(), tiles = geometry.num_patches();
    check_shuffle(span, shuffle);
    const int64_t square = shuffle * shuffle;
    if (call.regions()) check_regions(batches, inverse, span, geometry.scale, shuffle);
    FASTROUTE_CHECK(call.regions() || (patches.size(2) == span / shuffle && patches.size(3) == span / shuffle), kOp,
                    ": patches must be ", span, " / ", shuffle, " pixels wide; got ", patches.size(2), " x ",
                    patches.size(3));
    const int64_t values = upsampled > 0 ? upsampled * square : patches.size(1);
    FASTROUTE_CHECK(values >= 1 && values % square == 0, kOp, ": patches must have C * ", square,
                    " channels, C at least 1; got ", patches.size(1));
    check_rows(kOp, call.row_begin, call.row_end, geometry.out_height());
    const int64_t places = inverse.has_value() ? inverse->size(0) : number;
    FASTROUTE_CHECK(places % tiles == 0, kOp, inverse.has_value() ? ": inverse" : ": patches",
                    " must hold a multiple of ", tiles, ", whole images; got ", places);
    const Target target{.count = number,
                        .batch = places / tiles,
                        .channels = values / square,
                        .rows = call.row_end - call.row_begin,
                        .width = geometry.out_width()};
    checked_product(kOp, "the image", {target.batch, target.channels, target.rows, target.width});
    return target;
}

void check_stitch_out(const Stitching& call, const Tensor& out) {  // [B, C, rows, W·s]
    const Target& target = call.target;
    check_same_device(kOp, "out", out, call.batches.front());
    FASTROUTE_CHECK(out.dim() == 4 && out.size(0) == target.batch && out.size(1) == target.channels &&
                        out.size(2) == target.rows && out.size(3) == target.width &&
                        (out.stride(3) == 1 || target.width <= 1),
                    kOp, ": out must be ", target.batch, " x ", target.channels, " x ", target.rows, " x ",
                    target.width, " with contiguous rows");
    Batches read = call.batches;
    for (const std::optional<Tensor>& place : {call.places.inverse, call.places.region}) {
        if (place.has_value()) read.push_back(*place);
    }
    check_written(kOp, "out", out, read);
}

// The window of patches whose sums are of type W, [P] contiguous.
template <typename W>
const W* checked_window(const Tensor& window, int64_t span) {
    constexpr ScalarType type = std::is_same_v<W, double> ? ScalarType::Double : ScalarType::Float;
    FASTROUTE_CHECK(window.dim() == 1 && window.size(0) == span && window.scalar_type() == type, kOp,
                    ": window must be ", span, " weights, float32, or float64 for float64 patches");
    return window.const_data_ptr<W>();
}

void check_backward(const StitchingBackward& call) {
    const Geometry& geometry = call.geometry;
    const Tensor& grad = call.grad;
    check_rank(kOp, "grad", grad, 4);
    FASTROUTE_CHECK(grad.size(2) == geometry.out_height() && grad.size(3) == geometry.out_width(), kOp,
                    ": grad must have the size of the stitched image; got ", grad.size(2), " x ", grad.size(3));
    check_at_least(kOp, "num_patches", call.num_patches, 0);
    checked_product(kOp, "the gradient", {call.num_patches, grad.size(1), geometry.span(), geometry.span()});
    const int64_t number = grad.size(0) * geometry.num_patches();
    const bool given = call.inverse.has_value();
    const int64_t count = given ? call.inverse->size(0) : call.num_patches;
    FASTROUTE_CHECK(count == number, kOp,
                    given ? ": inverse must have one entry per patch, " : ": there must be one row per patch, ", number,
                    "; got ", count);
}

// Writes a call's image; it is checked but for its window, and what its device alone can check.
void stitch_into(Stitching& call, const Tensor& out) {
    check_same_device(kOp, "window", call.window, call.batches.front());
    call.window = torch::stable::contiguous(call.window);
    dispatch_floating(kOp, call.batches.front().scalar_type(),
                      [&](auto zero) { run_stitch_patches<decltype(zero)>(call, out); });
}

Tensor stitch_patches(const Tensor& patches,                 // [M, C·r·r, P / r, P / r]
                      const std::optional<Tensor>& inverse,  // [N]
                      const Tensor& window,                  // [P]
                      int64_t height, int64_t width, int64_t patch, int64_t stride, int64_t scale, bool crop,
                      int64_t shuffle, std::optional<ScalarType> dtype, int64_t row_begin, int64_t row_end) {
    Stitching call{.geometry = checked_geometry(kOp, height, width, patch, stride, scale, crop),
                   .shuffle = shuffle,
                   .row_begin = row_begin,
                   .row_end = row_end,
                   .batches = {patches},
                   .places = checked_places(inverse, std::nullopt, patches),
                   .window = window};
    const Target target = call.target = checked_target(call, call.batches, shuffle);
    check_on_device(call);
    const Tensor out =
        prefer_huge_pages(empty_tensor(kOp, "the image", {target.batch, target.channels, target.rows, target.width},
                                       dtype.value_or(patches.scalar_type()), patches));
    stitch_into(call, out);
    return out;
}

void stitch_batches_out(const Batches& batches,                // [M_i, C·r·r, P / r, P / r] each, or regions
                        const std::optional<Tensor>& inverse,  // [N]
                        const std::optional<Tensor>& region,   // [N]
                        const Tensor& window,                  // [P]
                        int64_t height, int64_t width, int64_t patch, int64_t stride, int64_t scale, bool crop,
                        int64_t shuffle, int64_t row_begin, int64_t row_end,
                        const Tensor& out) {  // [B, C, rows, W·s]
    Stitching call{.geometry = checked_geometry(kOp, height, width, patch, stride, scale, crop),
                   .shuffle = shuffle,
                   .row_begin = row_begin,
                   .row_end = row_end,
                   .batches = batches,
                   .places = checked_places(inverse, region, out),
                   .window = window};
    call.target = checked_target(call, batches, shuffle);
    check_on_device(call);
    check_stitch_out(call, out);
    stitch_into(call, out);
}

void stitch_patches_out(const Tensor& patches, const std::optional<Tensor>& inverse, const Tensor& window,
                        int64_t height, int64_t width, int64_t patch, int64_t stride, int64_t scale, bool crop,
                        int64_t shuffle, int64_t row_begin, int64_t row_end, const Tensor& out) {
    stitch_batches_out({patches}, inverse, std::nullopt, window, height, width, patch, stride, scale, crop, shuffle,
                       row_begin, row_end, out);
}

Tensor _stitch_patches_backward(const Tensor& grad,                    // [B, C, H·s, W·s]
                                const std::optional<Tensor>& inverse,  // [N]
                                const Tensor& window,                  // [P]
                                int64_t height, int64_t width, int64_t patch, int64_t stride, int64_t scale, bool crop,
                                int64_t num_patches) {
    StitchingBackward call{.geometry = checked_geometry(kOp, height, width, patch, stride, scale, crop),
                           .grad = grad,
                           .inverse = checked_index(kOp, "inverse", inverse, grad),
                           .window = window,
                           .num_patches = num_patches};
    check_backward(call);
    check_same_device(kOp, "window", window, grad);
    check_on_device(call);
    call.grad = torch::stable::contiguous(grad), call.window = torch::stable::contiguous(window);
    const int64_t span = call.geometry.span();
    const Tensor out =
        empty_tensor(kOp, "the gradient", {num_patches, grad.size(1), span, span}, grad.scalar_type(), grad);
    if (out.numel() == 0) return out;
    dispatch_floating(kOp, grad.scalar_type(),
                      [&](auto zero) { run_stitch_patches_backward<decltype(zero)>(call, out); });
    return out;
}

}  // namespace
}  // namespace fastroute
