// What conv1x1 computes, and where its tensors lie.
#pragma once

#include <cstdint>
#include <vector>

namespace fastroute::conv1x1 {

// Pixels of one stretch of memory in every image: all of them, or those of one row.
struct Run {
    int64_t image, row, count;
};

// An image (B, C, H, W) by its strides, in elements.
template <typename T>
struct View {
    T* data;
    int64_t channels, image, channel, row, pixel;

    T* at(const Run& run) const { return data + run.image * image + run.row * row; }
};

template <typename T>
struct Problem {
    std::vector<View<const T>> images;
    View<const T> residual;
    bool adds, rectified;
    int64_t outputs, columns;            // outputs, and the same in whole vectors
    const float *weight, *bias, *slope;  // [C][columns], or pairs of bfloat16 [pairs][columns]; [columns]; [columns]
    View<T> out;                         // [B, H, W, outputs], outputs side by side
};

}  // namespace fastroute::conv1x1
