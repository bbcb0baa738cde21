// What stitch_patches and its adjoint know before they start: the weights of both axes, normalised over the tiles of a
// pixel, and where in memory a patch lies. Work mapping: one thread per weight, per row of patches, or per patch.
#pragma once

#include "common/pixel.h"
#include "common/stitch_patches.h"
#include "cuda/pack.cuh"

namespace fastroute {
namespace {

constexpr int kThreads = 256;
constexpr int kBatches = 64;  // tensors of patches that one launch can be told of

// Tiles that cover one pixel of an axis.
struct alignas(8) Cover {
    int first, last;
};

// A piece of memory for both axes: weights [rows, span] and [cols, span], covers [H] and [W].
template <typename W>
struct AxisTables {
    W* weights_y;
    W* weights_x;
    Cover* covers_y;
    Cover* covers_x;

    static int64_t bytes(const Geometry& geometry) {
        return (geometry.y.count() + geometry.x.count()) * geometry.span() * static_cast<int64_t>(sizeof(W)) +
               (geometry.y.size + geometry.x.size) * static_cast<int64_t>(sizeof(Cover)) + 16;
    }

    AxisTables(void* memory, const Geometry& geometry) {
        weights_y = static_cast<W*>(memory);
        weights_x = weights_y + geometry.y.count() * geometry.span();
        uintptr_t end = reinterpret_cast<uintptr_t>(weights_x + geometry.x.count() * geometry.span());
        covers_y = reinterpret_cast<Cover*>((end + 7) / 8 * 8);
        covers_x = covers_y + geometry.y.size;
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

template <typename W>
__global__ void __launch_bounds__(kThreads, 2) stitch_patches_tables_kernel(const W* __restrict__ window,  // [P]
                                                                            Geometry geometry, AxisTables<W> tables) {
    const int64_t span = geometry.span(), scale = geometry.scale;
    const int64_t weights_y = geometry.y.count() * span, weights = weights_y + geometry.x.count() * span;
    const int64_t covers_y = weights + geometry.y.size, total = covers_y + geometry.x.size;
    const int64_t step = int64_t{gridDim.x} * kThreads;
    for (int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x; n < total; n += step) {
        if (n < weights_y) {
            tables.weights_y[n] = axis_weight(window, geometry.y, scale, n / span, n % span);
        } else if (n < weights) {
            const int64_t at = n - weights_y;
            tables.weights_x[at] = axis_weight(window, geometry.x, scale, at / span, at % span);
        } else {
            const int64_t at = n < covers_y ? n - weights : n - covers_y;
            const TileRange range = n < covers_y ? geometry.y.covering(at) : geometry.x.covering(at);
            (n < covers_y ? tables.covers_y : tables.covers_x)[at] = {static_cast<int>(range.first),
                                                                      static_cast<int>(range.last)};
        }
    }
}

// Addresses of the rows [first, first + count) of patches that several tensors hold.
struct BatchList {
    const char* data[kBatches];
    int64_t end[kBatches];   // number of rows in the tensors up to this one
    int64_t step[kBatches];  // bytes from row to row
    int64_t first;
};

__global__ void __launch_bounds__(kThreads)
    stitch_patches_rows_kernel(BatchList list, int64_t count, const void** rows) {
    const int64_t step = int64_t{gridDim.x} * kThreads;
    for (int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x; n < count; n += step) {
        int batch = 0;
        while (n >= list.end[batch]) ++batch;
        const int64_t row = n - (batch == 0 ? 0 : list.end[batch - 1]);
        rows[list.first + n] = list.data[batch] + row * list.step[batch];
    }
}

// Where a patch is read within the region that holds it: its first pixel, and strides of the region in elements.
struct alignas(16) RegionPlace {
    const void* data;
    int c, y;
};

// Tensors of regions, each of one height and width in pixels, of which `inverse` numbers the rows from `first` on.
struct RegionList {
    const char* data[kBatches];
    int64_t end[kBatches];  // number of rows in the tensors up to this one
    int height[kBatches], width[kBatches];
    int64_t first, rows;
};

// What is alike for all regions: channels, memory format, bytes of an element, and pixels per LR pixel.
struct RegionFormat {
    int channels, bytes, factor;
    bool planar;
};

__device__ __forceinline__ int64_t clamped(int64_t value, int64_t last) {
    return value < 0 ? 0 : value < last ? value : last;
}

// Places of the patches that these tensors hold. Nothing can raise here: a row out of range becomes the nearest, and a
// patch that its region does not hold is moved into it.
__global__ void __launch_bounds__(kThreads)
    stitch_patches_regions_kernel(RegionList list, RegionFormat format,
                                  const int64_t* __restrict__ inverse,  // [N]
                                  const int64_t* __restrict__ region,   // [N]
                                  int64_t patches, int64_t count, Geometry geometry,
                                  RegionPlace* __restrict__ places) {  // [N]
    const int64_t step = int64_t{gridDim.x} * kThreads, tiles = geometry.num_patches(), cols = geometry.x.count();
    const int64_t span = geometry.y.patch * format.factor;
    for (int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x; n < patches; n += step) {
        const int64_t row = clamped(inverse[n], count - 1) - list.first;
        if (row < 0 || row >= list.rows) continue;
        int batch = 0;
        while (row >= list.end[batch]) ++batch;
        const int64_t height = list.height[batch], width = list.width[batch];
        const int64_t tile = n % tiles, corner = clamped(region[n], patches - 1) % tiles;
        const int64_t down = geometry.y.origin(tile / cols) - geometry.y.origin(corner / cols);
        const int64_t across = geometry.x.origin(tile % cols) - geometry.x.origin(corner % cols);
        const int64_t y = clamped(down * format.factor, height - span),
                      x = clamped(across * format.factor, width - span);
        const int64_t number = row - (batch == 0 ? 0 : list.end[batch - 1]);
        const int64_t pixel = format.planar ? 1 : format.channels, line = width * pixel;
        const int64_t at = number * format.channels * height * width + y * line + x * pixel;
        places[n] = {list.data[batch] + at * format.bytes, static_cast<int>(format.planar ? height * width : 1),
                     static_cast<int>(line)};
    }
}

template <typename W>
AxisTables<W> make_tables(const Queue& queue, const Tensor& window, const Geometry& geometry, const Tensor& memory) {
    const int64_t span = geometry.span();
    const W* weights = checked_window<W>(window, span);
    const AxisTables<W> tables(memory.mutable_data_ptr(), geometry);
    const int64_t items = (geometry.y.count() + geometry.x.count()) * span + geometry.y.size + geometry.x.size;
    queue.launch(stitch_patches_tables_kernel<W>, blocks_for(items, kThreads), kThreads, 0, weights, geometry, tables);
    return tables;
}

}  // namespace
}  // namespace fastroute
