// pixel_mlp: y = residual + W_n relu(... relu(W_1 [feature | rel | cell] + b_1) ...) + b_n for each output pixel, by
// the MLP of its class, with W_1 · feature made once per feature. Work mapping: one item per block of output pixels,
// cut at borders of features; a thread takes the next block when it is done with one, because the classes of pixels
// make some blocks many times more expensive than others.
#include "common/pixel_mlp.h"

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "common/pixel_mlp_axis.h"
#include "cpu/intrinsics.h"
#include "cpu/isa.h"
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
    // A call into torch, which is not for every pixel.
    const int64_t step = map.stride(2);
    bool good = true;
    std::fill(counts.begin(), counts.end(), 0);
    for (int64_t y = block.y0; y < block.y1; ++y) {
        const T* row = data + (first_row + y) * map.stride(1);
        for (int64_t x = block.x0; x < block.x1; ++x) {
            const T id = row[x * step];
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
    std::atomic<bool> good{true};
    in_turn(blocks, [&](const auto& next) {
        Workspace<T> ws(p);
        std::vector<int64_t> counts(p.mlps.size());
        for (int64_t item = next(); item < blocks; item = next()) {
            const int64_t row = item / across % down, col = item % across;
            const Block block{.image = item / across / down,
                              .y0 = p.y.cuts[row],
                              .y1 = p.y.cuts[row + 1],
                              .x0 = p.x.cuts[col],
                              .x1 = p.x.cuts[col + 1]};
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

template <typename S>
void run_pixel_mlp(const Call& call, const Tensor& out) {
    using T = Work<S>;
    check_cpu(kOp, "features", call.features);
    const Sizes& sizes = call.sizes;
    const int64_t cols = std::min(kBlockColumns, sizes.width);
    const T* rel_y = call.relative.has_value() ? call.relative->const_data_ptr<T>() : nullptr;
    const T* rel_x = rel_y != nullptr ? rel_y + sizes.height : nullptr;
    const auto ratio = [](int64_t small, int64_t large) {
        return 2.0 * static_cast<double>(small) / static_cast<double>(large);
    };
    const Packing packing{.dim = sizes.dim,
                          .cell_y = ratio(sizes.h, sizes.height),
                          .cell_x = ratio(sizes.w, sizes.width),
                          .bf16 = std::is_same_v<S, BFloat16> && active_bf16()};
    std::vector<std::vector<T>> memory;
    const Problem<T> problem{
        .dim = sizes.dim,
        .channels = sizes.channels,
        .width = sizes.width,
        .row_begin = sizes.row_begin,
        .rows = sizes.rows,
        .widest = round_up(sizes.widest, kPad<T>),
        .y = axis_of<T>(sizes.h, sizes.height, sizes.row_begin, sizes.row_begin + sizes.rows,
                        std::max<int64_t>(kBlockPixels / cols, 1), rel_y),
        .x = axis_of<T>(sizes.w, sizes.width, 0, sizes.width, cols, rel_x),
        .mlps = pack<T>(call.weights, call.biases, call.depths, packing, memory),
        .features = source_of<T>("features", call.features),
        .residual = call.residual.has_value() ? source_of<T>("residual", *call.residual) : Source<T>{},
        .out = static_cast<char*>(out.mutable_data_ptr()),
        .out_bytes = sizeof(S),
        .store = store_as<S, T>};
    run_blocks(problem, sizes.batch, call.class_map);
}

}  // namespace
}  // namespace fastroute::pixel_mlp

namespace fastroute {

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, m) {
    FASTROUTE_IMPL(m, "pixel_mlp", pixel_mlp::pixel_mlp);
    // A processor has no such products: the same numbers.
    FASTROUTE_IMPL(m, "pixel_mlp.tf32", pixel_mlp::pixel_mlp_tf32);
}

}  // namespace fastroute
