// The adjoint of extract_patches: image pixel (y, x) sums the gradients of all patch pixels that read it, tile rows
// before tile columns before repeated patches. One image row of one channel is one item of work, so no two threads
// write one pixel.
#pragma once

#include <algorithm>
#include <vector>

#include "common/extract_patches.h"
#include "cpu/isa.h"

namespace fastroute {
namespace {

template <typename T>
struct BackwardBody {
    using W = Work<T>;

    FASTROUTE_INLINE static void run(const T* grad, const int64_t* start, const int64_t* rows, Geometry geometry,
                                     int64_t channels, int64_t image, int64_t c, int64_t y, W* folded, W* sum, T* out) {
        const int64_t width = geometry.x.size, patch = geometry.x.patch, cols = geometry.x.count();
        for (int64_t x = 0; x < width; ++x) sum[x] = W(0);
        const TileRange range = geometry.y.covering(y);
        const int64_t kept = std::min(patch, width);
        for (int64_t i = range.first; i <= range.last; ++i) {
            const int64_t first = y - geometry.y.origin(i);
            if (first >= patch) continue;  // the remainder that "crop" drops
            // Patch rows below a small image read its last row.
            const int64_t last =
                y == geometry.y.size - 1 ? std::max(first, geometry.y.size < patch ? patch - 1 : first) : first;
            for (int64_t j = 0; j < cols; ++j) {
                const int64_t tile = (image * geometry.y.count() + i) * cols + j;
                if (start[tile] == start[tile + 1]) continue;
                for (int64_t l = 0; l < patch; ++l) folded[l] = W(0);
                for (int64_t k = first; k <= last; ++k) {
                    for (int64_t l = 0; l < patch; ++l) {
                        W repeated = W(0);
                        for (int64_t r = start[tile]; r < start[tile + 1]; ++r) {
                            repeated += static_cast<W>(grad[((rows[r] * channels + c) * patch + k) * patch + l]);
                        }
                        folded[l] += repeated;
                    }
                }
                for (int64_t l = kept; l < patch; ++l) folded[kept - 1] += folded[l];
                W* target = sum + geometry.x.origin(j);
                for (int64_t l = 0; l < kept; ++l) target[l] += folded[l];
            }
        }
        for (int64_t x = 0; x < width; ++x) out[x] = static_cast<T>(sum[x]);
    }
};

void check_on_device(const ExtractionBackward& call) {
    const Selection& selected = call.selected;
    if (selected.order.has_value()) {
        check_in_range(kOp, "order", selected.numbers(), selected.count, selected.patches);
    }
}

// Rows of the gradient by patch number, those of patch n in [start[n], start[n + 1]): a stable counting sort.
struct RowsByPatch {
    std::vector<int64_t> start, rows;

    explicit RowsByPatch(const Selection& selected) : start(selected.patches + 1, 0), rows(selected.count) {
        const int64_t* number = selected.numbers();
        const auto patch_of = [&](int64_t m) { return number == nullptr ? m : number[m]; };
        for (int64_t m = 0; m < selected.count; ++m) ++start[patch_of(m) + 1];
        for (int64_t n = 0; n < selected.patches; ++n) start[n + 1] += start[n];
        std::vector<int64_t> next(start.begin(), start.end() - 1);
        for (int64_t m = 0; m < selected.count; ++m) rows[next[patch_of(m)]++] = m;
    }
};

template <typename T>
void run_extract_patches_backward(const ExtractionBackward& call, const Tensor& out) {
    using W = Work<T>;
    const Geometry& geometry = call.selected.geometry;
    const RowsByPatch sorted(call.selected);
    const int64_t channels = out.size(1), height = out.size(2), width = out.size(3);
    const T* grad = call.grad.const_data_ptr<T>();
    T* result = out.mutable_data_ptr<T>();
    parallel(out.size(0) * channels * height, grain_for(width * 8), [&](int64_t begin, int64_t end) {
        std::vector<W> folded(geometry.x.patch), sum(width);
        for (int64_t item = begin; item < end; ++item) {
            const int64_t y = item % height, c = item / height % channels, b = item / height / channels;
            run_isa<BackwardBody<T>>(grad, sorted.start.data(), sorted.rows.data(), geometry, channels, b, c, y,
                                     folded.data(), sum.data(), result + item * width);
        }
    });
}

}  // namespace
}  // namespace fastroute
