// What stitch_patches and its adjoint know before they start: the weights of both axes, normalised over the tiles of a
// pixel; which runs of pixels are those of one tile, unweighted; and where in memory every patch lies. Work mapping:
// one thread per entry of any table, in one launch.
#pragma once

#include "common/pixel.h"
#include "common/stitch_patches.h"
#include "cuda/pack.cuh"

namespace fastroute {
namespace {

constexpr int kThreads = 256;
constexpr int kBatches = 64;  // tensors of patches that one launch can be told of
constexpr int kGroup = 4;     // output rows that are copied or blended together

// Tiles that cover one pixel of an axis.
struct alignas(8) Cover {
    int first, last;
};

// A piece of memory for both axes: weights [rows, span] and [cols, span], covers [H] and [W]; and where pixels are
// copied in packs, the tile that alone makes, at a weight of 1, a group of output rows or a pack of columns, or -1.
template <typename W>
struct AxisTables {
    W* weights_y;
    W* weights_x;
    Cover* covers_y;
    Cover* covers_x;
    int* alone_y;  // [groups], whole groups of the image
    int* alone_x;  // [packs], whole packs of `pack` pixels; none of either where `pack` is 0
    int pack, groups, packs;

    static int64_t bytes(const Geometry& geometry, int pack) {
        return (geometry.y.count() + geometry.x.count()) * geometry.span() * static_cast<int64_t>(sizeof(W)) +
               (geometry.y.size + geometry.x.size) * static_cast<int64_t>(sizeof(Cover)) + 16 +
               (pack == 0 ? 0 : geometry.out_height() / kGroup + geometry.out_width() / pack) *
                   static_cast<int64_t>(sizeof(int));
    }

    int64_t entries(const Geometry& geometry) const {
        return (geometry.y.count() + geometry.x.count()) * geometry.span() + geometry.y.size + geometry.x.size +
               groups + packs;
    }

    AxisTables(void* memory, const Geometry& geometry, int out_pack)
        : pack(out_pack),
          groups(out_pack == 0 ? 0 : static_cast<int>(geometry.out_height() / kGroup)),
          packs(out_pack == 0 ? 0 : static_cast<int>(geometry.out_width() / out_pack)) {
        weights_y = static_cast<W*>(memory);
        weights_x = weights_y + geometry.y.count() * geometry.span();
        uintptr_t end = reinterpret_cast<uintptr_t>(weights_x + geometry.x.count() * geometry.span());
        covers_y = reinterpret_cast<Cover*>((end + 7) / 8 * 8);
        covers_x = covers_y + geometry.y.size;
        alone_y = reinterpret_cast<int*>(covers_x + geometry.x.size);
        alone_x = alone_y + groups;
    }
};

// Weight k of tile i: 0 outside the image, else its share of the windows of all tiles that cover the pixel.
template <typename W>
__device__ W axis_weight(const W* window, const TileAxis& axis, int64_t scale, int64_t i, int64_t k) {
    const int64_t at = axis.origin(i) * scale + k, length = axis.covered() * scale;
    if (at >= length) return W(0);
    const TileRange range = axis.covering(at / scale);
    W total = W(0);
    for (int64_t j = range.first; j <= range.last; ++j) total = add(total, window[at - axis.origin(j) * scale]);
    return total == W(0) ? W(axis.owns_end(i, at, length)) : window[k] / total;
}

// The tile that alone covers `count` output pixels from `at` on, at weights of 1; else -1. A window divided by itself
// is 1 unless it is 0 or not finite.
template <typename W>
__device__ int tile_alone(const W* window, const TileAxis& axis, int64_t scale, int64_t at, int count) {
    const TileRange first = axis.covering(at / scale), last = axis.covering((at + count - 1) / scale);
    if (first.first != last.last) return -1;
    const W* own = window + (at - axis.origin(first.first) * scale);
    bool is_one = true;
    for (int e = 0; e < count; ++e) is_one &= own[e] / own[e] == W(1);
    return is_one ? static_cast<int>(first.first) : -1;
}

// Where a patch is read, alone or within the region that holds it: its first pixel, and strides in elements.
struct alignas(16) Place {
    const void* data;
    int c, y;
};

// Tensors of patches or of regions, each of one height and width in elements, of which `inverse` numbers the rows from
// `first` on.
struct PlaceList {
    const char* data[kBatches];
    int64_t end[kBatches];  // number of rows in the tensors up to this one
    int height[kBatches], width[kBatches];
    int64_t first, rows;
};

// What is alike for all patches: steps in bytes and strides in elements of patches that lie one by one; of regions the
// channels, the memory format, and pixels per LR pixel.
struct PlaceFormat {
    int64_t n;
    int c, y, channels, bytes, factor;
    bool planar;
};

__device__ __forceinline__ int64_t clamped(int64_t value, int64_t last) {
    return value < 0 ? 0 : value < last ? value : last;
}

// The place of patch n, if these tensors hold it. Nothing can raise here: a row out of range becomes the nearest, and a
// patch that its region does not hold is moved into it.
__device__ void find_place(const PlaceList& list, const PlaceFormat& format, const int64_t* inverse,
                           const int64_t* region, int64_t n, int64_t patches, int64_t count, const Geometry& geometry,
                           Place* places) {
    const int64_t row = (inverse == nullptr ? n : clamped(inverse[n], count - 1)) - list.first;
    if (row < 0 || row >= list.rows) return;
    int batch = 0;
    while (row >= list.end[batch]) ++batch;
    const int64_t number = row - (batch == 0 ? 0 : list.end[batch - 1]);
    if (region == nullptr) {
        places[n] = {list.data[batch] + number * format.n, format.c, format.y};
        return;
    }
    const int64_t tiles = geometry.num_patches(), cols = geometry.x.count(), span = geometry.y.patch * format.factor;
    const int64_t height = list.height[batch], width = list.width[batch];
    const int64_t tile = n % tiles, corner = clamped(region[n], patches - 1) % tiles;
    const int64_t down = geometry.y.origin(tile / cols) - geometry.y.origin(corner / cols);
    const int64_t across = geometry.x.origin(tile % cols) - geometry.x.origin(corner % cols);
    const int64_t y = clamped(down * format.factor, height - span), x = clamped(across * format.factor, width - span);
    const int64_t pixel = format.planar ? 1 : format.channels, line = width * pixel;
    const int64_t at = number * format.channels * height * width + y * line + x * pixel;
    places[n] = {list.data[batch] + at * format.bytes, static_cast<int>(format.planar ? height * width : 1),
                 static_cast<int>(line)};
}

// Entries of the tables of both axes, if `window` is given, and behind them the places of patches.
template <typename W>
__global__ void __launch_bounds__(kThreads, 2)
    stitch_patches_tables_kernel(const W* __restrict__ window,  // [P] or null
                                 Geometry geometry, AxisTables<W> tables, const __grid_constant__ PlaceList list,
                                 PlaceFormat format, const int64_t* __restrict__ inverse,       // [N] or null
                                 const int64_t* __restrict__ region,                            // [N] or null
                                 int64_t patches, int64_t count, Place* __restrict__ places) {  // [N]
    const int64_t span = geometry.span(), scale = geometry.scale, given = window == nullptr ? 0 : 1;
    const int64_t weights_y = given * geometry.y.count() * span,
                  weights = weights_y + given * geometry.x.count() * span;
    const int64_t covers_y = weights + given * geometry.y.size, covers = covers_y + given * geometry.x.size;
    const int64_t groups = covers + given * tables.groups, all = groups + given * tables.packs;
    const int64_t step = int64_t{gridDim.x} * kThreads;
    for (int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x; n < all + patches; n += step) {
        if (n < weights_y) {
            tables.weights_y[n] = axis_weight(window, geometry.y, scale, n / span, n % span);
        } else if (n < weights) {
            const int64_t at = n - weights_y;
            tables.weights_x[at] = axis_weight(window, geometry.x, scale, at / span, at % span);
        } else if (n < covers) {
            const int64_t at = n < covers_y ? n - weights : n - covers_y;
            const TileRange range = n < covers_y ? geometry.y.covering(at) : geometry.x.covering(at);
            (n < covers_y ? tables.covers_y : tables.covers_x)[at] = {static_cast<int>(range.first),
                                                                      static_cast<int>(range.last)};
        } else if (n < groups) {
            const int64_t at = n - covers;
            tables.alone_y[at] = tile_alone(window, geometry.y, scale, at * kGroup, kGroup);
        } else if (n < all) {
            const int64_t at = n - groups;
            tables.alone_x[at] = tile_alone(window, geometry.x, scale, at * tables.pack, tables.pack);
        } else {
            find_place(list, format, inverse, region, n - all, patches, count, geometry, places);
        }
    }
}

}  // namespace
}  // namespace fastroute
