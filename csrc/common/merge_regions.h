// Regions of merge_regions: the codes of their sides, and what both kernels check.
#pragma once

#include <cstdint>

#include "common/checks.h"
#include "common/grid.h"
#include "common/host_device.h"

namespace fastroute::regions {

// Most tiles along a block, and levels of halving.
constexpr int64_t kMostMerge = 8, kMostLevels = 4;

// What a rectangle does: runs as one region, or is cut between its rows or its columns.
enum Act : uint8_t { kWhole, kRows, kCols };

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

// Checks everything but values; returns the number of images.
inline int64_t checked_blocks(const char* op, const Tensor& class_ids,  // [N]
                              const Tensor& costs,                      // [K, S]
                              const TileGrid& grid, int64_t merge) {
    check_rank(op, "class_ids", class_ids, 1);
    check_same_device(op, "costs", costs, class_ids);
    FASTROUTE_CHECK(merge == 1 || merge == 2 || merge == 4 || merge == 8, op, ": merge must be 1, 2, 4 or 8; got ",
                    merge);
    const int64_t levels = levels_of(merge), shapes = 4 * levels * levels;
    FASTROUTE_CHECK(costs.dim() == 2 && costs.size(0) >= 1 && costs.size(1) == shapes, op, ": costs must be (K, ",
                    shapes, "), K at least 1");
    FASTROUTE_CHECK(costs.scalar_type() == ScalarType::Float, op, ": costs must be float32");
    const int64_t tiles = grid.num_patches();
    FASTROUTE_CHECK(class_ids.size(0) % tiles == 0, op, ": class_ids must hold a multiple of ", tiles,
                    ", whole images; got ", class_ids.size(0));
    return class_ids.size(0) / tiles;
}

}  // namespace fastroute::regions
