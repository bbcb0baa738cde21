// refine_boundaries: a pixel of class 0 with a dearer neighbour becomes the mean of its 3 x 3 pixels; all others are
// copied. Work mapping: one item per output row; its boundary pixels are found once for all channels.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/pixel.h"
#include "common/refine_boundaries.h"
#include "cpu/isa.h"
#include "cpu/memory.h"

namespace fastroute {
namespace {

// dearer[x] |= class[x] != 0.
template <typename Id>
struct DearerBody {
    FASTROUTE_INLINE static void run(const Id* classes, int64_t count, uint8_t* dearer) {
        for (int64_t x = 0; x < count; ++x) dearer[x] |= classes[x] != 0;
    }
};

template <typename T, typename Out>
struct CopyBody {
    FASTROUTE_INLINE static void run(const T* from, int64_t count, Out* to) {
        for (int64_t x = 0; x < count; ++x) to[x] = to_pixel<Out>(static_cast<Work<T>>(from[x]));
    }
};

// Columns of row y of `classes` [H, W] whose pixel is refined.
template <typename Id>
void find_boundary(const Id* classes, int64_t width, int64_t y, std::vector<uint8_t>& dearer,
                   std::vector<int64_t>& found) {
    found.clear();
    std::fill(dearer.begin(), dearer.end(), uint8_t{0});
    for (int64_t row = y - 1; row <= y + 1; ++row) run_isa<DearerBody<Id>>(classes + row * width, width, dearer.data());
    const Id* here = classes + y * width;
    for (int64_t x = 1; x + 1 < width; ++x) {
        if ((dearer[x - 1] | dearer[x] | dearer[x + 1]) != 0 && here[x] == 0) found.push_back(x);
    }
}

template <typename T, typename Out, typename Id>
void refine(const Tensor& image, const Tensor& class_map, int64_t begin, int64_t end, const Tensor& out) {
    const int64_t batch = image.size(0), channels = image.size(1), height = image.size(2), width = image.size(3);
    const int64_t rows = end - begin;
    const T* pixels = image.const_data_ptr<T>();
    const Id* classes = class_map.const_data_ptr<Id>();
    Out* target = out.mutable_data_ptr<Out>();
    parallel(batch * rows, grain_for(channels * width * static_cast<int64_t>(sizeof(T))),
             [&](int64_t first, int64_t last) {
                 std::vector<uint8_t> dearer(width);
                 std::vector<int64_t> found;
                 for (int64_t item = first; item < last; ++item) {
                     const int64_t b = item / rows, row = item % rows, y = begin + row;
                     found.clear();
                     if (y > 0 && y + 1 < height) find_boundary(classes + b * height * width, width, y, dearer, found);
                     for (int64_t c = 0; c < channels; ++c) {
                         const T* from = pixels + ((b * channels + c) * height + y) * width;
                         Out* to = target + b * out.stride(0) + c * out.stride(1) + row * out.stride(2);
                         if constexpr (std::is_same_v<T, Out>) {
                             std::memcpy(to, from, width * sizeof(T));
                         } else {
                             run_isa<CopyBody<T, Out>>(from, width, to);
                         }
                         for (const int64_t x : found) {
                             Work<T> sum = 0;
                             for (const int64_t at : {x - width, x, x + width}) {
                                 for (int64_t dx = -1; dx <= 1; ++dx) sum += static_cast<Work<T>>(from[at + dx]);
                             }
                             to[x] = to_pixel<Out>(sum / 9);
                         }
                     }
                 }
             });
}

void refine_into(const Tensor& image, const Tensor& class_map, int64_t begin, int64_t end, const Tensor& out) {
    const Tensor dense = torch::stable::contiguous(image), classes = torch::stable::contiguous(class_map);
    dispatch_refine(dense.scalar_type(), classes.scalar_type(), out.scalar_type(),
                    [&](auto pixel, auto written, auto id) {
                        refine<decltype(pixel), decltype(written), decltype(id)>(dense, classes, begin, end, out);
                    });
}

Tensor refine_boundaries_cpu(const Tensor& image,      // [B, C, H, W]
                             const Tensor& class_map,  // [B, H, W]
                             int64_t row_begin, int64_t row_end) {
    check_cpu(kOp, "image", image);
    check_refine(image, class_map, row_begin, row_end);
    const Tensor out =
        empty_tensor(kOp, "the image", {image.size(0), image.size(1), row_end - row_begin, image.size(3)},
                     image.scalar_type(), image);
    if (out.numel() == 0) return out;
    prefer_huge_pages(out.mutable_data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
    refine_into(image, class_map, row_begin, row_end, out);
    return out;
}

Tensor refine_boundaries_out_cpu(const Tensor& image,      // [B, C, H, W]
                                 const Tensor& class_map,  // [B, H, W]
                                 int64_t row_begin, int64_t row_end,
                                 const Tensor& out) {  // [B, C, rows, W]
    check_cpu(kOp, "image", image);
    check_refine(image, class_map, row_begin, row_end);
    check_refine_out(image, class_map, row_end - row_begin, out);
    if (out.numel() > 0) refine_into(image, class_map, row_begin, row_end, out);
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, m) {
    FASTROUTE_IMPL(m, "refine_boundaries", refine_boundaries_cpu);
    FASTROUTE_IMPL(m, "refine_boundaries.out", refine_boundaries_out_cpu);
}

}  // namespace fastroute
