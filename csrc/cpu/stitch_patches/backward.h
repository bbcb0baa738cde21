// The adjoint of stitch_patches: patch pixel (k, l) reads the gradient of its output pixel times wy[k] and then wx[l];
// a row that several patches were read from sums theirs. One patch of one channel is one item of work.
#pragma once

#include <algorithm>
#include <vector>

#include "common/stitch_patches.h"
#include "cpu/stitch_patches/table.h"

namespace fastroute {
namespace {

template <typename T>
struct BackwardBody {
    using W = Work<T>;

    FASTROUTE_INLINE static void run(const T* grad, const W* wy, const W* wx, int64_t kept_y, int64_t kept_x,
                                     int64_t width, int64_t span, bool first, W* row, T* out) {
        for (int64_t k = 0; k < span; ++k) {
            for (int64_t l = 0; l < span; ++l) row[l] = W(0);
            if (k < kept_y) {
                for (int64_t l = 0; l < kept_x; ++l) row[l] = static_cast<W>(grad[k * width + l]) * wy[k] * wx[l];
            }
            if (first) {
                for (int64_t l = 0; l < span; ++l) out[k * span + l] = static_cast<T>(row[l]);
            } else {
                for (int64_t l = 0; l < span; ++l)
                    out[k * span + l] = static_cast<T>(static_cast<W>(out[k * span + l]) + row[l]);
            }
        }
    }
};

void check_on_device(const StitchingBackward& call) {
    if (!call.inverse.has_value()) return;
    check_in_range(kOp, "inverse", call.inverse->const_data_ptr<int64_t>(), call.inverse->size(0), call.num_patches);
}

// Patch numbers by row of `patches`, those of row m in [start[m], start[m + 1]): a row may hold several, or none.
struct PatchesByRow {
    std::vector<int64_t> start, numbers;

    explicit PatchesByRow(const StitchingBackward& call) : start(call.num_patches + 1, 0) {
        const int64_t count = call.grad.size(0) * call.geometry.num_patches();
        const int64_t* inverse = call.inverse.has_value() ? call.inverse->const_data_ptr<int64_t>() : nullptr;
        const auto row_of = [&](int64_t n) { return inverse == nullptr ? n : inverse[n]; };
        numbers.resize(count);
        for (int64_t n = 0; n < count; ++n) ++start[row_of(n) + 1];
        for (int64_t m = 0; m < call.num_patches; ++m) start[m + 1] += start[m];
        std::vector<int64_t> next(start.begin(), start.end() - 1);
        for (int64_t n = 0; n < count; ++n) numbers[next[row_of(n)]++] = n;
    }
};

template <typename T>
void run_stitch_patches_backward(const StitchingBackward& call, const Tensor& out) {
    using W = Work<T>;
    const Geometry& geometry = call.geometry;
    const PatchesByRow sorted(call);
    const int64_t span = geometry.span(), tiles = geometry.num_patches(), cols = geometry.x.count();
    const W* window = checked_window<W>(call.window, span);
    const std::vector<W> weights_y = axis_weights(window, geometry.y, geometry.scale),
                         weights_x = axis_weights(window, geometry.x, geometry.scale);
    const int64_t channels = out.size(1), height = geometry.out_height(), width = geometry.out_width();
    const T* grad = call.grad.const_data_ptr<T>();
    T* result = out.mutable_data_ptr<T>();
    parallel(out.size(0) * channels, grain_for(span * span * 8), [&](int64_t begin, int64_t end) {
        std::vector<W> row(span);
        for (int64_t item = begin; item < end; ++item) {
            const int64_t m = item / channels, c = item % channels;
            T* target = result + item * span * span;
            const int64_t first = sorted.start[m], last = sorted.start[m + 1];
            if (first == last) std::fill(target, target + span * span, static_cast<T>(0.0f));
            for (int64_t s = first; s < last; ++s) {
                const int64_t n = sorted.numbers[s], image = n / tiles, i = n % tiles / cols, j = n % cols;
                const int64_t y0 = geometry.y.origin(i) * geometry.scale, x0 = geometry.x.origin(j) * geometry.scale;
                run_isa<BackwardBody<T>>(grad + ((image * channels + c) * height + y0) * width + x0,
                                         &weights_y[i * span], &weights_x[j * span], std::min(span, height - y0),
                                         std::min(span, width - x0), width, span, s == first, row.data(), target);
            }
        }
    });
}

}  // namespace
}  // namespace fastroute
