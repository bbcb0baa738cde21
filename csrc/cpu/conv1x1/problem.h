// What conv1x1 computes, and where its tensors lie.
#pragma once

#include <cstdint>
#include <vector>

namespace fastroute::conv1x1 {

// Pixels of one stretch of memory in every image: all of them, or those of one row.
struct Run {
    int64_t image, row, first, count;
};

// An image (B, C, H, W) by its strides, in elements.
template <typename T>
struct View {
    const T* data;
    int64_t channels, image, channel, row, pixel;

    const T* at(const Run& run) const { return data + run.image * image + run.row * row; }
};

template <typename T>
struct Problem {
    std::vector<View<T>> images;
    View<T> residual;
    bool adds, rectified;
    int64_t outputs, columns;            // outputs, and the same in whole vectors
    const float *weight, *bias, *slope;  // [C][columns], or pairs of bfloat16 [pairs][columns]; [columns]; [columns]
    T* out;                              // [B, H, W, outputs]
};

}  // namespace fastroute::conv1x1
