// Where patches lie, host and device, free of torch: the C++ twin of fastroute/grid.py. Tile i of an axis begins at
// min(i · stride, max(size - patch, 0)); what follows from that is asked for where it is needed, never stored twice.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace fastroute {

struct TileRange {
    int64_t first;
    int64_t last;  // inclusive
};

// One axis of a Geometry, in LR pixels.
struct TileAxis {
    int64_t size;
    int64_t patch;
    int64_t stride;
    bool crop;

    FASTROUTE_HOST_DEVICE int64_t count() const {
        if (size <= patch) return 1;
        return crop ? (size - patch) / stride + 1 : (size - patch + stride - 1) / stride + 1;
    }

    // Largest origin: the last tile is shifted inward to end where the image ends.
    FASTROUTE_HOST_DEVICE int64_t last_origin() const { return size > patch ? size - patch : 0; }

    FASTROUTE_HOST_DEVICE int64_t origin(int64_t tile) const {
        const int64_t at = tile * stride, last = last_origin();
        return at < last ? at : last;
    }

    // Pixels that the stitched output spans.
    FASTROUTE_HOST_DEVICE int64_t covered() const { return crop ? (count() - 1) * stride + patch : size; }

    // Tiles that cover pixel `at`; they are consecutive.
    FASTROUTE_HOST_DEVICE TileRange covering(int64_t at) const {
        const int64_t end = count() - 1;
        int64_t first = at < patch ? 0 : (at - patch) / stride + 1;
        int64_t last = at / stride;
        if (first > end) first = end;
        if (last > end || at >= origin(end)) last = end;
        return {first, last};
    }

    // Whether `tile` alone has pixel `at` of `length`, to which every window gives 0: near an end of the axis, the tile
    // there.
    FASTROUTE_HOST_DEVICE bool owns_end(int64_t tile, int64_t at, int64_t length) const {
        return tile == (2 * at < length ? 0 : count() - 1);
    }
};

// The size of an image, and its patches: both axes in LR pixels, and the factor between them and what is stitched.
// Patches are numbered image by image, rows before columns.
struct Geometry {
    TileAxis y;
    TileAxis x;
    int64_t scale = 1;

    FASTROUTE_HOST_DEVICE int64_t num_patches() const { return y.count() * x.count(); }

    // Output pixels along a patch, and those of the stitched image.
    FASTROUTE_HOST_DEVICE int64_t span() const { return y.patch * scale; }
    FASTROUTE_HOST_DEVICE int64_t out_height() const { return y.covered() * scale; }
    FASTROUTE_HOST_DEVICE int64_t out_width() const { return x.covered() * scale; }
};

}  // namespace fastroute
