// The geometry that an operator is given, checked: everything that follows from it is an address.
#pragma once

#include "common/checks.h"
#include "common/geometry.h"

namespace fastroute {

// The arguments of a schema, in its order.
inline Geometry checked_geometry(const char* op, int64_t height, int64_t width, int64_t patch, int64_t stride,
                                 int64_t scale, bool crop) {
    check_at_least(op, "height", height, 1), check_at_least(op, "width", width, 1);
    check_at_least(op, "patch", patch, 1), check_at_least(op, "stride", stride, 1);
    check_at_least(op, "scale", scale, 1);
    FASTROUTE_CHECK(stride <= patch, op, ": stride must be at most patch (", patch,
                    "), or pixels between patches are lost; got ", stride);
    FASTROUTE_CHECK(!crop || (height >= patch && width >= patch), op, ": coverage='crop' needs an image of at least ",
                    patch, " x ", patch, " pixels; got ", height, " x ", width, "; use coverage='full'");
    checked_product(op, "the image", {std::max(height, patch), std::max(width, patch), scale, scale});
    return {.y = {.size = height, .patch = patch, .stride = stride, .crop = crop},
            .x = {.size = width, .patch = patch, .stride = stride, .crop = crop},
            .scale = scale};
}

}  // namespace fastroute
