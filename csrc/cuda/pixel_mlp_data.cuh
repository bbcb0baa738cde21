// What the kernels of pixel_mlp share: where an output pixel lies, which pixels belong to a class, and the residual.
// All are plain structs, passed by value.
#pragma once

#include <cstdint>

#include "common/pixel_mlp.h"
#include "common/pixel_mlp_axis.h"
#include "cuda/launch.h"

namespace fastroute::pixel_mlp {

// A class id that is out of range: a kernel cannot raise without a wait, so such pixels are free.
inline constexpr uint32_t kNoClass = 256;

// One output row or column: the feature that it reads, how far from its centre, and the bilinear residual's two pixels.
template <typename W>
struct alignas(16) Place {
    int32_t nearest, first;
    W relative, weight;
};

// A chunk of output pixels, numbered image by image, row by row. `rows` points at the chunk's first row, and so does
// `out`.
template <typename T>
struct Pixels {
    using W = Work<T>;
    const Place<W>* rows;
    const Place<W>* cols;
    uint32_t images, height, width;
    int32_t feature_row, feature_rows, feature_cols;  // the features that it reads: first row, rows, columns
    const T* residual;                                // [images, C, h, w], or null
    int64_t residual_stride[4];
    int32_t source_rows, source_cols;  // h, w
    T* out;                            // [images, C, rows, W]
    int64_t out_image, out_channel;    // strides
    int32_t channels;

    FASTROUTE_HOST_DEVICE uint32_t count() const { return images * height * width; }
};

// One output pixel.
template <typename W>
struct At {
    uint32_t image, row, col;
    Place<W> y, x;
};

template <typename T>
__device__ __forceinline__ At<Work<T>> pixel_at(const Pixels<T>& p, uint32_t pixel) {
    const uint32_t line = pixel / p.width, col = pixel - line * p.width;
    const uint32_t image = line / p.height, row = line - image * p.height;
    return {image, row, col, p.rows[row], p.cols[col]};
}

// The number of the feature that a pixel reads, among those of the chunk.
template <typename T>
__device__ __forceinline__ uint32_t feature_of(const Pixels<T>& p, const At<Work<T>>& at) {
    const uint32_t row = at.image * p.feature_rows + (at.y.nearest - p.feature_row);
    return row * p.feature_cols + at.x.nearest;
}

// out = value + the bilinear residual, rounded once.
template <typename T>
__device__ __forceinline__ void store_pixel(const Pixels<T>& p, const At<Work<T>>& at, int32_t channel, Work<T> value) {
    using W = Work<T>;
    if (p.residual != nullptr) {
        const T* top = p.residual + at.image * p.residual_stride[0] + channel * p.residual_stride[1] +
                       at.y.first * p.residual_stride[2] + at.x.first * p.residual_stride[3];
        const int64_t down = at.y.first + 1 < p.source_rows ? p.residual_stride[2] : 0;
        const int64_t right = at.x.first + 1 < p.source_cols ? p.residual_stride[3] : 0;
        const W a = static_cast<W>(top[0]), b = static_cast<W>(top[right]);
        const W c = static_cast<W>(top[down]), d = static_cast<W>(top[down + right]);
        const W near = a * (W(1) - at.y.weight) + c * at.y.weight, far = b * (W(1) - at.y.weight) + d * at.y.weight;
        value += near * (W(1) - at.x.weight) + far * at.x.weight;
    }
    p.out[at.image * p.out_image + channel * p.out_channel + static_cast<int64_t>(at.row) * p.width + at.col] =
        static_cast<T>(value);
}

// The pixels of one class: a slice of the sorted list, whose ends only the device knows; or all `count` of the chunk.
struct Members {
    const uint32_t* pixels;  // or null: all
    const uint32_t* ends;    // first of the class, one past its last
    uint32_t count;

    __device__ __forceinline__ uint32_t first() const { return pixels == nullptr ? 0 : ends[0]; }
    __device__ __forceinline__ uint32_t size() const { return pixels == nullptr ? count : ends[1] - ends[0]; }
    __device__ __forceinline__ uint32_t at(uint32_t i) const { return pixels == nullptr ? i : pixels[i]; }
};

// The class map of a chunk, [images, height, W].
struct ClassMap {
    const void* data;
    int64_t stride[3];
    bool bytes;   // uint8, else int64
    bool linear;  // pixels follow each other without a gap
    uint32_t height, width, classes;

    __device__ __forceinline__ uint32_t at(uint32_t pixel) const {
        int64_t place = pixel;
        if (!linear) {
            const uint32_t line = pixel / width, col = pixel - line * width;
            place = line / height * stride[0] + line % height * stride[1] + col * stride[2];
        }
        const int64_t id = bytes ? static_cast<const uint8_t*>(data)[place] : static_cast<const int64_t*>(data)[place];
        return id >= 0 && id < classes ? static_cast<uint32_t>(id) : kNoClass;
    }
};

}  // namespace fastroute::pixel_mlp
