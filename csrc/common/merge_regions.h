// merge_regions: the rectangles of tiles of one class, or of a more expensive one, that run as one region. The codes of
// their sides, and what every device checks and allocates.
#pragma once

#include <cstdint>
#include <tuple>

#include "common/checked_geometry.h"
#include "common/dispatch.h"
#include "common/host_device.h"

namespace fastroute {
namespace {

constexpr const char* kOp = "merge_regions";

// Most tiles along a block.
constexpr int64_t kMostMerge = 8;

// What a rectangle does: runs as one region, or is cut between its rows or its columns.
enum Act : uint8_t { kWhole, kRows, kCols };

// Levels of halving of a block.
FASTROUTE_HOST_DEVICE int64_t levels_of(int64_t merge) {
    int64_t levels = 0;
    for (; merge > 0; merge /= 2) ++levels;
    return levels;
}

// The side code of the stretch of 2^level tiles that begins with tile `first`: twice the level of the smallest whole
// stretch that has as many tiles as there are, plus 1 where it is shorter than that.
FASTROUTE_HOST_DEVICE int64_t side_code(const TileAxis& axis, int64_t first, int64_t level) {
    const int64_t left = axis.count() - first, tiles = (int64_t(1) << level) < left ? (int64_t(1) << level) : left;
    int64_t fitting = 0;
    while ((int64_t(1) << fitting) < tiles) ++fitting;
    const int64_t whole = axis.patch + ((int64_t(1) << fitting) - 1) * axis.stride;
    return 2 * fitting + (axis.origin(first + tiles - 1) + axis.patch - axis.origin(first) != whole);
}

// Number of the stretch `index` of 2^level tiles among those of all levels of a block, the smallest first.
FASTROUTE_HOST_DEVICE int64_t stretch(int64_t merge, int64_t level, int64_t index) {
    return 2 * merge - 2 * (merge >> level) + index;
}

// Rectangles of a block: pairs of stretches.
FASTROUTE_HOST_DEVICE int64_t stretches(int64_t merge) { return 2 * merge - 1; }

// A call, checked but for the values that it reads.
struct Merging {
    Geometry geometry;
    Tensor class_ids;              // [N] contiguous
    Tensor costs;                  // [K, S] contiguous
    int64_t images, down, across;  // of the batch; blocks of tiles of an image
    int64_t merge, levels, classes;
    bool promote;

    int64_t blocks() const { return images * down * across; }
};

struct Merged {
    Tensor executed, region, group;  // [N] each
};

// Each device defines these: what it alone can check, before memory is taken; and the kernel, T being the type of the
// ids.
void check_on_device(const Merging& call);
template <typename T>
void run_merge_regions(const Merging& call, const Merged& out);

std::tuple<Tensor, Tensor, Tensor> merge_regions(const Tensor& class_ids,  // [N]
                                                 const Tensor& costs,      // [K, S]
                                                 int64_t height, int64_t width, int64_t patch, int64_t stride,
                                                 bool crop, int64_t merge, bool promote) {
    const Geometry geometry = checked_geometry(kOp, height, width, patch, stride, 1, crop);
    check_rank(kOp, "class_ids", class_ids, 1);
    check_same_device(kOp, "costs", costs, class_ids);
    FASTROUTE_CHECK(merge == 1 || merge == 2 || merge == 4 || merge == kMostMerge, kOp,
                    ": merge must be 1, 2, 4 or 8; got ", merge);
    const int64_t levels = levels_of(merge), shapes = 4 * levels * levels;
    FASTROUTE_CHECK(costs.dim() == 2 && costs.size(0) >= 1 && costs.size(1) == shapes, kOp, ": costs must be (K, ",
                    shapes, "), K at least 1");
    FASTROUTE_CHECK(costs.scalar_type() == ScalarType::Float, kOp, ": costs must be float32");
    const int64_t tiles = geometry.num_patches(), count = class_ids.size(0);
    FASTROUTE_CHECK(count % tiles == 0, kOp, ": class_ids must hold a multiple of ", tiles, ", whole images; got ",
                    count);
    const Merging call{.geometry = geometry,
                       .class_ids = as_contiguous(class_ids),
                       .costs = as_contiguous(costs),
                       .images = count / tiles,
                       .down = (geometry.y.count() + merge - 1) / merge,
                       .across = (geometry.x.count() + merge - 1) / merge,
                       .merge = merge,
                       .levels = levels,
                       .classes = costs.size(0),
                       .promote = promote};
    check_on_device(call);
    const auto make = [&] { return empty_tensor(kOp, "the indices", {count}, ScalarType::Long, class_ids); };
    const Merged out{.executed = make(), .region = make(), .group = make()};
    dispatch_index(kOp, class_ids.scalar_type(), [&](auto zero) { run_merge_regions<decltype(zero)>(call, out); });
    return {out.executed, out.region, out.group};
}

}  // namespace
}  // namespace fastroute
