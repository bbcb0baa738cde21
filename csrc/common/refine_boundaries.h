// What the kernels of refine_boundaries check before they run, and the types that they run for.
#pragma once

#include "common/dispatch.h"
#include "common/written.h"

namespace fastroute {
namespace {

constexpr const char* kOp = "refine_boundaries";

void check_refine(const Tensor& image,      // [B, C, H, W]
                  const Tensor& class_map,  // [B, H, W]
                  int64_t row_begin, int64_t row_end) {
    check_rank(kOp, "image", image, 4), check_rank(kOp, "class_map", class_map, 3);
    check_same_device(kOp, "class_map", class_map, image);
    FASTROUTE_CHECK(class_map.scalar_type() == ScalarType::Byte || class_map.scalar_type() == ScalarType::Long, kOp,
                    ": class_map must be uint8 or int64");
    FASTROUTE_CHECK(
        class_map.size(0) == image.size(0) && class_map.size(1) == image.size(2) && class_map.size(2) == image.size(3),
        kOp, ": class_map must be [B, H, W], as image is");
    check_rows(kOp, row_begin, row_end, image.size(2));
}

void check_refine_out(const Tensor& image,      // [B, C, H, W]
                      const Tensor& class_map,  // [B, H, W]
                      int64_t rows,
                      const Tensor& out) {  // [B, C, rows, W]
    check_rank(kOp, "out", out, 4), check_same_device(kOp, "out", out, image);
    FASTROUTE_CHECK(out.size(0) == image.size(0) && out.size(1) == image.size(1) && out.size(2) == rows &&
                        out.size(3) == image.size(3) && (out.stride(3) == 1 || out.size(3) <= 1),
                    kOp, ": out must be [B, C, rows, W] with contiguous rows");
    check_written(kOp, "out", out, {image, class_map});
}

// f(pixel of the image, pixel of the output, class): a value of each type.
template <typename F>
void dispatch_refine(ScalarType image, ScalarType class_map, ScalarType out, F&& f) {
    dispatch_floating(kOp, image, [&](auto zero) {
        const auto run = [&](auto pixel) {
            if (class_map == ScalarType::Byte) {
                f(zero, pixel, uint8_t{});
            } else {
                f(zero, pixel, int64_t{});
            }
        };
        switch (out) {
            case ScalarType::Byte: return run(uint8_t{});
            case ScalarType::UInt16: return run(uint16_t{});
            default:
                FASTROUTE_CHECK(out == image, kOp, ": out must have the dtype of image, or uint8 or uint16");
                return run(zero);
        }
    });
}

}  // namespace
}  // namespace fastroute
