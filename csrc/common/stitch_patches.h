// What the kernels of stitch_patches and its adjoint check before they run.
#pragma once

#include <vector>

#include "common/dispatch.h"
#include "common/grid.h"
#include "common/written.h"

namespace fastroute {
namespace {

constexpr const char* kOp = "stitch_patches";

// Patches in one tensor, or in several that stand for their concatenation.
using Batches = std::vector<Tensor>;

// Where patches lie: the row of `batches` that holds each, or its region, and the first patch of that region.
struct Places {
    std::optional<Tensor> inverse, region;  // [N]

    // Those that are given.
    Batches read() const {
        Batches given;
        if (inverse.has_value()) given.push_back(*inverse);
        if (region.has_value()) given.push_back(*region);
        return given;
    }
};

Places checked_places(const std::optional<Tensor>& inverse, const std::optional<Tensor>& region, const Tensor& first) {
    const Places places{checked_index(kOp, "inverse", inverse, first), checked_index(kOp, "region", region, first)};
    FASTROUTE_CHECK(!region.has_value() || (inverse.has_value() && places.region->size(0) == places.inverse->size(0)),
                    kOp, ": region must have one entry per patch, as inverse has");
    return places;
}

// Rows of `patches`; and images, channels, rows and width of what is written.
struct Target {
    int64_t count, batch, channels, rows, width;
};

// The factor of a fused pixel shuffle of patches that are `span` pixels wide.
void check_shuffle(int64_t span, int64_t shuffle) {
    check_at_least(kOp, "shuffle", shuffle, 1);
    FASTROUTE_CHECK(shuffle <= span && span % shuffle == 0, kOp, ": shuffle must divide the width of a patch, ", span,
                    "; got ", shuffle);
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

// `upsampled`: channels that the last layers make of the patches, where those are computed on the way. `regions`:
// batches hold regions of any height and width, of one memory format.
Target checked_target(const Batches& batches,                // [M_i, C·r·r, P / r, P / r] each
                      const std::optional<Tensor>& inverse,  // [N]
                      const TileGrid& grid, int64_t scale, int64_t shuffle, int64_t row_begin, int64_t row_end,
                      int64_t upsampled = 0, bool regions = false) {
    FASTROUTE_CHECK(!batches.empty(), kOp, ": patches must hold at least one batch; got none");
    const Tensor& patches = batches.front();
    int64_t number = 0;
    for (const Tensor& batch : batches) {
        check_same_device(kOp, "patches", batch, patches);
        check_rank(kOp, "patches", batch, 4);
        FASTROUTE_CHECK(batch.scalar_type() == patches.scalar_type(), kOp, ": patches must have one dtype");
        for (int64_t d = 1; d < 4 && !regions; ++d) {
            FASTROUTE_CHECK(batch.size(d) == patches.size(d) && batch.stride(d) == patches.stride(d), kOp,
                            ": all batches of patches must have one shape and memory format");
        }
        number += batch.size(0);
    }
    const int64_t span = grid.y.patch * scale, tiles = grid.num_patches();
    check_shuffle(span, shuffle);
    const int64_t square = shuffle * shuffle;
    if (regions) check_regions(batches, inverse, span, scale, shuffle);
    FASTROUTE_CHECK(regions || (patches.size(2) == span / shuffle && patches.size(3) == span / shuffle), kOp,
                    ": patches must be ", span, " / ", shuffle, " pixels wide; got ", patches.size(2), " x ",
                    patches.size(3));
    const int64_t values = upsampled > 0 ? upsampled * square : patches.size(1);
    FASTROUTE_CHECK(values >= 1 && values % square == 0, kOp, ": patches must have C * ", square,
                    " channels, C at least 1; got ", patches.size(1));
    check_rows(kOp, row_begin, row_end, grid.y.covered() * scale);
    const int64_t places = inverse.has_value() ? inverse->size(0) : number;
    FASTROUTE_CHECK(places % tiles == 0, kOp, inverse.has_value() ? ": inverse" : ": patches",
                    " must hold a multiple of ", tiles, ", whole images; got ", places);
    const Target target{number, places / tiles, values / square, row_end - row_begin, grid.x.covered() * scale};
    checked_product(kOp, "the image", {target.batch, target.channels, target.rows, target.width});
    return target;
}

// `places`: the tensors that say where patches lie.
void check_stitch_out(const Target& target, const Batches& batches, const Batches& places,
                      const Tensor& out) {  // [B, C, rows, W·s]
    check_same_device(kOp, "out", out, batches.front());
    FASTROUTE_CHECK(out.dim() == 4 && out.size(0) == target.batch && out.size(1) == target.channels &&
                        out.size(2) == target.rows && out.size(3) == target.width &&
                        (out.stride(3) == 1 || target.width <= 1),
                    kOp, ": out must be ", target.batch, " x ", target.channels, " x ", target.rows, " x ",
                    target.width, " with contiguous rows");
    Batches read = batches;
    read.insert(read.end(), places.begin(), places.end());
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

// Of the adjoint; returns `inverse` as a contiguous vector, or nothing.
std::optional<Tensor> checked_places(const Tensor& grad,                    // [B, C, H·s, W·s]
                                     const std::optional<Tensor>& inverse,  // [N]
                                     const TileGrid& grid, int64_t scale, int64_t num_patches) {
    check_rank(kOp, "grad", grad, 4);
    FASTROUTE_CHECK(grad.size(2) == grid.y.covered() * scale && grad.size(3) == grid.x.covered() * scale, kOp,
                    ": grad must have the size of the stitched image; got ", grad.size(2), " x ", grad.size(3));
    check_at_least(kOp, "num_patches", num_patches, 0);
    const int64_t span = grid.y.patch * scale;
    checked_product(kOp, "the gradient", {num_patches, grad.size(1), span, span});
    const std::optional<Tensor> places = checked_index(kOp, "inverse", inverse, grad);
    const int64_t number = grad.size(0) * grid.num_patches();
    FASTROUTE_CHECK(
        (places.has_value() ? places->size(0) : num_patches) == number, kOp,
        places.has_value() ? ": inverse must have one entry per patch, " : ": there must be one row per patch, ",
        number, "; got ", places.has_value() ? places->size(0) : num_patches);
    return places;
}

}  // namespace
}  // namespace fastroute
