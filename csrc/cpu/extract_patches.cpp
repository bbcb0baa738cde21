// extract_patches: out[m, c, k, l] = (image[b, c, y0 + k, x0 + l] / maximum - mean[c]) / std[c] for the patch order[m]
// of image b at (y0, x0), reads clamped to the image; k and l run over a patch, or over the region that begins with it.
// One patch is one item of work.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/extract_patches.h"
#include "common/pixel.h"
#include "cpu/memory.h"

namespace fastroute {
namespace {

struct Layout {
    int64_t n, c, y, x;  // strides in elements
};

template <typename In, typename Out>
struct Convert {
    using W = std::conditional_t<std::is_same_v<In, double> || std::is_same_v<Out, double>, double, float>;
    const W* mean;               // [C] or null
    const W* std;                // [C] or null
    const Out* table = nullptr;  // [C, 256] for 8-bit pixels: a look-up instead of divisions

    // Pixels of a row side by side, in vectors.
    FASTROUTE_INLINE void row(const In* source, int64_t count, int64_t c, Out* target) const {
        if (mean == nullptr && std == nullptr) {
            for (int64_t l = 0; l < count; ++l) {
                if constexpr (std::is_same_v<In, Out>) {
                    target[l] = source[l];
                } else {
                    target[l] = static_cast<Out>(from_pixel<W>(source[l]));
                }
            }
        } else {
            for (int64_t l = 0; l < count; ++l) target[l] = (*this)(source[l], c);
        }
    }

    FASTROUTE_INLINE Out operator()(In pixel, int64_t c) const {
        if constexpr (std::is_same_v<In, uint8_t> && !std::is_same_v<In, Out>) return table[c * 256 + pixel];
        return compute(pixel, c);
    }

    FASTROUTE_INLINE Out compute(In pixel, int64_t c) const {
        if constexpr (std::is_same_v<In, Out>) {
            if (mean == nullptr && std == nullptr) return pixel;
        }
        W value = from_pixel<W>(pixel);
        if (mean != nullptr) value = value - mean[c];
        if (std != nullptr) value = value / std[c];
        return static_cast<Out>(value);
    }
};

// Where a patch begins in its image.
struct Place {
    int64_t image, y, x;
};

// Rows and columns that are cut out.
struct Extent {
    int64_t y, x;
};

template <typename In, typename Out>
struct ExtractBody {
    // One row of three channels from planes to pixels.
    FASTROUTE_INLINE static void interleave(const In* source, int64_t channel_step, int64_t count,
                                            const Convert<In, Out>& convert, Out* target) {
        constexpr int64_t kRun = 64;
        Out rows[3][kRun];
        for (int64_t at = 0; at < count; at += kRun) {
            const int64_t length = std::min(kRun, count - at);
            for (int64_t c = 0; c < 3; ++c) convert.row(source + c * channel_step + at, length, c, rows[c]);
            Out* pixels = target + 3 * at;
            for (int64_t l = 0; l < length; ++l) {
                pixels[3 * l] = rows[0][l], pixels[3 * l + 1] = rows[1][l], pixels[3 * l + 2] = rows[2][l];
            }
        }
    }

    // One row of one channel.
    FASTROUTE_INLINE static void copy_row(const In* source, int64_t from_x, Out* target, int64_t to_x, int64_t count,
                                          int64_t x, int64_t width, bool inside, bool plain, int64_t c,
                                          const Convert<In, Out>& convert) {
        if (!inside) {
            for (int64_t l = 0; l < count; ++l) {
                target[l * to_x] = convert(source[std::min(x + l, width - 1) * from_x], c);
            }
        } else if (from_x == 1 && to_x == 1) {
            if (plain) {
                copy_run(target, source + x, count * sizeof(In));
            } else {
                convert.row(source + x, count, c, target);
            }
        } else {
            for (int64_t l = 0; l < count; ++l) target[l * to_x] = convert(source[(x + l) * from_x], c);
        }
    }

    // One patch into `out`; `next` is the patch after it, whose pixels are asked for on the way.
    FASTROUTE_INLINE static void run(const In* images, Layout from, Out* out, Layout to, int64_t channels,
                                     int64_t height, int64_t width, Extent size, Place place, Place next,
                                     Convert<In, Out> convert) {
        const bool inside = place.x + size.x <= width;
        const bool plain = std::is_same_v<In, Out> && convert.mean == nullptr && convert.std == nullptr;
        // Both channels_last: a patch row is one run of pixels.
        const bool runs = plain && inside && from.c == 1 && to.c == 1 && from.x == channels && to.x == channels;
        const int64_t run_bytes = (from.c == 1 ? size.x * from.x : size.x) * static_cast<int64_t>(sizeof(In));
        const In* image = images + place.image * from.n;
        const In* ahead = images + next.image * from.n + next.x * from.x;
        const auto row_of = [&](Place at, int64_t k) { return std::min(at.y + k, height - 1) * from.y; };
        if (from.c == 1 || to.c == 1) {
            for (int64_t k = 0; k < size.y; ++k) {
                const In* row = image + row_of(place, k);
                if (from.c == 1) prefetch_run(ahead + row_of(next, k), run_bytes);
                if (runs) {
                    copy_run(out + k * to.y, row + place.x * from.x, size.x * channels * sizeof(In));
                    continue;
                }
                if (from.x == 1) {
                    for (int64_t c = 0; c < channels; ++c) {
                        prefetch_run(ahead + row_of(next, k) + c * from.c, run_bytes);
                    }
                }
                if (from.x == 1 && inside && channels == 3 && to.x == 3) {
                    interleave(row + place.x, from.c, size.x, convert, out + k * to.y);
                    continue;
                }
                for (int64_t c = 0; c < channels; ++c) {
                    copy_row(row + c * from.c, from.x, out + k * to.y + c * to.c, to.x, size.x, place.x, width, inside,
                             plain, c, convert);
                }
            }
            return;
        }
        // Planes one after the other: what is written lies side by side.
        for (int64_t c = 0; c < channels; ++c) {
            for (int64_t k = 0; k < size.y; ++k) {
                if (from.x == 1) prefetch_run(ahead + row_of(next, k) + c * from.c, run_bytes);
                copy_row(image + row_of(place, k) + c * from.c, from.x, out + k * to.y + c * to.c, to.x, size.x,
                         place.x, width, inside, plain, c, convert);
            }
        }
    }
};

// The same for patches that are plain copies of planes and lie inside the image: rows a fixed step apart, and nothing
// to decide for each.
template <typename T>
struct CopyBody {
    // Rows of a patch between a prefetch and the write that it serves: half a plane of 32 x 32 float32.
    static constexpr int64_t kRowsAhead = 16;

    // `kBytes` of each row, a length that the compiler knows, or `bytes` where it is 0.
    template <int64_t kBytes>
    FASTROUTE_INLINE static void copy(const T* source, const T* ahead, Layout from, T* out, Layout to, int64_t channels,
                                      int64_t rows, int64_t bytes) {
        const int64_t length = kBytes > 0 ? kBytes : bytes;
        for (int64_t c = 0; c < channels; ++c) {
            const T *row = source + c * from.c, *later = ahead + c * from.c;
            T* target = out + c * to.c;
            for (int64_t k = 0; k < rows; ++k) {
                const char* read = reinterpret_cast<const char*>(later);
                const char* written = reinterpret_cast<const char*>(target + kRowsAhead * to.y);
                for (int64_t at = 0; at < length; at += kLine) {
                    __builtin_prefetch(read + at, 0, 2);
                    __builtin_prefetch(written + at, 1);
                }
                __builtin_prefetch(read + length - 1, 0, 2);
                copy_run(target, row, length);
                row += from.y, later += from.y, target += to.y;
            }
        }
    }

    FASTROUTE_INLINE static void run(const T* images, Layout from, T* out, Layout to, int64_t channels, Extent size,
                                     Place place, Place next) {
        const auto begin_of = [&](Place at) { return images + at.image * from.n + at.y * from.y + at.x; };
        const int64_t bytes = size.x * static_cast<int64_t>(sizeof(T));
        if (bytes == 2 * kLine) {
            copy<2 * kLine>(begin_of(place), begin_of(next), from, out, to, channels, size.y, bytes);
        } else {
            copy<0>(begin_of(place), begin_of(next), from, out, to, channels, size.y, bytes);
        }
    }
};

template <typename W>
std::vector<W> statistic(const std::optional<Tensor>& values) {
    std::vector<W> result;
    if (!values.has_value()) return result;
    const Tensor dense = torch::stable::contiguous(*values);
    dispatch_floating(kOp, dense.scalar_type(), [&](auto zero) {
        using T = decltype(zero);
        const T* data = dense.const_data_ptr<T>();
        for (int64_t c = 0; c < dense.size(0); ++c) result.push_back(static_cast<W>(data[c]));
    });
    return result;
}

Layout layout_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}; }

Tensor extract_patches_cpu(const Tensor& image,                 // [B, C, H, W]
                           const std::optional<Tensor>& order,  // [M]
                           const std::optional<Tensor>& mean,   // [C]
                           const std::optional<Tensor>& std,    // [C]
                           int64_t patch, int64_t stride, bool crop, std::optional<ScalarType> dtype,
                           bool channels_last, int64_t rows, int64_t cols) {
    check_extent(rows, cols, patch);
    const Extent size{rows, cols};
    const Selection selected = checked_selection(image, order, patch, stride, crop);
    check_cpu(kOp, "image", image);
    const ScalarType target = dtype.value_or(image.scalar_type());
    check_conversion(image, target, mean, std);
    const int64_t channels = image.size(1), height = image.size(2), width = image.size(3), count = selected.count;
    const TileGrid& grid = selected.grid;
    const int64_t tiles = grid.num_patches(), tile_cols = grid.x.count();
    const int64_t* number = selected.numbers();
    if (number != nullptr) check_in_range(kOp, "order", number, count, selected.patches);

    const Tensor out = empty_patches(image, count, rows, cols, target, channels_last);
    prefer_huge_pages(out.mutable_data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
    const Layout from = layout_of(image), to = layout_of(out);
    dispatch_extract(image.scalar_type(), out.scalar_type(), [&](auto in_zero, auto out_zero) {
        using In = decltype(in_zero);
        using Out = decltype(out_zero);
        using W = typename Convert<In, Out>::W;
        const std::vector<W> means = statistic<W>(mean);
        const std::vector<W> stds = statistic<W>(std);
        Convert<In, Out> convert{means.empty() ? nullptr : means.data(), stds.empty() ? nullptr : stds.data()};
        std::vector<Out> table;
        if constexpr (std::is_same_v<In, uint8_t> && !std::is_same_v<In, Out>) {
            for (int64_t c = 0; c < channels; ++c) {
                for (int pixel = 0; pixel < 256; ++pixel) {
                    table.push_back(convert.compute(static_cast<In>(pixel), c));
                }
            }
            convert.table = table.data();
        }
        const In* in = image.const_data_ptr<In>();
        Out* result = out.mutable_data_ptr<Out>();
        const bool copies = means.empty() && stds.empty() && from.x == 1 && to.x == 1;
        const int64_t bytes = channels * rows * cols * static_cast<int64_t>(sizeof(In) + sizeof(Out));
        parallel(count, grain_for(bytes), [&](int64_t begin, int64_t end) {
            const auto place_of = [&](int64_t m) -> Place {
                const int64_t n = number == nullptr ? m : number[m], tile = n % tiles;
                return {n / tiles, grid.y.origin(tile / tile_cols), grid.x.origin(tile % tile_cols)};
            };
            if constexpr (std::is_same_v<In, Out>) {
                if (copies) {
                    const auto inside = [&](Place at) { return at.y + rows <= height && at.x + cols <= width; };
                    while (begin < end && inside(place_of(begin))) {
                        // The patch after the next: the next one's pixels are on their way.
                        run_isa<CopyBody<In>>(in, from, result + begin * to.n, to, channels, size, place_of(begin),
                                              place_of(std::min(begin + 2, end - 1)));
                        ++begin;
                    }
                }
            }
            for (int64_t m = begin; m < end; ++m) {
                run_isa<ExtractBody<In, Out>, kPrecise<In, Out>>(in, from, result + m * to.n, to, channels, height,
                                                                 width, size, place_of(m),
                                                                 place_of(std::min(m + 1, end - 1)), convert);
            }
        });
    });
    return out;
}

// The adjoint: image pixel (y, x) sums the gradients of all patch pixels that read it, tile rows before tile columns
// before repeated patches. One image row of one channel is one item of work, so no two threads write one pixel.
template <typename T>
struct BackwardBody {
    using W = Work<T>;

    FASTROUTE_INLINE static void run(const T* grad, const int64_t* start, const int64_t* rows, TileGrid grid,
                                     int64_t channels, int64_t image, int64_t c, int64_t y, W* folded, W* sum, T* out) {
        const int64_t width = grid.x.size, patch = grid.x.patch, cols = grid.x.count();
        for (int64_t x = 0; x < width; ++x) sum[x] = W(0);
        const TileRange range = grid.y.covering(y);
        const int64_t kept = std::min(patch, width);
        for (int64_t i = range.first; i <= range.last; ++i) {
            const int64_t first = y - grid.y.origin(i);
            if (first >= patch) continue;  // the remainder that "crop" drops
            // Patch rows below a small image read its last row.
            const int64_t last =
                y == grid.y.size - 1 ? std::max(first, grid.y.size < patch ? patch - 1 : first) : first;
            for (int64_t j = 0; j < cols; ++j) {
                const int64_t tile = (image * grid.y.count() + i) * cols + j;
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
                W* target = sum + grid.x.origin(j);
                for (int64_t l = 0; l < kept; ++l) target[l] += folded[l];
            }
        }
        for (int64_t x = 0; x < width; ++x) out[x] = static_cast<T>(sum[x]);
    }
};

Tensor _extract_patches_backward_cpu(const Tensor& grad,                  // [M, C, p, p]
                                     const std::optional<Tensor>& order,  // [M]
                                     int64_t batch, int64_t height, int64_t width, int64_t patch, int64_t stride,
                                     bool crop) {
    const Selection selected = checked_gradients(grad, order, batch, height, width, patch, stride, crop);
    const TileGrid& grid = selected.grid;
    const int64_t tiles = selected.patches, count = selected.count, channels = grad.size(1);
    // Rows of `grad` by patch number: a stable counting sort.
    std::vector<int64_t> start(tiles + 1, 0), rows(count);
    const int64_t* number = selected.numbers();
    if (number != nullptr) check_in_range(kOp, "order", number, count, tiles);
    for (int64_t m = 0; m < count; ++m) ++start[(number == nullptr ? m : number[m]) + 1];
    for (int64_t n = 0; n < tiles; ++n) start[n + 1] += start[n];
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t m = 0; m < count; ++m) rows[next[number == nullptr ? m : number[m]]++] = m;

    const Tensor dense = torch::stable::contiguous(grad);
    const Tensor out = empty_tensor(kOp, "the image", {batch, channels, height, width}, grad.scalar_type(), grad);
    dispatch_floating(kOp, grad.scalar_type(), [&](auto zero) {
        using T = decltype(zero);
        using W = Work<T>;
        const T* data = dense.template const_data_ptr<T>();
        T* result = out.mutable_data_ptr<T>();
        parallel(batch * channels * height, grain_for(width * 8), [&](int64_t begin, int64_t end) {
            std::vector<W> folded(patch), sum(width);
            for (int64_t item = begin; item < end; ++item) {
                const int64_t y = item % height, c = item / height % channels, b = item / height / channels;
                run_isa<BackwardBody<T>>(data, start.data(), rows.data(), grid, channels, b, c, y, folded.data(),
                                         sum.data(), result + item * width);
            }
        });
    });
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastroute, CPU, m) {
    FASTROUTE_IMPL(m, "extract_patches", extract_patches_cpu);
    FASTROUTE_IMPL(m, "_extract_patches_backward", _extract_patches_backward_cpu);
}

}  // namespace fastroute
