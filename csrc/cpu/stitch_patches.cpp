// stitch_patches: out[b, c, Y, X] = Σ_i wy[i, Y] · Σ_j wx[j, X] · patch(i, j)[c, Y - y_i, X - x_j], the sums over the
// tile rows i and tile columns j that cover the pixel. Eight output rows of one channel are one item of work: tile by
// tile they are summed in the first-level cache, and every output pixel is written once. Multiplications and additions
// are rounded one by one (no contraction), in one order, so the result has the same bits on every instruction set and
// thread count.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/geometry.h"
#include "cpu/convert.h"
#include "cpu/memory.h"

namespace fastroute {
namespace {

constexpr const char* kOp = "stitch_patches";
constexpr int64_t kRows = 8;  // output rows per item of work: 8 rows of a 128-pixel patch are one 4 KiB page
constexpr int64_t kStreamFrom = 8 << 20;  // bytes of output from which it is written past the caches

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
            weights[i * span + k] = at < length ? window[k] / total[at] : W(0);
        }
    }
    return weights;
}

// Where the pixels of a patch lie: with a fused pixel shuffle of factor r, pixel (Y, X) of channel c is element (Y / r,
// X / r) of channel c·r² + (Y mod r)·r + X mod r.
struct PatchLayout {
    int64_t n, c, y, x;  // strides in elements
    int64_t shuffle;
};

// One row of one patch as a run of sums, in place when it already is one.
template <typename T>
FASTROUTE_INLINE const Work<T>* load_row(const T* patch, PatchLayout at, int64_t c, int64_t k, int64_t span,
                                         Work<T>* buffer) {
    using W = Work<T>;
    const int64_t r = at.shuffle;
    const T* row = patch + (c * r * r + k % r * r) * at.c + k / r * at.y;
    if constexpr (std::is_same_v<T, W>) {
        if (r == 1 && at.x == 1) return row;
        if (r == 4 && at.c == 1) {
            for (int64_t l = 0; l < span / 4; ++l) std::memcpy(buffer + 4 * l, row + l * at.x, 4 * sizeof(T));
            return buffer;
        }
    }
    if (r == 1) {
        for (int64_t l = 0; l < span; ++l) buffer[l] = static_cast<W>(row[l * at.x]);
    } else {
        for (int64_t l = 0; l < span / r; ++l) {
            for (int64_t d = 0; d < r; ++d) buffer[l * r + d] = static_cast<W>(row[l * at.x + d * at.c]);
        }
    }
    return buffer;
}

// Asks for one row of a patch; with a fused pixel shuffle r rows lie together and are asked for once.
template <typename T>
FASTROUTE_INLINE void prefetch_row(const T* patch, PatchLayout at, int64_t c, int64_t k, int64_t span) {
    const int64_t r = at.shuffle;
    if (r > 1 && (at.c != 1 || k % r != 0)) return;
    const T* row = patch + c * r * r * at.c + k / r * at.y;
    if (at.x == 1) {
        prefetch_run(row, span * static_cast<int64_t>(sizeof(T)));
    } else {
        for (int64_t l = 0; l < span / r; ++l) __builtin_prefetch(row + l * at.x);
    }
}

template <typename T>
struct StitchPlan {
    using W = Work<T>;
    const T* patches;
    PatchLayout layout;
    const int64_t* inverse;  // [N] or null
    const W* weights_y;      // [rows, span]
    const W* weights_x;      // [cols, span]
    TileGrid grid;
    int64_t scale, span, width;  // width in output pixels

    // The row of `patches` that holds patch n.
    FASTROUTE_INLINE int64_t place(int64_t n) const { return inverse == nullptr ? n : inverse[n]; }
};

// Buffers of one thread.
template <typename W>
struct Scratch {
    std::vector<W> window;  // [kRows, span]: columns that the tiles so far cover and later ones may add to
    std::vector<W> sum;     // [kRows, width]: for rows that several tile rows cover
    std::vector<W> row;     // [span]

    Scratch(int64_t width, int64_t span) : window(kRows * span), sum(kRows * width), row(span) {}
};

template <typename T, typename Out>
struct StitchBody {
    using W = Work<T>;

    // Finished columns [x, x + count) of the rows: to the image, or times wy into the sum over tile rows.
    FASTROUTE_INLINE static void emit(const W* window, int64_t span, int64_t rows, int64_t x, int64_t count, Out* out,
                                      int64_t row_step, bool stream) {
        for (int64_t r = 0; r < rows; ++r) {
            const W* from = window + r * span;
            Out* to = out + r * row_step + x;
            if constexpr (std::is_same_v<Out, W>) {
                stream ? stream_copy(to, from, count * sizeof(W)) : copy_run(to, from, count * sizeof(W));
            } else {
                for (int64_t l = 0; l < count; ++l) to[l] = to_pixel<Out>(from[l]);
            }
        }
    }

    FASTROUTE_INLINE static void add(const W* window, int64_t span, int64_t rows, int64_t x, int64_t count,
                                     const W* weight, bool first, W* sum, int64_t width) {
        for (int64_t r = 0; r < rows; ++r) {
            const W* from = window + r * span;
            W* to = sum + r * width + x;
            for (int64_t l = 0; l < count; ++l) to[l] = (first ? W(0) : to[l]) + weight[r] * from[l];
        }
    }

    // Output rows [at, at + rows), which the same tile rows cover. Columns outside and rows inside: a patch is then
    // read in runs of several rows, which the hardware prefetches; and what is being summed stays in the first-level
    // cache.
    FASTROUTE_INLINE static void run(const StitchPlan<T>& plan, int64_t image, int64_t c, int64_t at, int64_t rows,
                                     TileRange range, bool stream, Scratch<W>* scratch, Out* out, int64_t row_step) {
        W* window = scratch->window.data();
        W* sum = scratch->sum.data();
        const int64_t cols = plan.grid.x.count(), span = plan.span, width = plan.width;
        const W* top = plan.weights_y + range.first * span + at - plan.grid.y.origin(range.first) * plan.scale;
        // One tile row of weight 1, as almost everywhere under a uniform window: nothing to sum over tile rows.
        bool direct = range.first == range.last;
        for (int64_t r = 0; r < rows; ++r) direct = direct && top[r] == W(1);
        for (int64_t i = range.first; i <= range.last; ++i) {
            const int64_t k = at - plan.grid.y.origin(i) * plan.scale;
            int64_t shared = 0;  // columns at the front of the window that earlier tiles began
            for (int64_t j = 0; j < cols; ++j) {
                const int64_t n = (image * plan.grid.y.count() + i) * cols + j;
                const T* patch = plan.patches + plan.place(n) * plan.layout.n;
                const T* ahead = j + 1 < cols ? plan.patches + plan.place(n + 1) * plan.layout.n : patch;
                const W* weight = plan.weights_x + j * span;
                const int64_t x0 = plan.grid.x.origin(j) * plan.scale, kept = std::min(span, width - x0);
                for (int64_t r = 0; r < rows; ++r) {
                    prefetch_row(ahead, plan.layout, c, k + r, span);
                    const W* row = load_row(patch, plan.layout, c, k + r, span, scratch->row.data());
                    W* target = window + r * span;
                    for (int64_t l = 0; l < shared; ++l) target[l] += weight[l] * row[l];
                    for (int64_t l = shared; l < kept; ++l) target[l] = W(0) + weight[l] * row[l];
                }
                const int64_t finished = (j + 1 < cols ? plan.grid.x.origin(j + 1) * plan.scale : width) - x0;
                if (direct) {
                    emit(window, span, rows, x0, finished, out, row_step, stream);
                } else {
                    add(window, span, rows, x0, finished, plan.weights_y + i * span + k, i == range.first, sum, width);
                }
                shared = kept - finished;
                for (int64_t r = 0; r < rows && shared > 0; ++r) {
                    std::memmove(window + r * span, window + r * span + finished, shared * sizeof(W));
                }
            }
        }
        if (!direct) emit(sum, width, rows, 0, width, out, row_step, stream);
    }
};

bool same(TileRange a, TileRange b) { return a.first == b.first && a.last == b.last; }

// Images of N patches each; checks what the rows [begin, end) of the output will read.
int64_t checked_batch(const std::optional<Tensor>& inverse, int64_t num_patches, const TileGrid& grid, int64_t scale,
                      int64_t begin, int64_t end) {
    const int64_t tiles = grid.num_patches(), cols = grid.x.count();
    const int64_t count = inverse.has_value() ? inverse->size(0) : num_patches;
    FASTROUTE_CHECK(count % tiles == 0, kOp, ": patches must fill whole images of ", tiles, "; got ", count);
    if (!inverse.has_value() || begin >= end) return count / tiles;
    const int64_t* places = inverse->const_data_ptr<int64_t>();
    const int64_t first = grid.y.covering(begin / scale).first, last = grid.y.covering((end - 1) / scale).last;
    for (int64_t b = 0; b < count / tiles; ++b) {
        check_in_range(kOp, "inverse", places + b * tiles + first * cols, (last - first + 1) * cols, num_patches);
    }
    return count / tiles;
}

template <typename T>
const T* typed_window(const Tensor& window, int64_t span, ScalarType type) {
    FASTROUTE_CHECK(window.dim() == 1 && window.size(0) == span && window.scalar_type() == type, kOp,
                    ": window must be ", span, " weights, float32, or float64 for float64 patches");
    return window.const_data_ptr<T>();
}

// Height and width of the whole stitched image, and its channels, from checked arguments.
struct Target {
    int64_t batch, channels, rows, width;
};

Target checked_target(const Tensor& patches, const std::optional<Tensor>& inverse, const TileGrid& grid, int64_t scale,
                      int64_t shuffle, int64_t row_begin, int64_t row_end) {
    check_rank(kOp, "patches", patches, 4);
    const int64_t span = grid.y.patch * scale, square = shuffle * shuffle;
    FASTROUTE_CHECK(
        shuffle >= 1 && span % shuffle == 0 && patches.size(2) == span / shuffle && patches.size(3) == span / shuffle,
        kOp, ": patches must be ", span, " / ", shuffle, " pixels wide; got ", patches.size(2), " x ", patches.size(3));
    FASTROUTE_CHECK(patches.size(1) % square == 0, kOp, ": patches must have C * ", square, " channels; got ",
                    patches.size(1));
    const int64_t height = grid.y.covered() * scale;
    FASTROUTE_CHECK(row_begin >= 0 && row_begin <= row_end && row_end <= height, kOp, ": rows must lie in [0, ", height,
                    "]; got [", row_begin, ", ", row_end, ")");
    return {checked_batch(inverse, patches.size(0), grid, scale, row_begin, row_end), patches.size(1) / square,
            row_end - row_begin, grid.x.covered() * scale};
}

void stitch_into(const Tensor& out, const Tensor& patches, const std::optional<Tensor>& places, const Tensor& window,
                 const TileGrid& grid, int64_t scale, int64_t shuffle, int64_t row_begin, const Target& target) {
    const int64_t span = grid.y.patch * scale, channels = target.channels, rows = target.rows;
    const Tensor dense_window = torch::stable::contiguous(window);
    dispatch_floating(kOp, patches.scalar_type(), [&](auto zero) {
        using T = decltype(zero);
        using W = Work<T>;
        const W* weight =
            typed_window<W>(dense_window, span, std::is_same_v<W, double> ? ScalarType::Double : ScalarType::Float);
        const std::vector<W> weights_y = axis_weights(weight, grid.y, scale),
                             weights_x = axis_weights(weight, grid.x, scale);
        const StitchPlan<T> plan{patches.const_data_ptr<T>(),
                                 {patches.stride(0), patches.stride(1), patches.stride(2), patches.stride(3), shuffle},
                                 places.has_value() ? places->const_data_ptr<int64_t>() : nullptr,
                                 weights_y.data(),
                                 weights_x.data(),
                                 grid,
                                 scale,
                                 span,
                                 target.width};
        dispatch_image(kOp, out.scalar_type(), [&](auto out_zero) {
            using Out = decltype(out_zero);
            Out* result = out.mutable_data_ptr<Out>();
            const int64_t image_step = out.stride(0), channel_step = out.stride(1), row_step = out.stride(2);
            // What does not fit in the caches anyway should not push anything else out of them.
            const bool stream = target.batch * channels * rows * target.width * int64_t(sizeof(Out)) >= kStreamFrom;
            const int64_t blocks = (rows + kRows - 1) / kRows;
            parallel(
                target.batch * channels * blocks, grain_for(kRows * target.width * 8), [&](int64_t begin, int64_t end) {
                    Scratch<W> scratch(target.width, span);
                    for (int64_t item = begin; item < end; ++item) {
                        const int64_t c = item / blocks % channels, b = item / blocks / channels;
                        int64_t y = item % blocks * kRows;
                        const int64_t last = std::min(rows, y + kRows);
                        while (y < last) {
                            // As many rows as the same tile rows cover; that changes between LR rows alone.
                            const TileRange range = grid.y.covering((row_begin + y) / scale);
                            int64_t next = y + 1;
                            while (next < last && same(range, grid.y.covering((row_begin + next) / scale))) ++next;
                            run_isa<StitchBody<T, Out>>(plan, b, c, row_begin + y, next - y, range, stream, &scratch,
                                                        result + b * image_step + c * channel_step + y * row_step,
                                                        row_step);
                            y = next;
                        }
                    }
                    if (stream) stream_fence();
                });
        });
    });
}

Tensor stitch_patches_cpu(const Tensor& patches,                 // [M, C·r·r, P / r, P / r]
                          const std::optional<Tensor>& inverse,  // [N]
                          const Tensor& window,                  // [P]
                          int64_t height, int64_t width, int64_t patch, int64_t stride, int64_t scale, bool crop,
                          int64_t shuffle, std::optional<ScalarType> dtype, int64_t row_begin, int64_t row_end) {
    const TileGrid grid{{height, patch, stride, crop}, {width, patch, stride, crop}};
    const std::optional<Tensor> places = checked_index(kOp, "inverse", inverse);
    const Target target = checked_target(patches, places, grid, scale, shuffle, row_begin, row_end);
    const int64_t size[] = {target.batch, target.channels, target.rows, target.width};
    const Tensor out =
        torch::stable::empty({size, 4}, dtype.value_or(patches.scalar_type()), std::nullopt, patches.device());
    prefer_huge_pages(out.mutable_data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
    stitch_into(out, patches, places, window, grid, scale, shuffle, row_begin, target);
    return out;
}

void stitch_patches_out_cpu(const Tensor& patches, const std::optional<Tensor>& inverse, const Tensor& window,
                            int64_t height, int64_t width, int64_t patch, int64_t stride, int64_t scale, bool crop,
                            int64_t shuffle, int64_t row_begin, int64_t row_end,
                            const Tensor& out) {  // [B, C, rows, W·s]
    const TileGrid grid{{height, patch, stride, crop}, {width, patch, stride, crop}};
    const std::optional<Tensor> places = checked_index(kOp, "inverse", inverse);
    const Target target = checked_target(patches, places, grid, scale, shuffle, row_begin, row_end);
    check_cpu(kOp, "out", out);
    FASTROUTE_CHECK(out.dim() == 4 && out.size(0) == target.batch && out.size(1) == target.channels &&
                        out.size(2) == target.rows && out.size(3) == target.width &&
                        (out.stride(3) == 1 || target.width <= 1),
                    kOp, ": out must be ", target.batch, " x ", target.channels, " x ", target.rows, " x ",
                    target.width, " with contiguous rows");
    stitch_into(out, patches, places, window, grid, scale, shuffle, row_begin, target);
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
    check_rank(kOp, "grad", grad, 4);
    const TileGrid grid{{height, patch, stride, crop}, {width, patch, stride, crop}};
    const int64_t span = patch * scale, tiles = grid.num_patches(), cols = grid.x.count();
    const int64_t batch = grad.size(0), channels = grad.size(1), out_height = grad.size(2), out_width = grad.size(3);
    FASTROUTE_CHECK(out_height == grid.y.covered() * scale && out_width == grid.x.covered() * scale, kOp,
                    ": grad must have the size of the stitched image; got ", out_height, " x ", out_width);
    const std::optional<Tensor> places = checked_index(kOp, "inverse", inverse);
    FASTROUTE_CHECK((places.has_value() ? places->size(0) : num_patches) == batch * tiles, kOp,
                    ": inverse must have one entry per patch");
    const int64_t* place = places.has_value() ? places->const_data_ptr<int64_t>() : nullptr;
    if (place != nullptr) check_in_range(kOp, "inverse", place, batch * tiles, num_patches);
    // Patch numbers by row of `patches`: a row may hold several patches, or none.
    std::vector<int64_t> start(num_patches + 1, 0), numbers(batch * tiles);
    for (int64_t n = 0; n < batch * tiles; ++n) ++start[(place == nullptr ? n : place[n]) + 1];
    for (int64_t m = 0; m < num_patches; ++m) start[m + 1] += start[m];
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t n = 0; n < batch * tiles; ++n) numbers[next[place == nullptr ? n : place[n]]++] = n;

    const Tensor dense = torch::stable::contiguous(grad), dense_window = torch::stable::contiguous(window);
    const int64_t size[] = {num_patches, channels, span, span};
    const Tensor out = torch::stable::empty({size, 4}, grad.scalar_type(), std::nullopt, grad.device());
    dispatch_floating(kOp, grad.scalar_type(), [&](auto zero) {
        using T = decltype(zero);
        using W = Work<T>;
        const W* weight =
            typed_window<W>(dense_window, span, std::is_same_v<W, double> ? ScalarType::Double : ScalarType::Float);
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
    m.impl("stitch_patches", TORCH_BOX(&stitch_patches_cpu));
    m.impl("stitch_patches.out", TORCH_BOX(&stitch_patches_out_cpu));
    m.impl("_stitch_patches_backward", TORCH_BOX(&_stitch_patches_backward_cpu));
}

}  // namespace fastroute
