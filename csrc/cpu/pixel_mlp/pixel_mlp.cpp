// pixel_mlp: each output pixel's MLP, with the first layer's product with the features made once per feature.
// Work mapping: one item per block of output pixels, cut at borders of features; a thread takes the next block when it
// is done with one, because the classes of pixels make some blocks many times dearer than others.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "common/pixel_mlp.h"
#include "common/pixel_mlp_axis.h"
#include "cpu/intrinsics.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/pixel_mlp/bf16.h"
#include "cpu/pixel_mlp/plan.h"

namespace fastroute::pixel_mlp {

#define FASTROUTE_BODY "cpu/pixel_mlp/block.h"
#include "cpu/each_isa.h"

namespace {

// Output pixels of a block: with 80 units of first layer and 3 channels about half a second-level cache at scale 4.
constexpr int64_t kBlockPixels = 8192;
constexpr int64_t kBlockColumns = 1024;

template <typename T>
void run_block(const Problem<T>& p, const Block& block, const std::vector<int64_t>& counts, Workspace<T>& ws) {
    const int64_t cols = block.x1 - block.x0, rows = block.y1 - block.y0;
    const auto number = [](const Axis<T>& axis, int64_t begin, int64_t end, int32_t* which, int32_t* feature) {
        int32_t last = 0;
        for (int64_t i = begin; i < end; ++i) {
            if (i > begin && axis.nearest[i] != axis.nearest[i - 1]) ++last;
            which[i - begin] = last, feature[last] = axis.nearest[i];
        }
        return static_cast<int64_t>(last) + 1;
    };
    const int64_t feature_rows = number(p.y, block.y0, block.y1, ws.row, ws.feature_row);
    const int64_t feature_cols = number(p.x, block.x0, block.x1, ws.col, ws.feature_col);

    // A counting sort by class; places[k] is where the next pixel of class k goes.
    std::vector<int64_t> places(counts.size() + 1, 0);
    for (size_t k = 0; k < counts.size(); ++k) places[k + 1] = places[k] + counts[k];
    std::vector<int64_t> next = places;
    for (int64_t y = 0; y < rows; ++y) {
        for (int64_t x = 0; x < cols; ++x) {
            const uint32_t pixel = static_cast<uint32_t>(y << 16 | x);
            ws.pixels[counts.size() == 1 ? y * cols + x : next[ws.classes[y * cols + x]]++] = pixel;
        }
    }
    const auto run = [&](auto fill, auto one_class) {
        fill(p, block, ws);
        for (size_t k = 0; k < counts.size(); ++k) {
            if (counts[k] == 0 || p.mlps[k].units == 0) continue;
            one_class(p, p.mlps[k], block, ws.pixels + places[k], counts[k], feature_rows * feature_cols, feature_cols,
                      ws);
        }
    };
#if FASTROUTE_X86
    if (active_isa() == Isa::avx512) {
        run(avx512::fill_residual<T>, avx512::run_class<T>);
    } else if (active_isa() == Isa::avx2) {
        run(avx2::fill_residual<T>, avx2::run_class<T>);
    } else
#endif
        run(baseline::fill_residual<T>, baseline::run_class<T>);

    for (int64_t c = 0; c < p.channels; ++c) {
        for (int64_t y = 0; y < rows; ++y) {
            char* to =
                p.out + (((block.image * p.channels + c) * p.rows + block.y0 + y) * p.width + block.x0) * p.out_bytes;
            p.store(ws.out + (c * rows + y) * cols, cols, to);
        }
    }
}

// Copies the classes of a block and counts them; false when one is out of range.
template <typename T>
bool read_classes(const Tensor& map, const Block& block, int64_t first_row, uint8_t* classes,
                  std::vector<int64_t>& counts) {
    const auto limit = static_cast<T>(counts.size() - 1);
    const T* data = map.const_data_ptr<T>() + block.image * map.stride(0);
    bool good = true;
    std::fill(counts.begin(), counts.end(), 0);
    for (int64_t y = block.y0; y < block.y1; ++y) {
        const T* row = data + (first_row + y) * map.stride(1);
        for (int64_t x = block.x0; x < block.x1; ++x) {
            const T id = row[x * map.stride(2)];
            good &= id >= 0 && id <= limit;
            const auto known = static_cast<uint8_t>(good ? id : 0);
            *classes++ = known;
            ++counts[known];
        }
    }
    return good;
}

template <typename T>
void run_blocks(const Problem<T>& p, int64_t batch, const std::optional<Tensor>& class_map) {
    const int64_t down = static_cast<int64_t>(p.y.cuts.size()) - 1, across = static_cast<int64_t>(p.x.cuts.size()) - 1;
    const int64_t blocks = batch * down * across;
    std::atomic<int64_t> next{0};
    std::atomic<bool> good{true};
    const int64_t threads = std::min<int64_t>(blocks, torch::stable::get_num_threads());
    parallel(threads, 1, [&](int64_t, int64_t) {
        Workspace<T> ws(p);
        std::vector<int64_t> counts(p.mlps.size());
        for (int64_t item = next++; item < blocks; item = next++) {
            const int64_t row = item / across % down, col = item % across;
            const Block block{item / across / down, p.y.cuts[row], p.y.cuts[row + 1], p.x.cuts[col], p.x.cuts[col + 1]};
            if (!class_map.has_value()) {
                counts[0] = (block.y1 - block.y0) * (block.x1 - block.x0);
            } else {
                const bool bytes = class_map->scalar_type() == ScalarType::Byte;
                const auto read = bytes ? read_classes<uint8_t> : read_classes<int64_t>;
                if (!read(*class_map, block, p.row_begin, ws.classes, counts)) good = false;
            }
            run_block(p, block, counts, ws);
        }
    });
    if (!good) fail(kOp, ": class_map must lie in [0, ", p.mlps.size(), "), one class per MLP");
}

Tensor pixel_mlp_cpu(const Tensor& features,              // [B, D, h, w]
                     const std::vector<Tensor>& weights,  // [F_out, F_in] each
                     const std::vector<Tensor>& biases,   // [F_out] each
                     const std::vector<int64_t>& depths,  // [K]
                     int64_t height, int64_t width,
                     const std::optional<Tensor>& class_map,  // [B, H, W]
                     const std::optional<Tensor>& residual,   // [B, C, h, w]
                     const std::optional<Tensor>& relative,   // [H + W]
                     int64_t row_begin, int64_t row_end) {
    check_cpu(kOp, "features", features);
    const Sizes sizes =
        checked_sizes(features, weights, biases, depths, height, width, class_map, residual, row_begin, row_end);
    const std::optional<Tensor> given = checked_relative(relative, features, sizes);
    const Tensor out = empty_output(features, sizes);
    if (out.numel() == 0) return out;
    prefer_huge_pages(out.mutable_data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));

    dispatch_floating(kOp, features.scalar_type(), [&](auto zero) {
        using S = decltype(zero);
        using T = Work<S>;
        const int64_t cols = std::min(kBlockColumns, width);
        std::vector<std::vector<T>> memory;
        Problem<T> p{sizes.dim,  sizes.channels,
                     width,      row_begin,
                     sizes.rows, round_up(sizes.widest, kPad<T>),
                     {},         {},
                     {},         {},
                     {},         static_cast<char*>(out.mutable_data_ptr()),
                     sizeof(S),  store_as<S, T>};
        const T* rel_y = given.has_value() ? given->const_data_ptr<T>() : nullptr;
        const T* rel_x = given.has_value() ? rel_y + height : nullptr;
        p.y = axis_of<T>(sizes.h, height, row_begin, row_end, std::max<int64_t>(kBlockPixels / cols, 1), rel_y);
        p.x = axis_of<T>(sizes.w, width, 0, width, cols, rel_x);
        const auto ratio = [](int64_t small, int64_t large) {
            return 2.0 * static_cast<double>(small) / static_cast<double>(large);
        };
        const bool bf16 = std::is_same_v<S, BFloat16> && active_bf16();
        p.mlps =
            pack<T>(weights, biases, depths, sizes.dim, ratio(sizes.h, height), ratio(sizes.w, width), bf16, memory);
        p.features = source_of<T>("features", features);
        if (residual.has_value()) p.residual = source_of<T>("residual", *residual);
        run_blocks(p, sizes.batch, class_map);
    });
    return out;
}

}  // namespace
}  // namespace fastroute::pixel_mlp

namespace fastroute {

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, m) {
    FASTROUTE_IMPL(m, "pixel_mlp", pixel_mlp::pixel_mlp_cpu);
    // A processor has no such products.
    FASTROUTE_IMPL(m, "pixel_mlp.tf32", pixel_mlp::pixel_mlp_cpu);
}

}  // namespace fastroute
