// stitch_patches: out[b, c, Y, X] = Σ_i wy[i, Y] · Σ_j wx[j, X] · patch(i, j)[c, Y - y_i, X - x_j], the sums over the
// tile rows i and tile columns j that cover the pixel. Eight output rows of one channel are one item of work, or of all
// channels where the pixels of a patch hold them side by side: tile by tile they are summed in the first-level cache,
// and every output pixel is written once. Multiplications and additions are rounded one by one (no contraction), in one
// order, so the result has the same bits on every instruction set and thread count.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "common/pixel.h"
#include "common/stitch_patches.h"
#include "cpu/stitch_patches/kinds.h"
#include "cpu/stitch_patches/rows.h"

namespace fastroute {
namespace {

constexpr int64_t kWindowBytes = 24 << 10;  // what the window of an item may take of the first-level cache
constexpr int64_t kStreamFrom = 8 << 20;    // bytes of output from which it is written past the caches

// Normalised weights of every tile along one axis, [tiles, span]; 0 outside the image.
template <typename W>
std::vector<W> axis_weights(const W* window, const TileAxis& axis, int64_t scale) {
    const int64_t span = axis.patch * scale, length = axis.covered() * scale, tiles = axis.count();
    std::vector<W> total(std::max(length, span), W(0)), weights(tiles * span);
    for (int64_t i = 0; i < tiles; ++i) {
        for (int64_t k = 0; k < span; ++k) total[axis.origin(i) * scale + k] += window[k];
    }
    for (int64_t i = 0; i < tiles; ++i) {
        for (int64_t k = 0; k < span; ++k) {
            const int64_t at = axis.origin(i) * scale + k;
            if (at >= length)
                weights[i * span + k] = W(0);
            else
                weights[i * span + k] = total[at] == W(0) ? W(axis.owns_end(i, at, length)) : window[k] / total[at];
        }
    }
    return weights;
}

// Channels that are unpacked together where they lie side by side: those of a cache line at most, and as many in every
// item.
int64_t channels_per_item(int64_t channels) {
    int64_t most = std::clamp<int64_t>(channels, 1, 16);
    while (channels % most != 0) --most;
    return most;
}

bool same(TileRange a, TileRange b) { return a.first == b.first && a.last == b.last; }

// Tile rows that the output rows [begin, end) read.
TileRange read_rows(const TileGrid& grid, int64_t scale, int64_t begin, int64_t end) {
    if (begin >= end) return {0, -1};
    return {grid.y.covering(begin / scale).first, grid.y.covering((end - 1) / scale).last};
}

// Where every patch of the tile rows `read` is held, [B, rows, cols]; places are checked.
template <typename T>
std::vector<Held<T>> held_patches(const Batches& batches, const Places& places, const TileGrid& grid, int64_t scale,
                                  int64_t shuffle, const Target& target, TileRange read, const Upsampling* upsampling) {
    std::vector<Held<T>> rows;  // of `batches`, in which patches are looked up
    // At once: an expanded tensor may have more rows than there is memory for.
    rows.reserve(target.count);
    for (size_t i = 0; i < batches.size(); ++i) {
        const Tensor& batch = batches[i];
        const T* data = batch.const_data_ptr<T>();
        const int64_t kind = upsampling != nullptr ? upsampling->kind_of[i] : -1;
        for (int64_t m = 0; m < batch.size(0); ++m) {
            rows.push_back({data + m * batch.stride(0), batch.stride(1), batch.stride(2), batch.stride(3), kind,
                            static_cast<int64_t>(rows.size()), 0, 0, batch.size(2), batch.size(3)});
        }
    }
    const int64_t* inverse = places.inverse.has_value() ? places.inverse->const_data_ptr<int64_t>() : nullptr;
    const int64_t* region = places.region.has_value() ? places.region->const_data_ptr<int64_t>() : nullptr;
    const int64_t tiles = grid.num_patches(), cols = grid.x.count();
    std::vector<Held<T>> table;
    table.reserve(target.batch * (read.last - read.first + 1) * cols);
    for (int64_t b = 0; b < target.batch; ++b) {
        if (inverse != nullptr && read.first <= read.last) {
            check_in_range(kOp, "inverse", inverse + b * tiles + read.first * cols, (read.last - read.first + 1) * cols,
                           target.count);
        }
        for (int64_t tile = read.first * cols; tile < (read.last + 1) * cols; ++tile) {
            const int64_t n = b * tiles + tile;
            Held<T> held = rows[inverse == nullptr ? n : inverse[n]];
            if (region != nullptr) {
                const int64_t corner = region[n] - b * tiles;
                if (corner < 0 || corner > tile) {
                    fail(kOp, ": region must name a patch above or left of its patches, in their image; got ",
                         region[n], " for patch ", n);
                }
                held.down = grid.y.origin(tile / cols) - grid.y.origin(corner / cols);
                held.across = grid.x.origin(tile % cols) - grid.x.origin(corner % cols);
                // Elements per LR pixel.
                const bool finished = upsampling != nullptr && held.kind < 0;
                const int64_t factor = finished ? scale : scale / shuffle, span = grid.y.patch * factor;
                if (held.across < 0 || held.down * factor + span > held.height ||
                    held.across * factor + span > held.width) {
                    fail(kOp, ": region ", region[n], " does not hold patch ", n, "; got ", held.height, " x ",
                         held.width);
                }
                if (held.kind < 0) held.data += held.down * factor * held.y + held.across * factor * held.x;
            }
            table.push_back(held);
        }
    }
    return table;
}

void stitch_into(const Tensor& out, const Batches& batches, const Places& places, const Tensor& window,
                 const TileGrid& grid, int64_t scale, int64_t shuffle, int64_t row_begin, const Target& target,
                 const Upsampling* upsampling = nullptr, Spent* spent = nullptr) {
    const int64_t span = grid.y.patch * scale, channels = target.channels, rows = target.rows;
    const Tensor& first = batches.front();
    check_same_device(kOp, "window", window, first);
    const Tensor dense_window = torch::stable::contiguous(window);
    dispatch_floating(kOp, first.scalar_type(), [&](auto zero) {
        using T = decltype(zero);
        using W = Work<T>;
        const W* weight = checked_window<W>(dense_window, span);
        const std::vector<W> weights_y = axis_weights(weight, grid.y, scale),
                             weights_x = axis_weights(weight, grid.x, scale);
        const TileRange read = read_rows(grid, scale, row_begin, row_begin + rows);
        const std::vector<Held<T>> table =
            held_patches<T>(batches, places, grid, scale, shuffle, target, read, upsampling);
        StitchPlan<T> plan{.table = table.data(),
                           .read = read,
                           .layout = {first.stride(1), first.stride(2), first.stride(3), shuffle},
                           .weights_y = weights_y.data(),
                           .weights_x = weights_x.data(),
                           .grid = grid,
                           .scale = scale,
                           .span = span,
                           .width = target.width,
                           .channels = 1,
                           .wide = false,
                           .rows = kRows,
                           .upsampling = upsampling,
                           .tile = {0, span, 1, 1}};
        if (upsampling != nullptr) {
            plan.channels = channels;
            plan.rows = shuffle * rows_per_item(target.batch * rows / shuffle, 8, 2);
            plan.tile.y = computed_columns(span / shuffle, shuffle);
            plan.layout = plan.tile;
        } else if (plan.unpacked() && plan.layout.x != 1) {
            plan.channels = channels_per_item(channels);
        }
        if (plan.side_by_side() && channels * kRows * span * int64_t(sizeof(W)) <= kWindowBytes)
            plan.channels = channels;
        dispatch_image(kOp, out.scalar_type(), [&](auto out_zero) {
            using Out = decltype(out_zero);
            const bool wide_patches = plan.planar() || (plan.layout.shuffle == 4 && std::is_same_v<T, float>);
            plan.wide = kWideRuns<T, Out> && wide_patches && has_wide_runs() && plan.covers_twice();
            // Longer runs of each patch: 64 rows of 128 pixels are eight 4 KiB pages.
            if (plan.wide && plan.planar() && upsampling == nullptr)
                plan.rows = rows_per_item(target.batch * channels / plan.channels * rows, 4 * kRows, kRows);
            else if (plan.unpacked())
                plan.rows = std::clamp<int64_t>(kWindowBytes / sizeof(W) / plan.channels / span, 2, kRows);
            if (plan.planar() && !plan.in_place()) plan.tile.c = plan.rows * plan.tile.y;
            Out* result = out.mutable_data_ptr<Out>();
            const int64_t image_step = out.stride(0), channel_step = out.stride(1), row_step = out.stride(2);
            // What does not fit in the caches anyway should not push anything else out of them.
            const bool stream = target.batch * channels * rows * target.width * int64_t(sizeof(Out)) >= kStreamFrom;
            const int64_t blocks = (rows + plan.rows - 1) / plan.rows, parts = channels / plan.channels;
            const int64_t items = target.batch * parts * blocks;
            const auto run = [&](int64_t item, Scratch<W>& scratch) {
                const int64_t c = item / blocks % parts * plan.channels, b = item / blocks / parts;
                int64_t y = item % blocks * plan.rows;
                const int64_t last = std::min(rows, y + plan.rows);
                while (y < last) {
                    // As many rows as the same tile rows cover; that changes between LR rows alone.
                    const TileRange range = grid.y.covering((row_begin + y) / scale);
                    int64_t next = y + 1;
                    while (next < last && same(range, grid.y.covering((row_begin + next) / scale))) ++next;
                    const Rows<Out> to{result + b * image_step + c * channel_step + y * row_step, channel_step,
                                       row_step, next - y, stream};
                    run_isa<StitchBody<T, Out>, kPrecise<T, Out>>(plan, b, c, row_begin + y, range, &scratch, to);
                    y = next;
                }
            };
            if (upsampling == nullptr) {
                const int64_t item_bytes = plan.channels * plan.rows * target.width * 8;
                parallel(items, grain_for(item_bytes), [&](int64_t begin, int64_t end) {
                    Scratch<W> scratch(plan, 0);
                    for (int64_t item = begin; item < end; ++item) run(item, scratch);
                    if (stream) stream_fence();
                });
                return;
            }
            // What the layers of a patch cost depends on its kind, and hard patches lie together: each thread takes the
            // next item.
            std::atomic<int64_t> next{0};
            parallel(std::min<int64_t>(items, torch::stable::get_num_threads()), 1, [&](int64_t, int64_t) {
                const int64_t start = ticks();
                Scratch<W> scratch(plan, upsampling->number);
                for (int64_t item = next++; item < items; item = next++) run(item, scratch);
                if (stream) stream_fence();
                spent->add(scratch.spent, ticks() - start);
            });
        });
    });
}

Tensor stitch_patches_cpu(const Tensor& patches,                 // [M, C·r·r, P / r, P / r]
                          const std::optional<Tensor>& inverse,  // [N]
                          const Tensor& window,                  // [P]
                          int64_t height, int64_t width, int64_t patch, int64_t stride, int64_t scale, bool crop,
                          int64_t shuffle, std::optional<ScalarType> dtype, int64_t row_begin, int64_t row_end) {
    const TileGrid grid = checked_grid(kOp, height, width, patch, stride, crop, scale);
    const Places places = checked_places(inverse, std::nullopt, patches);
    const Target target = checked_target({patches}, places.inverse, grid, scale, shuffle, row_begin, row_end);
    const Tensor out = empty_tensor(kOp, "the image", {target.batch, target.channels, target.rows, target.width},
                                    dtype.value_or(patches.scalar_type()), patches);
    prefer_huge_pages(out.mutable_data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
    stitch_into(out, {patches}, places, window, grid, scale, shuffle, row_begin, target);
    return out;
}

void stitch_batches_out_cpu(const Batches& batches,                // [M_i, C·r·r, P / r, P / r] each
                            const std::optional<Tensor>& inverse,  // [N]
                            const std::optional<Tensor>& region,   // [N]
                            const Tensor& window,                  // [P]
                            int64_t height, int64_t width, int64_t patch, int64_t stride, int64_t scale, bool crop,
                            int64_t shuffle, int64_t row_begin, int64_t row_end,
                            const Tensor& out) {  // [B, C, rows, W·s]
    const TileGrid grid = checked_grid(kOp, height, width, patch, stride, crop, scale);
    const Places places = checked_places(inverse, region, out);
    const Target target =
        checked_target(batches, places.inverse, grid, scale, shuffle, row_begin, row_end, 0, region.has_value());
    check_stitch_out(target, batches, places.read(), out);
    stitch_into(out, batches, places, window, grid, scale, shuffle, row_begin, target);
}

void stitch_patches_out_cpu(const Tensor& patches, const std::optional<Tensor>& inverse, const Tensor& window,
                            int64_t height, int64_t width, int64_t patch, int64_t stride, int64_t scale, bool crop,
                            int64_t shuffle, int64_t row_begin, int64_t row_end, const Tensor& out) {
    stitch_batches_out_cpu({patches}, inverse, std::nullopt, window, height, width, patch, stride, scale, crop, shuffle,
                           row_begin, row_end, out);
}

void stitch_upsampled_out_cpu(const Batches& batches,  // [M_i, F, p, p] each
                              const std::vector<int64_t>& kinds,
                              const Batches& layers,                 // five per kind, see checked_upsamplers
                              const std::optional<Tensor>& inverse,  // [N]
                              const std::optional<Tensor>& region,   // [N]
                              const Tensor& window,                  // [P]
                              int64_t height, int64_t width, int64_t patch, int64_t stride, int64_t scale, bool crop,
                              int64_t shuffle, int64_t row_begin, int64_t row_end,
                              const Tensor& out,      // [B, C, rows, W·s]
                              const Tensor& spent) {  // [kinds + 1]
    const TileGrid grid = checked_grid(kOp, height, width, patch, stride, crop, scale);
    const Places places = checked_places(inverse, region, out);
    const Target target = checked_kinds(batches, kinds, layers, spent, places.inverse, grid, scale, shuffle, row_begin,
                                        row_end, region.has_value());
    check_stitch_out(target, batches, places.read(), out);
    check_written(kOp, "spent", spent, {out});
    const std::vector<upsampler::Upsampler> packed = packed_upsamplers(layers, shuffle);
    int64_t widest = grid.y.patch;
    for (size_t i = 0; i < batches.size(); ++i) {
        if (kinds[i] >= 0) widest = std::max(widest, batches[i].size(3));
    }
    const Upsampling upsampling{.kinds = packed.data(),
                                .number = static_cast<int64_t>(packed.size()),
                                .kind_of = kinds.data(),
                                .shuffle = shuffle,
                                .size = grid.y.patch * scale / shuffle,
                                .widest = widest};
    Spent measured;
    measured.ticks.resize(packed.size() + 1);
    stitch_into(out, batches, places, window, grid, scale, shuffle, row_begin, target, &upsampling, &measured);
    std::copy(measured.ticks.begin(), measured.ticks.end(), spent.mutable_data_ptr<double>());
}

// The adjoint: patch pixel (k, l) reads the gradient of its output pixel times wy[k] and then wx[l]. One patch of one
// channel is one item of work.
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

Tensor _stitch_patches_backward_cpu(const Tensor& grad,                    // [B, C, H·s, W·s]
                                    const std::optional<Tensor>& inverse,  // [N]
                                    const Tensor& window,                  // [P]
                                    int64_t height, int64_t width, int64_t patch, int64_t stride, int64_t scale,
                                    bool crop, int64_t num_patches) {
    const TileGrid grid = checked_grid(kOp, height, width, patch, stride, crop, scale);
    const int64_t span = patch * scale, tiles = grid.num_patches(), cols = grid.x.count();
    const std::optional<Tensor> places = checked_places(grad, inverse, grid, scale, num_patches);
    check_same_device(kOp, "window", window, grad);
    const int64_t batch = grad.size(0), channels = grad.size(1), out_height = grad.size(2), out_width = grad.size(3);
    const int64_t* place = places.has_value() ? places->const_data_ptr<int64_t>() : nullptr;
    if (place != nullptr) check_in_range(kOp, "inverse", place, batch * tiles, num_patches);
    // Patch numbers by row of `patches`: a row may hold several patches, or none.
    std::vector<int64_t> start(num_patches + 1, 0), numbers(batch * tiles);
    for (int64_t n = 0; n < batch * tiles; ++n) ++start[(place == nullptr ? n : place[n]) + 1];
    for (int64_t m = 0; m < num_patches; ++m) start[m + 1] += start[m];
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t n = 0; n < batch * tiles; ++n) numbers[next[place == nullptr ? n : place[n]]++] = n;

    const Tensor dense = torch::stable::contiguous(grad), dense_window = torch::stable::contiguous(window);
    const Tensor out = empty_tensor(kOp, "the gradient", {num_patches, channels, span, span}, grad.scalar_type(), grad);
    dispatch_floating(kOp, grad.scalar_type(), [&](auto zero) {
        using T = decltype(zero);
        using W = Work<T>;
        const W* weight = checked_window<W>(dense_window, span);
        const std::vector<W> weights_y = axis_weights(weight, grid.y, scale),
                             weights_x = axis_weights(weight, grid.x, scale);
        const T* data = dense.template const_data_ptr<T>();
        T* result = out.mutable_data_ptr<T>();
        parallel(num_patches * channels, grain_for(span * span * 8), [&](int64_t begin, int64_t end) {
            std::vector<W> row(span);
            for (int64_t item = begin; item < end; ++item) {
                const int64_t m = item / channels, c = item % channels;
                T* target = result + item * span * span;
                if (start[m] == start[m + 1]) std::fill(target, target + span * span, static_cast<T>(0.0f));
                for (int64_t s = start[m]; s < start[m + 1]; ++s) {
                    const int64_t image = numbers[s] / tiles, i = numbers[s] % tiles / cols, j = numbers[s] % cols;
                    const int64_t y0 = grid.y.origin(i) * scale, x0 = grid.x.origin(j) * scale;
                    run_isa<BackwardBody<T>>(data + ((image * channels + c) * out_height + y0) * out_width + x0,
                                             &weights_y[i * span], &weights_x[j * span],
                                             std::min(span, out_height - y0), std::min(span, out_width - x0), out_width,
                                             span, s == start[m], row.data(), target);
                }
            }
        });
    });
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, m) {
    FASTROUTE_IMPL(m, "stitch_patches", stitch_patches_cpu);
    FASTROUTE_IMPL(m, "stitch_patches.out", stitch_patches_out_cpu);
    FASTROUTE_IMPL(m, "stitch_patches.batches_out", stitch_batches_out_cpu);
    FASTROUTE_IMPL(m, "stitch_patches.upsampled_out", stitch_upsampled_out_cpu);
    FASTROUTE_IMPL(m, "_stitch_patches_backward", _stitch_patches_backward_cpu);
}

}  // namespace fastroute
