// One axis of the pixel path, host and device, free of torch: which feature an output pixel reads and where it lies in
// it. All coordinates are fractions of integers, so that no rounding moves a pixel to another feature; but a caller may
// give relative coordinates of its own.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace fastroute {

struct PixelAxis {
    int64_t size;  // LR features
    int64_t out;   // output pixels

    // The feature nearest to the centre of pixel `at`; half way between two, the even one.
    FASTROUTE_HOST_DEVICE int64_t nearest(int64_t at) const {
        const int64_t doubled = (2 * at + 1) * size, index = doubled / (2 * out);
        return doubled % (2 * out) == 0 && index % 2 == 1 ? index - 1 : index;
    }

    // `out` times the distance of pixel `at` from the centre of its feature, in half features: an integer.
    FASTROUTE_HOST_DEVICE int64_t relative(int64_t at) const {
        return (2 * at + 1) * size - (2 * nearest(at) + 1) * out;
    }

    // The exact relative coordinate of a pixel in its nearest feature, in half features.
    FASTROUTE_HOST_DEVICE double exact(int64_t at) const {
        return static_cast<double>(relative(at)) / static_cast<double>(out);
    }

    // The feature whose centre lies `given` half features from pixel `at`: the nearest one or one beside it.
    FASTROUTE_HOST_DEVICE int64_t placed(int64_t at, double given) const {
        const double further = exact(at) - given;
        const int64_t index = nearest(at) + (further > 1 ? 1 : 0) - (further < -1 ? 1 : 0);
        return index < 0 ? 0 : (index < size ? index : size - 1);
    }

    // 2 · out times the place between pixel centres at which a bilinear image is read.
    FASTROUTE_HOST_DEVICE int64_t bilinear(int64_t at) const {
        const int64_t place = (2 * at + 1) * size - out, last = 2 * out * (size - 1);
        return place < 0 ? 0 : (place > last ? last : place);
    }
    FASTROUTE_HOST_DEVICE int64_t bilinear_first(int64_t at) const { return bilinear(at) / (2 * out); }
    FASTROUTE_HOST_DEVICE double bilinear_weight(int64_t at) const {
        return static_cast<double>(bilinear(at) % (2 * out)) / static_cast<double>(2 * out);
    }
};

}  // namespace fastroute
