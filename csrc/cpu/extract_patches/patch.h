// One patch, or region, of extract_patches: its rows converted and written, in whole vectors where they lie so.
#pragma once

#include <algorithm>

#include "common/extract_patches.h"
#include "common/pixel.h"
#include "cpu/halves.h"
#include "cpu/memory.h"

namespace fastroute {
namespace {

struct Layout {
    int64_t n, c, y, x;  // strides in elements

    explicit Layout(const Tensor& of) : n(of.stride(0)), c(of.stride(1)), y(of.stride(2)), x(of.stride(3)) {}
};

template <typename In, typename Out>
struct Convert {
    using W = std::conditional_t<std::is_same_v<In, double> || std::is_same_v<Out, double>, double, float>;
    const W* mean;               // [C]; null where there is neither mean nor std
    const W* std;                // [C] or null
    const Out* table = nullptr;  // [C, 256] for 8-bit pixels: a look-up instead of divisions

    // Pixels of a row side by side, in vectors.
    FASTROUTE_INLINE void row(const In* source, int64_t count, int64_t c, Out* target) const {
        if (mean == nullptr) {
            if constexpr (std::is_same_v<In, Half> && std::is_same_v<Out, float>) {
                if (has_halves()) return widen_halves(source, count, target);
            } else if constexpr (std::is_same_v<In, float> && std::is_same_v<Out, Half>) {
                if (has_halves()) return narrow_halves(source, count, target);
            }
            for (int64_t l = 0; l < count; ++l) target[l] = unchanged(source[l]);
        } else {
            for (int64_t l = 0; l < count; ++l) target[l] = (*this)(source[l], c);
        }
    }

    FASTROUTE_INLINE Out operator()(In pixel, int64_t c) const {
        if constexpr (std::is_same_v<In, uint8_t> && !std::is_same_v<In, Out>) return table[c * 256 + pixel];
        return compute(pixel, c);
    }

    FASTROUTE_INLINE Out compute(In pixel, int64_t c) const {
        if (mean == nullptr) return unchanged(pixel);
        const W value = from_pixel<W>(pixel) - mean[c];
        return static_cast<Out>(std == nullptr ? value : value / std[c]);
    }

  private:
    FASTROUTE_INLINE static Out unchanged(In pixel) {
        if constexpr (std::is_same_v<In, Out>) {
            return pixel;
        } else {
            return static_cast<Out>(from_pixel<W>(pixel));
        }
    }
};

// Where a patch begins in its image.
struct Place {
    int64_t image, y, x;
};

// Rows and columns.
struct Extent {
    int64_t y, x;
};

// What all patches of a call have in common. Held by value where pixels are written: the compiler cannot know that
// bytes written to a patch are none of its fields.
template <typename In, typename Out>
struct Task {
    const In* images;
    Layout from;
    Layout to;  // of `out`, which is one patch
    int64_t channels;
    Extent image, size;  // of an image, and of what is cut out
    Convert<In, Out> convert;
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

    // One row of one channel; `row` is that of the image, whose last pixel is repeated where the patch reaches beyond.
    // `plain`: nothing is converted.
    FASTROUTE_INLINE static void copy_row(const In* row, int64_t from_x, Out* target, int64_t to_x, Place place,
                                          int64_t count, int64_t width, int64_t c, const Convert<In, Out>& convert,
                                          bool plain) {
        const In* source = row + place.x * from_x;
        const int64_t inside = std::min(count, width - place.x);
        if (from_x == 1 && to_x == 1) {
            if (plain) {
                copy_run(target, source, inside * sizeof(In));
            } else {
                convert.row(source, inside, c, target);
            }
        } else {
            for (int64_t l = 0; l < inside; ++l) target[l * to_x] = convert(source[l * from_x], c);
        }
        if (inside == count) return;
        const Out last = target[(inside - 1) * to_x];
        for (int64_t l = inside; l < count; ++l) target[l * to_x] = last;
    }

    // One patch into `out`; `next` is the patch after it, whose pixels are asked for on the way.
    FASTROUTE_INLINE static void run(Task<In, Out> task, Place place, Place next, Out* out) {
        const Layout from = task.from, to = task.to;
        const Extent size = task.size;
        const Convert<In, Out> convert = task.convert;
        const int64_t channels = task.channels, height = task.image.y, width = task.image.x;
        const bool inside = place.x + size.x <= width;
        const bool plain = std::is_same_v<In, Out> && convert.mean == nullptr;
        // Both channels_last: a patch row is one run of pixels.
        const bool runs = plain && inside && from.c == 1 && to.c == 1 && from.x == channels && to.x == channels;
        const bool interleaved = from.x == 1 && inside && channels == 3 && to.x == 3 && to.c == 1;
        const int64_t run_bytes = (from.c == 1 ? size.x * from.x : size.x) * static_cast<int64_t>(sizeof(In));
        const In* image = task.images + place.image * from.n;
        const In* ahead = task.images + next.image * from.n + next.x * from.x;
        const auto row_of = [&](Place at, int64_t k) { return std::min(at.y + k, height - 1) * from.y; };
        // Pixel by pixel where either side is, else planes one after the other: what is written lies side by side.
        const bool by_pixel = from.c == 1 || to.c == 1;
        const int64_t outer = by_pixel ? size.y : channels, inner = by_pixel ? channels : size.y;
        for (int64_t o = 0; o < outer; ++o) {
            if (by_pixel) {
                const In* row = image + row_of(place, o);
                if (from.c == 1) prefetch_run(ahead + row_of(next, o), run_bytes);
                if (runs) {
                    copy_run(out + o * to.y, row + place.x * from.x, size.x * channels * sizeof(In));
                    continue;
                }
                if (interleaved) {
                    for (int64_t c = 0; c < 3; ++c) prefetch_run(ahead + row_of(next, o) + c * from.c, run_bytes);
                    interleave(row + place.x, from.c, size.x, convert, out + o * to.y);
                    continue;
                }
            }
            for (int64_t i = 0; i < inner; ++i) {
                const int64_t k = by_pixel ? o : i, c = by_pixel ? i : o;
                if (from.x == 1) prefetch_run(ahead + row_of(next, k) + c * from.c, run_bytes);
                copy_row(image + row_of(place, k) + c * from.c, from.x, out + k * to.y + c * to.c, to.x, place, size.x,
                         width, c, convert, plain);
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

    FASTROUTE_INLINE static void run(Task<T, T> task, Place place, Place next, T* out) {
        const Layout from = task.from, to = task.to;
        const auto begin_of = [&](Place at) { return task.images + at.image * from.n + at.y * from.y + at.x; };
        const int64_t bytes = task.size.x * static_cast<int64_t>(sizeof(T));
        if (bytes == 2 * kLine) {
            copy<2 * kLine>(begin_of(place), begin_of(next), from, out, to, task.channels, task.size.y, bytes);
        } else {
            copy<0>(begin_of(place), begin_of(next), from, out, to, task.channels, task.size.y, bytes);
        }
    }
};

}  // namespace
}  // namespace fastroute
