// refine_boundaries: a pixel of class 0 with a more expensive neighbour becomes the mean of its 3 x 3 pixels; all
// others are copied. What every device checks and allocates, and the types that kernels run for.
#pragma once

#include "common/dispatch.h"
#include "common/huge_pages.h"
#include "common/written.h"

namespace fastroute {
namespace {

constexpr const char* kOp = "refine_boundaries";

// A call, checked: rows [begin, end) are written.
struct Refinement {
    Tensor image;      // [B, C, H, W] contiguous
    Tensor class_map;  // [B, H, W] contiguous
    int64_t begin, end;
};

// Each device defines the kernel, for the type of the image's pixels, of the output's, and of the classes.
template <typename T, typename Out, typename Id>
void run_refine_boundaries(const Refinement& call, const Tensor& out);  // [B, C, rows, W]

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

void refine_into(const Tensor& image, const Tensor& class_map, int64_t begin, int64_t end, const Tensor& out) {
    if (out.numel() == 0) return;
    const Refinement call{.image = torch::stable::contiguous(image),
                          .class_map = torch::stable::contiguous(class_map),
                          .begin = begin,
                          .end = end};
    dispatch_refine(image.scalar_type(), class_map.scalar_type(), out.scalar_type(),
                    [&](auto pixel, auto written, auto id) {
                        run_refine_boundaries<decltype(pixel), decltype(written), decltype(id)>(call, out);
                    });
}

Tensor refine_boundaries(const Tensor& image,      // [B, C, H, W]
                         const Tensor& class_map,  // [B, H, W]
                         int64_t row_begin, int64_t row_end) {
    check_refine(image, class_map, row_begin, row_end);
    const Tensor out = prefer_huge_pages(
        empty_tensor(kOp, "the image", {image.size(0), image.size(1), row_end - row_begin, image.size(3)},
                     image.scalar_type(), image));
    refine_into(image, class_map, row_begin, row_end, out);
    return out;
}

Tensor refine_boundaries_out(const Tensor& image,      // [B, C, H, W]
                             const Tensor& class_map,  // [B, H, W]
                             int64_t row_begin, int64_t row_end,
                             const Tensor& out) {  // [B, C, rows, W]
    check_refine(image, class_map, row_begin, row_end);
    check_refine_out(image, class_map, row_end - row_begin, out);
    refine_into(image, class_map, row_begin, row_end, out);
    return out;
}

}  // namespace
}  // namespace fastroute
